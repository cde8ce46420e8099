"""Real lm-eval on a real tiny checkpoint that writes one fixed text: what becomes of tags, golds and metrics."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import Any

import orjson
import pytest
import torch

from tests.conftest import ROOT
from thinkswitch_plugin import files
from thinkswitch_plugin.args import EngineKeys, EvaluationKeys
from thinkswitch_plugin.judging import evaluation, figures, samples, score
from thinkswitch_plugin.judging.in_process import Sampling, evaluate, quiet
from thinkswitch_plugin.judging.trace_tokens import keep_tags, special_tags

ENDS = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": "[UNK]"}
TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
SPOKEN = ("<think>", "so", "</think>", "5")


def fixed(folder: Path, spoken: Sequence[str] = SPOKEN, special: Sequence[str] = ()) -> Path:
    """A Llama checkpoint that answers every prompt with the same words: attention and MLP add nothing, and the
    output row of each word is the embedding of the word before it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: place for place, word in enumerate(["[UNK]", "assistant", *map(str, range(10)), "so", "yes"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **ENDS, extra_special_tokens=list(special))
    tokenizer.add_tokens([word for word in spoken if word not in vocabulary and word not in special])
    tokenizer.chat_template = TEMPLATE
    size = len(tokenizer)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
                weight.zero_()
        table = model.model.embed_tokens.weight
        table.copy_(torch.eye(size, 32))
        ids = tokenizer.convert_tokens_to_ids(["assistant", *spoken, "<|im_end|>"])
        for before, after in pairwise(ids):
            model.lm_head.weight[after] += 100 * table[before]  # certain, at any temperature
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def simple_evaluate(checkpoint: Path, task: str, out: Path, **model_args: str) -> dict[str, Any]:
    """`lm_eval` on two questions of a task; its metrics, and its files in `out`."""
    import lm_eval
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    arguments = {"pretrained": str(checkpoint), **model_args}
    tracker = EvaluationTracker(output_path=str(out))
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args=arguments,
        tasks=[task],
        limit=2,
        gen_kwargs={"max_gen_toks": 40},
        device="cpu",
        apply_chat_template=True,
        log_samples=True,
        evaluation_tracker=tracker,
        task_manager=TaskManager(include_path=str(ROOT / "lm_eval_tasks"), include_defaults=False, metadata=arguments),
    )
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    tracker.save_results_samples(task_name=task, samples=samples[task])
    return {name.partition(",")[0]: value for name, value in results["results"][task].items()}


def lm_eval_here(command: Sequence[str | Path], log: Path, title: str) -> None:
    """lm-eval's command line in this process, which has imported it already."""
    from lm_eval.__main__ import cli_evaluate

    with pytest.MonkeyPatch.context() as patch, quiet(log):
        patch.setattr("sys.argv", [str(word) for word in command])
        for logger in (logging.root, logging.getLogger("lm_eval")):  # its handlers would write to a closed log
            patch.setattr(logger, "handlers", list(logger.handlers))
        cli_evaluate()


