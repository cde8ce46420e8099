"""Real lm-eval on a real tiny checkpoint that writes one fixed text: how tags, gold answers and metrics are handled."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import Any

import orjson
import pytest
import torch
from transformers import AutoTokenizer

from tests.conftest import ROOT
from thinkswitch_plugin import files
from thinkswitch_plugin.args import EngineKeys, ThinkSwitchKeys
from thinkswitch_plugin.data.batch import Asked
from thinkswitch_plugin.demo import task as demo
from thinkswitch_plugin.engines.embedded import EmbeddedEngine
from thinkswitch_plugin.engines.live import LiveVllm
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.judging import figures, samples, score
from thinkswitch_plugin.judging.evaluation import batch_size, evaluate, evaluate_checkpoint
from thinkswitch_plugin.judging.model import ThinkSwitchLM
from thinkswitch_plugin.judging.verdict import how_read
from thinkswitch_plugin.recipe import load_recipe
from thinkswitch_plugin.run.checkpoint import Subject
from thinkswitch_plugin.search import candidates
from thinkswitch_plugin.search.pair import Pair

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


def keys_for(limit: int = 2, **evaluation: Any) -> ThinkSwitchKeys:
    """The demo domain's recipe, with few questions answered in process."""
    keys = load_recipe(ROOT / "recipes" / "arithmetic.yaml").keys
    changed = {"limit": limit, "batch_size": "2", "backend": "hf", **evaluation}
    return keys.model_copy(update={"evaluation": keys.evaluation.model_copy(update=changed)})


