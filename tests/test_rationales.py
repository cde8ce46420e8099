"""The dataset types that keep the trace, in real axolotl: what is written, which tokens have a loss, what is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from axolotl.utils.dict import DictDefault
from datasets import load_dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from experiments import bench_pairs
from tests import checkpoints
from tests.conftest import BIN
from tests.test_pairs import answer, request
from thinkswitch_plugin import answer_only, files, post_thinking, pre_thinking
from thinkswitch_plugin.data import pairs
from thinkswitch_plugin.data.formats import POST, PRE, Format, parse, render
from thinkswitch_plugin.demo.tokenizer import build_tokenizer
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.perception.student import make_student

Write = Callable[[str, Sequence[object]], Path]
TYPES = {PRE: pre_thinking, POST: post_thinking}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    checkpoints.write(folder / "base", checkpoints.qwen3(0))
    build_tokenizer("instruct").save_pretrained(folder / "base")
    make_student(folder / "base", folder / "student", soft_tokens=4)
    return folder / "student"


@pytest.fixture(scope="module")
def tokenizer(student: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(student)


def tokenized(tokenizer: Any, path: Path, module: Any, **answers: Any) -> list[dict[str, Any]]:
    cfg = DictDefault(
        {
            "sequence_len": 128,
            "train_on_inputs": False,
            "chat_template": "tokenizer_default",
            "thinkswitch": {"answers": answers} if answers else None,
        }
    )
    ds_cfg = DictDefault({"path": str(path), "type": module.__name__})
    dataset = load_dataset("json", data_files=str(path), split="train")
    return list(module.load(tokenizer, cfg, ds_cfg).wrap_dataset(dataset, process_count=1))


def rationale(question: str, text: str, trace: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": text}],
        "trace": trace,
    }


@pytest.mark.parametrize("form", TYPES)
def test_the_whole_turn_and_its_end_token_carry_a_loss_and_nothing_else(
    tokenizer: Any, write_jsonl: Write, form: Format
) -> None:
    (row,) = tokenized(
        tokenizer, write_jsonl("rationales.jsonl", [rationale("2+3*2", "0", "2+3=5\n5*2=0")]), TYPES[form]
    )
    turn = render(form, "2+3=5\n5*2=0", "0")
    asked = f"<|im_start|>user\n{'<|soft|>' * 4}2+3*2<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(row["input_ids"]) == asked + turn + "<|im_end|>\n"
    trained = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert tokenizer.decode(trained) == turn + "<|im_end|>"
    assert tokenizer.convert_ids_to_tokens(trained[0]) == ("<think>" if form == PRE else "<answer>")


def test_generations_give_the_same_rows_as_their_rationales(tokenizer: Any, write_jsonl: Write, tmp_path: Path) -> None:
    requests = write_jsonl("requests.jsonl", [request(f"p{i}", text=t) for i, t in enumerate(["2+3", "4+4"])])
    generations = write_jsonl(
        "generations.jsonl", [answer("p1-s0", "4+4=8\n</think>\n\n8"), answer("p0-s0", "5", reasoning="2+3=5")]
    )
    rationales = tmp_path / "rationales.jsonl"
    pairs.write_pairs(requests, generations, rationales, keep_trace=True)
    assert [(row["prompt_id"], row["trace"]) for _, row in files.read_jsonl(rationales)] == [
        ("p0", "2+3=5"), ("p1", "4+4=8"),
    ]  # fmt: skip
    for module in TYPES.values():
        assert tokenized(tokenizer, generations, module) == tokenized(tokenizer, rationales, module)
    assert tokenized(tokenizer, rationales, answer_only) == tokenized(tokenizer, generations, answer_only)


def test_a_vote_keeps_the_trace_of_the_sample_it_chose(tokenizer: Any, write_jsonl: Write) -> None:
    write_jsonl("requests.jsonl", [request("p0", s) for s in range(3)])
    texts = ["1+2=3</think>3", "2+2=4</think>4", "3+1=4</think>4"]
    generations = write_jsonl("generations.jsonl", [answer(f"p0-s{i}", t) for i, t in enumerate(texts)])
    (row,) = tokenized(tokenizer, generations, pre_thinking, selection="vote", kind="digit")
    assert "<think>\n2+2=4\n</think>\n\n4<|im_end|>" in tokenizer.decode(row["input_ids"])


def test_what_a_format_cannot_hold_is_dropped_and_counted_only_where_traces_are_kept(write_jsonl: Write) -> None:
    texts = [
        "t</think>1",
        "see <answer>1</answer></think>1",
        "t</think><answer>1</answer>",
        "t<|im_end|></think>1",
        "<think>t<think>u</think>1",
        "</think>1",
    ]
    requests = write_jsonl("requests.jsonl", [request(f"p{i}") for i in range(len(texts))])
    generations = write_jsonl("generations.jsonl", [answer(f"p{i}-s0", t) for i, t in enumerate(texts)])
    report = pairs.PairReport()
    rows = list(pairs.build_pairs(requests, generations, keep_trace=True, report=report))
    assert [(row["prompt_id"], row["trace"]) for row in rows] == [("p0", "t"), ("p2", "t")]
    assert report.dropped == {"answer_tag": 1, "control_token": 1, "ambiguous_tags": 1, "no_trace": 1}
    assert report.kept + sum(report.dropped.values()) == report.samples
    plain = pairs.PairReport()
    assert all("trace" not in row for row in pairs.build_pairs(requests, generations, report=plain))
    assert plain.kept == 5 and plain.dropped == {"ambiguous_tags": 1} and plain.unwrapped == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (rationale("2+3", "5", None), "pair 1: it has no trace"),
        (rationale("2+3", "5", " "), "pair 1: it has no trace"),
        (rationale("2+3", "5", 7), "pair 1: `trace` is not text"),
        (rationale("2+3", "5", "2+3=5</think>"), "pair 1: the trace contains a trace tag"),
        (rationale("2+3", "5", "<answer>5</answer>"), "pair 1: the trace contains an answer tag"),
        (rationale("2+3", "<answer>5", "2+3=5"), "pair 1: the answer contains an answer tag"),
        (rationale("2+3", "5</think>", "2+3=5"), "pair 1: a trace tag is left in the answer"),
        (rationale("2+3", "5", "2+3=5<|im_end|>"), r"pair 1: the trace holds '<\|im_end\|>'"),
        ({"messages": rationale("2+3", "5", "")["messages"]}, "rows have no `trace`, which post_thinking writes"),
        ({"text": "2+3"}, r"neither `messages` \(rationales.jsonl\)"),
    ],
)
def test_a_row_that_cannot_be_read_back_is_refused(
    tokenizer: Any, write_jsonl: Write, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(ThinkSwitchError, match=message):
        tokenized(tokenizer, write_jsonl("rationales.jsonl", [row]), post_thinking)


def test_broken_and_empty_generations_are_one_sentence(tokenizer: Any, write_jsonl: Write) -> None:
    write_jsonl("requests.jsonl", [request("p0")])
    generations = write_jsonl("generations.jsonl", [answer("p0-s0", "never ends", finish="length")])
    with pytest.raises(ThinkSwitchError, match="holds no complete answer: 0 of 1 samples kept; dropped: 1 unclosed"):
        tokenized(tokenizer, generations, pre_thinking)
    write_jsonl("requests.jsonl", [request("p0"), request("p0")])
    with pytest.raises(ThinkSwitchError, match=r"requests\.jsonl, line 2: the `custom_id`"):
        tokenized(tokenizer, generations, pre_thinking)


# What Qwen3's first template does: an assistant's text without a trace is given an empty one.
EMPTY_TRACE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.role == 'assistant' and '</think>' not in message.content %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{{- message.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# What DeepSeek-R1's does: the trace of an earlier turn is cut off.
NO_TRACE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content.split('</think>')[-1] + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


@pytest.mark.parametrize(
    ("template", "form", "message"),
    [
        (None, PRE, "opens the trace by itself, so pre_thinking could not say first"),
        (None, POST, "opens the trace by itself, so post_thinking could not say first"),
        (EMPTY_TRACE, POST, "or the tokenizer of .* does not leave a completion of post_thinking as it is written"),
        (NO_TRACE, PRE, "or the tokenizer of .* does not leave a completion of pre_thinking as it is written"),
    ],
)
def test_a_chat_template_that_spoils_the_format_is_refused(
    student: Path, write_jsonl: Write, template: str | None, form: Format, message: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(student)
    tokenizer.chat_template = template or build_tokenizer("thinking").chat_template
    path = write_jsonl("rationales.jsonl", [rationale("2+3", "5", "2+3=5")])
    with pytest.raises(ThinkSwitchError, match=message):
        tokenized(tokenizer, path, TYPES[form])
    if template == NO_TRACE:
        assert tokenized(tokenizer, path, answer_only)  # which writes no trace
        return
    with pytest.raises(ThinkSwitchError, match="the answer would be trained behind"):
        tokenized(tokenizer, path, answer_only)


def test_a_tokenizer_that_does_not_know_the_tags_is_refused(write_jsonl: Write) -> None:
    path = write_jsonl("rationales.jsonl", [rationale("2+3", "5", "2+3=5")])
    with pytest.raises(ThinkSwitchError, match=r"or the tokenizer of .* does not leave a completion of post_thinking"):
        tokenized(build_tokenizer("instruct"), path, post_thinking)


def test_memory_is_flat_with_traces_too(tmp_path: Path) -> None:
    found = bench_pairs.measure(3000, 20_000, tmp_path, rounds=1, keep_trace=True)
    assert found["counts add up"] and found["pairs"] == 2940
    assert found["peak MB"] < 150 and found["megabytes"] > 55


@pytest.mark.slow
@pytest.mark.parametrize(
    ("types", "expected"),
    [(["answer_only"], {None: 32}), (["pre_thinking", "post_thinking"], {PRE: 32, POST: 32})],
)
def test_plain_axolotl_trains_with_each_dataset_type(
    types: list[str], expected: dict[Format | None, int], student: Path, forked: Any, write_jsonl: Write, tmp_path: Path
) -> None:
    """`axolotl train recipe.yaml` with only the plugin line: the adapter moves, on exactly the tokens of the turns."""
    rows = [rationale(f"{a}+{b}", str((a + b) % 10), f"{a}+{b}={(a + b) % 10}") for a in range(8) for b in range(4)]
    path = write_jsonl("rationales.jsonl", rows)
    recipe = {
        "base_model": str(student),
        "plugins": ["thinkswitch_plugin.ThinkSwitchPlugin"],
        "datasets": [{"path": str(path), "ds_type": "json", "type": f"thinkswitch_plugin.{name}"} for name in types],
        "output_dir": str(tmp_path / "adapter"),
        "dataset_prepared_path": str(tmp_path / "prepared"),
        "adapter": "qlora",
        "load_in_4bit": True,
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_target_linear": True,
        "sequence_len": 128,
        "micro_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "max_steps": 3,
        "optimizer": "adamw_torch",
        "learning_rate": 0.01,
        "val_set_size": 0,
        "save_strategy": "no",
        "save_first_step": False,
        "dataset_num_proc": 1,
        **dict.fromkeys(("bf16", "fp16", "tf32", "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), False),
    }
    files.write_yaml(tmp_path / "recipe.yaml", recipe)
    done = forked(BIN / "axolotl", "train", tmp_path / "recipe.yaml", "--launcher", "python")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    (prepared,) = {p.parent for p in (tmp_path / "prepared").rglob("*.arrow")}
    from datasets import load_from_disk

    tokenizer = AutoTokenizer.from_pretrained(student)
    turns = [tokenizer.decode([t for t in labels if t != -100]) for labels in load_from_disk(str(prepared))["labels"]]
    forms = [parse(turn.removesuffix("<|im_end|>")).form for turn in turns]
    assert Counter(forms) == expected and all(turn.endswith("<|im_end|>") for turn in turns)
