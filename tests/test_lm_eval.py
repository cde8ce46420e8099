"""Real lm-eval on a real tiny checkpoint that writes one fixed text: what becomes of tags, golds and metrics."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT
from thinkswitch_plugin import evaluation, files, score
from thinkswitch_plugin.args import EngineKeys, EvaluationKeys
from thinkswitch_plugin.in_process import Sampling, evaluate, quiet
from thinkswitch_plugin.trace_tokens import keep_tags, special_tags

ENDS = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": "[UNK]"}
TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
SPOKEN = ("<think>", "so", "</think>", "5")


def fixed(folder: Path, spoken: Sequence[str] = SPOKEN, special: Sequence[str] = ()) -> Path:
    """A Llama checkpoint that answers every prompt with the same words: attention and MLP add nothing, and the
    output row of each word is the embedding of the word before it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: place for place, word in enumerate(["[UNK]", "assistant", *map(str, range(10)), "so"])}
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
            model.lm_head.weight[after] += table[before]
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
        evaluation.run_lm_eval(
            str(checkpoint), out, keys, "embedded", engine, logs=tmp_path, title="eval", answer="digit"
        )
    else:
        evaluate(HFLM(pretrained=str(checkpoint), device="cpu", batch_size=2), keys, Sampling(), out, name="model")
    rows = [row for _, row in files.read_jsonl(evaluation.samples_file(out, keys.task))]
    assert [row["resps"] for row in rows] == [[["<think> so </think> 5"]]] * 2
    assert [row["think_ratio"] for row in rows] == [1.0, 1.0]
    figures = evaluation.summarize(list(evaluation.read_samples(out, keys.task, str(checkpoint), "digit")))
    assert (figures["think_ratio"], figures["answered"], figures["tokens"]) == (1.0, 1.0, 5.0)


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
    assert found == {"think_ratio": 1.0, "answered": 1.0}
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