def in_memory(checkpoint: Path, folder: Path, engine: Any = None, name: str = "model") -> ThinkSwitchLM:
    """Our model class around a checkpoint that is loaded, or around another engine."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    engine = engine or EmbeddedEngine(checkpoint, batch=2)
    keys = EngineKeys.model_validate({"attempts": 1})
    return ThinkSwitchLM(folder, name, engine, keys, tokenizer, how_read(tokenizer, None), folder.parent / "log")


@pytest.mark.parametrize("way", ["a checkpoint", "a model in memory"])
def test_tags_that_are_special_tokens_stay_in_what_lm_eval_grades(way: str, tmp_path: Path) -> None:
    checkpoint, out = fixed(tmp_path / "model", special=("<think>", "</think>")), tmp_path / "out"
    keys = keys_for()
    if way == "a checkpoint":
        evaluate_checkpoint(Subject(str(checkpoint)), out, keys, "embedded", log=tmp_path / "log")
    else:
        evaluate(in_memory(checkpoint, out), keys.evaluation, name="model")
    rows = [row for _, row in files.read_jsonl(samples.samples_file(out, keys.evaluation.task))]
    assert [row["resps"] for row in rows] == [[["<think> so </think> 5"]]] * 2
    assert [row["think_ratio"] for row in rows] == [[1, 1], [1, 1]]
    for stored in (True, False):  # by the stored answers, and by the text alone
        found = figures.summarize(list(samples.graded(out, keys.evaluation.task, str(checkpoint), "digit")[1]))
        assert (found["think_ratio"], found["answered"], found["tokens"]) == (1.0, 1.0, 5.0)
        if stored:
            (out / samples.REQUESTS).unlink()


def test_what_the_token_limit_cut_is_cut_in_lm_evals_metrics_and_in_the_figures(tmp_path: Path) -> None:
    checkpoint, out = fixed(tmp_path / "model", ("<think>", "so", "so", "</think>", "5")), tmp_path / "out"
    keys = keys_for(max_tokens=3)
    evaluate_checkpoint(Subject(str(checkpoint)), out, keys, "embedded", log=tmp_path / "log")
    results = files.read_json(samples.newest(out, "results_*.json"))["results"]["thinkswitch_arithmetic"]
    found = figures.summarize(list(samples.graded(out, keys.evaluation.task, str(checkpoint), "digit")[1]))
    assert (found["truncated"], found["tokens"], found["think_ratio"]) == (1.0, 3.0, 0.0)
    assert results["think_ratio,none"] == 0.0
    (row, *_) = [row for _, row in files.read_jsonl(samples.samples_file(out, keys.evaluation.task))]
    assert row["think_ratio"] == [0, 0], "no completion is whole"


def test_a_killed_evaluation_continues_with_the_questions_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, out = fixed(tmp_path / "model"), tmp_path / "eval" / "thinking"
    asked: list[list[str]] = []
    ask, limit = EmbeddedEngine.ask, [3]

    def counted(engine: EmbeddedEngine, requests: Any, arrived: Any) -> None:
        asked.append([])

        def stored(request: Any, reply: Any) -> Any:
            asked[-1].append(request["custom_id"])
            arrived(request, reply)
            if len(asked[-1]) == limit[0]:
                raise KeyboardInterrupt

        ask(engine, requests, stored)

    monkeypatch.setattr(EmbeddedEngine, "ask", counted)
    arguments: dict[str, Any] = {"keys": keys_for(5, batch_size="1"), "engine": "embedded", "log": tmp_path / "log"}
    with pytest.raises(KeyboardInterrupt):
        evaluate_checkpoint(Subject(str(checkpoint)), out, **arguments, resume=True)
    assert not out.exists()
    limit[0] = 0
    evaluate_checkpoint(Subject(str(checkpoint)), out, **arguments, resume=True)
    names = [samples.question_id(n, 0) for n in range(5)]
    assert asked == [names[:3], names[3:]]
    assert [name for name in sorted(p.name for p in out.iterdir()) if name.endswith("jsonl")] == [
        samples.GENERATIONS,
        samples.REQUESTS,
    ]
    evaluate_checkpoint(Subject(str(checkpoint)), out, **arguments)
    assert asked[2] == names, "another attempt asks every question again"


def test_answers_to_other_questions_are_not_kept(tmp_path: Path) -> None:
    lm = in_memory(fixed(tmp_path / "model"), tmp_path / "out")
    keys = keys_for(3).evaluation
    evaluate(lm, keys, name="model")
    evaluate(lm, keys.model_copy(update={"max_tokens": 1}), name="model")
    bodies = [row["response"]["body"] for _, row in files.read_jsonl(tmp_path / "out" / samples.GENERATIONS)]
    assert [body["usage"]["completion_tokens"] for body in bodies] == [1, 1, 1]


def test_a_checkpoint_name_cannot_carry_options_of_lm_eval(tmp_path: Path) -> None:
    checkpoint = fixed(tmp_path / "model,trust_remote_code=True")
    evaluate_checkpoint(Subject(str(checkpoint)), tmp_path / "out", keys_for(1), "embedded", log=tmp_path / "log")
    results = files.read_json(samples.newest(tmp_path / "out", "results_*.json"))
    assert results["config"]["model_args"] == {"pretrained": str(checkpoint)}


def test_settings_reach_the_engine_as_lm_eval_means_them(tmp_path: Path) -> None:
    lm = in_memory(fixed(tmp_path / "model"), tmp_path / "out")
    prompt = lm.apply_chat_template([{"role": "user", "content": "1+1"}])
    assert prompt == "1+1 assistant"
    greedy = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "until": "x", "max_gen_toks": 9, "seed": None}
    body = lm._body(prompt, greedy, 1)
    assert (body["temperature"], body["stop"], body["max_tokens"]) == (0.0, ["x"], 9)
    assert not {"top_p", "seed"} & body.keys() and body["messages"] == [{"role": "user", "content": "1+1"}]
    bodies = [lm._body(prompt, {"temperature": 0.6, "top_p": 0.9, "until": []}, j) for j in (0, 1)]
    assert [(b["temperature"], b["top_p"], b["max_tokens"], b["seed"]) for b in bodies] == [
        (0.6, 0.9, 256, 0),
        (0.6, 0.9, 256, 1),
    ]
    assert lm._body(prompt, {"do_sample": True}, 0)["temperature"] == 1.0
    forced = lm.apply_chat_template([{"role": "user", "content": "1"}, {"role": "assistant", "content": "5"}], False)
    assert forced == "1 5" and lm._body(forced, {}, 0)["continue_final_message"] is True
    with pytest.raises(
        ThinkSwitchError, match="generates with `repetition_penalty`, which is not supported in process"
    ):
        lm._body(prompt, {"repetition_penalty": 1.1}, 0)
    with pytest.raises(ThinkSwitchError, match="compares likelihoods"):
        lm.loglikelihood([])


@pytest.mark.parametrize("text", ["0", "many", "-1"])
def test_a_batch_size_that_is_none_is_one_sentence(text: str) -> None:
    keys = keys_for(batch_size=text)
    with pytest.raises(ThinkSwitchError, match=rf"`thinkswitch.evaluation.batch_size` is '{text}'; use a whole number"):
        batch_size(keys.evaluation, keys.engine)
    assert batch_size(keys_for(batch_size="auto").evaluation, keys.engine) == keys.engine.concurrency


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
    assert [v["has_trace"] for group in score.verdicts("digit", samples, Asked()) for v in group] == [None, None]
    assert simple_evaluate(checkpoint, "thinkswitch_arithmetic", tmp_path / "with")["think_ratio"] == 1.0
    (samples,) = (tmp_path / "with").rglob("samples_*.jsonl")
    assert [v["has_trace"] for group in score.verdicts("digit", samples, Asked()) for v in group] == [True, True]


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


@contextmanager
def served(bodies: list[dict[str, Any]], refused: str = "") -> Iterator[str]:
    """A server that says it is vLLM and answers 5, but refuses a question."""

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(200, {"data": [{"id": "m", "object": "model", "owned_by": "vllm"}]})

        def do_POST(self) -> None:
            body = orjson.loads(self.rfile.read(int(self.headers["Content-Length"])))
            bodies.append(body)
            if body["messages"][-1]["content"] == refused:
                self.reply(400, {"error": {"message": "the prompt is too long"}})
                return
            message = {"role": "assistant", "content": "<think>so</think>5"}
            usage = {"prompt_tokens": 1, "completion_tokens": 7, "total_tokens": 8}
            self.reply(200, {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage})

        def reply(self, status: int, value: Any) -> None:
            text = orjson.dumps(value)
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def test_a_server_is_asked_to_keep_special_tokens_and_its_tokens_count(tmp_path: Path) -> None:
    bodies: list[dict[str, Any]] = []
    checkpoint, keys = fixed(tmp_path / "model"), keys_for(1).evaluation
    with served(bodies) as url:
        evaluate(in_memory(checkpoint, tmp_path / "out", url, "m"), keys, name="m")
    assert [body["skip_special_tokens"] for body in bodies] == [False]
    (found,) = samples.graded(tmp_path / "out", keys.task, str(checkpoint), "digit")[1]
    assert (found.tokens, found.found) == ([7], ["5"])


def test_a_question_that_the_server_refuses_is_named_and_the_other_answers_are_kept(tmp_path: Path) -> None:
    first = demo.held_out(1)[0]
    keys, bodies = keys_for(3).evaluation, []  # type: ignore[var-annotated]
    lm = in_memory(fixed(tmp_path / "model"), tmp_path / "out", name="m")
    with served(bodies, first) as lm.engine, pytest.raises(ThinkSwitchError) as refused:
        evaluate(lm, keys, name="m")
    assert str(refused.value).startswith("1 of 3 answers of m are missing, q00000-s0 among them: ")
    assert "the prompt is too long" in str(refused.value)
    bodies.clear()
    with served(bodies) as lm.engine:
        evaluate(lm, keys, name="m")
    assert [body["messages"][-1]["content"] for body in bodies] == [first]


def test_a_server_has_room_for_the_tasks_budget_whoever_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, rooms = fixed(tmp_path / "model"), []
    config = files.read_json(checkpoint / "config.json")
    files.write_json(checkpoint / "config.json", {**config, "max_position_embeddings": 40_960})

    def serving(*_: Any, max_len: int | None, **__: Any) -> Any:
        rooms.append(max_len)
        raise ThinkSwitchError("no server in this test")

    for module in ("ask", "live"):
        monkeypatch.setattr(f"thinkswitch_plugin.engines.{module}.serving", serving)
    keys = keys_for(1, backend="server")
    candidate = candidates.Candidate("points/x", {}, {})
    pair = Pair(keys, {}, 0, "vllm", tmp_path, tmp_path, None, of_run=False)
    bench = candidates.Bench(pair, tmp_path, "instruct", checkpoint, {}, {})
    engine = LiveVllm(checkpoint, keys.engine, tmp_path / "log")
    for ask in (
        lambda: evaluate_checkpoint(Subject(str(checkpoint)), tmp_path / "out", keys, "vllm", log=tmp_path / "log"),
        lambda: candidates.answer(bench, candidate, tmp_path / "there", engine),
    ):
        with pytest.raises(ThinkSwitchError, match="no server in this test"):
            ask()
    assert rooms == [64 + 2048] * 2


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