@pytest.mark.parametrize("way", ["command line", "in process"])
def test_tags_that_are_special_tokens_stay_in_what_lm_eval_grades(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.models.huggingface import HFLM

    checkpoint, out = fixed(tmp_path / "model", special=("<think>", "</think>")), tmp_path / "out"
    keys = EvaluationKeys(task="thinkswitch_arithmetic", limit=2, batch_size="2", backend="hf")  # type: ignore[call-arg]
    if way == "command line":
        monkeypatch.setattr(evaluation, "run_logged", lm_eval_here)
        engine = EngineKeys()  # type: ignore[call-arg]
        evaluation.run_lm_eval(str(checkpoint), out, keys, "embedded", engine, logs=tmp_path, title="eval")
    else:
        evaluate(HFLM(pretrained=str(checkpoint), device="cpu", batch_size=2), keys, Sampling(), out, name="model")
    rows = [row for _, row in files.read_jsonl(samples.samples_file(out, keys.task))]
    assert [row["resps"] for row in rows] == [[["<think> so </think> 5"]]] * 2
    assert [row["think_ratio"] for row in rows] == [[1, 1], [1, 1]]
    found = figures.summarize(list(samples.read_samples(out, keys.task, str(checkpoint), "digit")))
    assert (found["think_ratio"], found["answered"], found["tokens"]) == (1.0, 1.0, 5.0)


def test_a_tokenizer_that_keeps_its_tags_encodes_as_before(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    before = AutoTokenizer.from_pretrained(fixed(tmp_path / "model", special=("<think>", "</think>")))
    folder = keep_tags(before, tmp_path / "kept")
    after = AutoTokenizer.from_pretrained(folder)
    text = "<think>so</think>5<|im_end|>"
    ids = before(text)["input_ids"]
    assert after(text)["input_ids"] == ids and after.chat_template == before.chat_template
    assert before.decode(ids, skip_special_tokens=True) == "so 5"
    assert after.decode(ids, skip_special_tokens=True) == "<think> so </think> 5"
    assert special_tags(after) == []
    assert keep_tags(after, tmp_path / "again") is None and not (tmp_path / "again").exists()


def test_no_think_ratio_is_reported_where_lm_eval_removed_the_traces(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = fixed(tmp_path / "model")
    logging.getLogger("lm_eval").propagate = True
    with caplog.at_level(logging.WARNING, logger="lm_eval"):
        found = simple_evaluate(checkpoint, "thinkswitch_arithmetic", tmp_path / "out", think_end_token="</think>")
    assert "think_ratio" not in found and found["answered"] == 1.0
    assert "`think_end_token` in the model arguments removes the traces" in caplog.text
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    assert [v["has_trace"] for group in score.verdicts("digit", samples, opened=False) for v in group] == [None, None]
    assert simple_evaluate(checkpoint, "thinkswitch_arithmetic", tmp_path / "with")["think_ratio"] == 1.0
    (samples,) = (tmp_path / "with").rglob("samples_*.jsonl")
    assert [v["has_trace"] for group in score.verdicts("digit", samples, opened=False) for v in group] == [True, True]


def test_the_tasks_that_publishers_are_compared_with_run_in_lm_eval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_jsonl: Callable[..., Path]
) -> None:
    monkeypatch.setenv("THINKSWITCH_DATA", str(tmp_path))
    write_jsonl("aime_2026.jsonl", [{"problem": "2+3", "answer": "5"}, {"problem": "2+2", "answer": "4"}])
    abstract = {"context": {"contexts": ["It helps."]}, "question": "Does it?"}
    write_jsonl("pubmedqa.jsonl", [{**abstract, "pubid": n, "final_decision": d} for n, d in ((1, "yes"), (2, "no"))])
    found = simple_evaluate(fixed(tmp_path / "five"), "thinkswitch_aime_matharena", tmp_path / "aime")
    assert (found["mean@k"], found["vote@k"], found["think_ratio"]) == (0.5, 0.5, 1.0)
    (samples,) = (tmp_path / "aime").rglob("samples_*.jsonl")
    _, row = next(files.read_jsonl(samples))
    assert len(row["resps"][0]) == 4
    assert row["arguments"]["gen_args_0"]["arg_0"].startswith(
        "Put your final answer within \\boxed{}.\nThe answer is an integer between 0 and 999 inclusive.\n\n2+3"
    )
    yes = fixed(tmp_path / "yes", ("<think>", "so", "</think>", "yes"))
    found = simple_evaluate(yes, "thinkswitch_pubmedqa_full", tmp_path / "pubmedqa")
    assert found["mean@k"] == 0.5 and found["macro_f1"] == pytest.approx((2 / 3 + 0) / 2)


def test_a_server_is_asked_to_keep_special_tokens(tmp_path: Path) -> None:
    from lm_eval.models.openai_completions import LocalChatCompletion

    bodies: list[dict[str, Any]] = []

    class Server(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(orjson.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            message = {"role": "assistant", "content": "<think>so</think>5"}
            reply = orjson.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_: Any) -> None:
            pass

    keys = EvaluationKeys(task="thinkswitch_arithmetic", limit=1)  # type: ignore[call-arg]
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v1/chat/completions"
        model = LocalChatCompletion(base_url=url, model="m", tokenizer_backend="none")
        evaluate(model, keys, Sampling(), tmp_path / "out", name="m")
        server.shutdown()
    assert [body["skip_special_tokens"] for body in bodies] == [False]


def task(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "lm_eval_tasks"))
    import thinkswitch_tasks

    return getattr(thinkswitch_tasks, name)


def test_a_question_whose_gold_answer_cannot_be_read_counts_in_no_score_and_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    grade = task("grade_integer", monkeypatch)
    logging.getLogger("lm_eval").propagate = True
    found = grade({"problem": "What is it worth?", "answer": r"\frac{8}{21}"}, [r"<think>a</think>\boxed{8}"])
    assert found == {"think_ratio": [1, 1], "answered": 1.0}
    assert "'What is it worth?' is not graded" in caplog.text and r"'\\frac{8}{21}'" in caplog.text
    assert grade({"problem": "What is it?", "answer": "008"}, [r"\boxed{8}"])["mean@k"] == 1.0


def test_macro_f1_is_the_mean_over_decisions_and_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    macro_f1 = task("macro_f1", monkeypatch)
    # yes: 2 of 2 found, 1 wrong (P 2/3, R 1); no: none of 1 found (F1 0); maybe: 1 of 1, not read elsewhere (F1 1)
    run = [["yes", "yes"], ["yes", "yes"], ["no", "yes"], ["maybe", "maybe"]]
    assert macro_f1(run) == pytest.approx((0.8 + 0 + 1) / 3)
    assert macro_f1([["yes", "yes", "no"], ["no", "no", "yes"]]) == pytest.approx((1 + 0) / 2)
    assert macro_f1([["yes", None], ["no", "no"]]) == pytest.approx((0 + 1) / 2)


def test_pubmedqa_reports_macro_f1_of_what_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    grade: Callable[..., dict[str, Any]] = task("grade_decision", monkeypatch)
    found = grade({"question": "q", "final_decision": "no"}, [["t</think>no", "<think>yes", "Final answer: yes"]])
    assert found["macro_f1"] == ["no", "no", None, "yes"] and found["mean@k"] == pytest.approx(1 / 3)
