"""Judge a checkpoint with lm-eval, and read its results and samples files.

Names as in arXiv 2510.10977: Mean@k, Pass@k, Vote@k over k samples a question, tokens
a completion, think ratio. lm-eval's tasks see text only, so tokens and cut answers are
counted afterwards from the samples file with the checkpoint's own tokenizer. That is done once,
when the checkpoint is judged, and kept beside lm-eval's files: `graded.jsonl`, the key first

    {"key": {"answer": "digit", "rules": "5c1e…", "samples": "samples_….jsonl", "bytes": 285890}, "opened": true}
    {"doc_id": 0, "correct": [true], "found": ["6"], "closed_trace": [true], "tokens": [19], "truncated": [false]}
"""

from __future__ import annotations

import glob
import hashlib
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from thinkswitch_plugin import conventions, files, places
from thinkswitch_plugin.args import EngineKeys, EvaluationKeys
from thinkswitch_plugin.data import answers, batch, decisions, integers, marks, messages, statements, traces
from thinkswitch_plugin.data.task_files import budget as task_budget
from thinkswitch_plugin.data.task_files import kind_of_task
from thinkswitch_plugin.engines.generate import PROMPT_ROOM, context_length
from thinkswitch_plugin.engines.servers import lora_arguments, serving
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.judging.trace_tokens import SERVED, keep_tags_of
from thinkswitch_plugin.run.hardware import has_cuda
from thinkswitch_plugin.run.processes import run_logged

LM_EVAL_BUDGET = 256  # tokens, where a task names none
LARGEST_BUDGET = 32_768  # tokens a server makes room for, where neither recipe nor task names any
CUT_FROM = 0.99  # of the budget: text seldom encodes to exactly the ids it was decoded from
GRADED = "graded.jsonl"
DATE = "[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]T*"  # with which lm-eval ends the names of its files
DRAWS = 10_000  # of a bootstrap over questions
DRAWN_AT_ONCE = 4_000_000  # questions; a bootstrap draws the same in parts as in one piece, in less memory
BATCH = 200_000  # characters that are tokenized at once; more than one batch is never in memory


def grade(
    kind: str,
    text: str,
    gold: str,
    *,
    opened: bool = False,
    cut: bool = False,
    convention: conventions.Convention | None = None,
) -> dict[str, Any]:
    """One completion against its gold answer.

    Args:
        kind: how the final answer is read, a key of `answers.EXTRACTORS`.
        opened, cut, convention: as for `traces.split`. A task cannot know them; they are
            known when the samples file is read again.

    Returns:
        ``accuracy`` (None if the kind cannot read the gold answer), ``think_ratio`` (a closed trace), ``answered``
        as booleans, ``answer``.
    """
    done = traces.split(text, opened=opened, cut=cut, convention=convention)
    found = final_answer(kind, done)
    right = answers.gold(kind, gold)
    return {
        "accuracy": None if right is None else found == right,
        "think_ratio": done.closed_trace,
        "answered": found is not None,
        "answer": found,
    }


def grade_repeats(kind: str, results: Sequence[Any], gold: str) -> dict[str, float]:
    """What a task reports of one question, from its k completions.

    A question whose gold answer the kind cannot read has no scores: lm-eval takes each mean over the questions that
    have the metric.
    """
    graded = [grade(kind, text, gold) for text in completions(results)]
    k = len(graded)
    found = [g["answer"] for g in graded]
    reported = {
        "think_ratio": sum(g["think_ratio"] for g in graded) / k,
        "answered": sum(f is not None for f in found) / k,
    }
    if graded[0]["accuracy"] is None:
        return reported
    right = sum(g["accuracy"] for g in graded)
    winner = answers.majority(found)
    return {
        "mean@k": right / k,
        "pass@k": pass_at_k(k, right, k),
        "vote@k": float(winner is not None and graded[found.index(winner)]["accuracy"]),
        **reported,
    }


def completions(results: Sequence[Any]) -> list[str]:
    """The k completions that lm-eval hands to a task: one text, or one list of k texts if a filter kept them all."""
    return [str(text) for text in (results[0] if results and isinstance(results[0], list) else results)]


def final_answer(kind: str, done: traces.Completion, letters: Mapping[str, str] | None = None) -> str | None:
    """The final answer of a split completion; of an unfinished one, what it had stated as final."""
    read = answers.extract_unfinished if done.cut else answers.extract
    return read(kind, done.answer, letters)


@dataclass(frozen=True, slots=True)
class Sample:
    """One question with its k graded completions."""

    doc_id: int
    correct: list[bool]
    found: list[str | None]
    closed_trace: list[bool]
    tokens: list[int]
    truncated: list[bool]


def newest(folder: Path, pattern: str) -> Path:
    """The newest of lm-eval's files that match. Raises `ThinkSwitchError` if there is none."""
    matches = sorted(folder.rglob(pattern), key=lambda p: p.name)
    if not matches:
        raise ThinkSwitchError(
            f"{folder} holds no {pattern}; delete that folder and run `make iterate`, or the evaluation, again."
        )
    return matches[-1]


def samples_file(folder: Path, task: str) -> Path:
    """lm-eval's newest samples of a task, and of no other whose name only begins alike (`TASK_k8`).

    Raises `ThinkSwitchError` if there is none.
    """
    return newest(folder, f"samples_{glob.escape(task)}_{DATE}.jsonl")


def read_samples(
    folder: Path, task: str, checkpoint: str, kind: str, convention: conventions.Convention | None = None
) -> Iterator[Sample]:
    """The graded samples of one evaluation: as `graded.jsonl` holds them, else graded again.

    Args:
        folder: what lm-eval wrote, of one checkpoint.
        checkpoint: its folder or hub id; only its tokenizer is read, and only to grade again.
        kind: how the final answer is read, a key of `answers.EXTRACTORS`; a task of ours that grades by a kind
            is graded by that.
        convention: how traces are written, where `graded.jsonl` does not hold it; None goes by the chat template.
    """
    _, samples = graded(folder, task, checkpoint, kind, convention)
    return samples


def graded(
    folder: Path, task: str, checkpoint: str, kind: str, convention: conventions.Convention | None = None
) -> tuple[bool, Iterator[Sample]]:
    """Whether the chat template had opened the trace, and the graded samples, as `read_samples`.

    Raises `ThinkSwitchError` if there is no samples file, or one of another shape.
    """
    path = samples_file(folder, task)
    stored = path.with_name(GRADED)
    kind = kind_of_task(task) or kind
    if stored.is_file():
        _, head = next(files.read_jsonl(stored), (0, {}))
        if head.get("key") == grading_key(path, kind):
            return bool(head["opened"]), _read_graded(stored)
        convention = conventions.from_key(head.get("trace", {}).get("convention", "auto")) or convention
    return _grade_file(path, checkpoint, kind, convention)


def store_graded(
    folder: Path, task: str, checkpoint: str, kind: str, convention: conventions.Convention | None = None
) -> None:
    """Grade the newest samples file of an evaluation once and for all: writes `graded.jsonl` beside it.

    Args:
        convention: how traces are written, as the recipe says; None goes by the chat template. It is kept in the file.
    """
    path = samples_file(folder, task)
    kind = kind_of_task(task) or kind
    opened, samples = _grade_file(path, checkpoint, kind, convention)
    with files.atomic_file(path.with_name(GRADED)) as handle:
        head = {"key": grading_key(path, kind), "opened": opened, "trace": conventions.as_metadata(convention)}
        handle.write(files.dumps_line(head))
        for sample in samples:
            handle.write(files.dumps_line(asdict(sample)))


def grading_key(path: Path, kind: str) -> dict[str, Any]:
    """What stored verdicts depend on: the samples file, how answers are read, and the rules of this version."""
    return {"answer": kind, "rules": grading_rules(), "samples": path.name, "bytes": path.stat().st_size}


@cache
def grading_rules() -> str:
    """A hash of everything that turns a text into a verdict, so that no verdict of older rules is taken for new."""
    from importlib.metadata import version

    digest = hashlib.sha256(version("math-verify").encode())
    for module in (answers, batch, conventions, decisions, integers, marks, messages, statements, traces):
        digest.update(Path(str(module.__file__)).read_bytes())
    digest.update(Path(__file__).read_bytes())
    return digest.hexdigest()[:16]


def _read_graded(path: Path) -> Iterator[Sample]:
    for number, row in files.read_jsonl(path):
        if number > 1:
            found = [text if text is None else sys.intern(text) for text in row.pop("found")]
            yield Sample(found=found, **row)


def _grade_file(
    path: Path, checkpoint: str, kind: str, convention: conventions.Convention | None = None
) -> tuple[bool, Iterator[Sample]]:
    """Grade lm-eval's samples file again, now with tokens and the template known."""
    from transformers import AutoTokenizer

    # Two cores tokenize one batch; nothing is forked afterwards, which is what the library warns of.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    how = batch.asked_of(tokenizer, None if convention is conventions.NONE else convention)

    def samples() -> Iterator[Sample]:
        for questions in _batches(path):
            texts = [text for _, _, completions, _ in questions for text in completions]
            encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
            lengths = iter([len(ids) for ids in encoded["input_ids"]])
            for doc_id, gold, completions, budget in questions:
                counted = [(text, next(lengths)) for text in completions]
                yield grade_question(doc_id, gold, counted, budget, kind=kind, how=how)

    return how.opened, samples()


def _batches(path: Path) -> Iterator[list[tuple[int, str, list[str], int]]]:
    """doc_id, gold answer, completions and token budget of the questions of a samples file, a batch at a time."""
    found: list[tuple[int, str, list[str], int]] = []
    size = 0
    for number, row in files.read_jsonl(path):
        completions = row.get("resps")
        if not completions or not isinstance(completions[0], list):
            raise ThinkSwitchError(f"{path}, line {number}: `resps` is missing.")
        budget = row["arguments"]["gen_args_0"]["arg_1"].get("max_gen_toks", LM_EVAL_BUDGET)
        found.append((row["doc_id"], str(row["target"]), completions[0], budget))
        size += sum(map(len, completions[0]))
        if size > BATCH:
            yield found
            found, size = [], 0
    if found:
        yield found


def grade_question(
    doc_id: int, gold: str, completions: list[tuple[str, int]], budget: int, *, kind: str, how: batch.Asked
) -> Sample:
    """The verdicts on one question's completions, each with the tokens of its text.

    A completion's tokens are those of its text plus the end token, unless the token
    limit cut it: then the limit was reached, but for what re-encoding loses, and no end token was written.
    """
    sample = Sample(doc_id, [], [], [], [], [])
    for text, length in completions:
        cut = is_cut(length, budget)
        verdict = grade(kind, text, gold, opened=how.opened, cut=cut, convention=how.convention)
        if verdict["accuracy"] is None:
            raise ThinkSwitchError(
                f"Question {doc_id} (from 0) cannot be graded: {answers.unread(kind, gold)}; correct it in the task's data."
            )
        sample.correct.append(verdict["accuracy"])
        sample.found.append(verdict["answer"])
        sample.closed_trace.append(verdict["think_ratio"])
        sample.tokens.append(length if cut else length + 1)
        sample.truncated.append(cut)
    return sample


def is_cut(length: int, budget: int) -> bool:
    """Whether a completion of so many tokens, counted by encoding its text again, was cut by its budget."""
    return length >= CUT_FROM * budget


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate of "at least one of k samples is right" from n ≥ k samples.

    Chen et al., arXiv 2107.03374, eq. 1.
    """
    if n - correct < k:
        return 1.0
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def summarize(samples: Sequence[Sample]) -> dict[str, Any]:
    """The figures of one checkpoint as `report.json` holds them.

    ``ci95``: Wilson for k = 1 and where all questions' means are equal, bootstrap over questions (10,000
    draws, seed 0) otherwise.
    ``think_ratio``: completions with a closed trace over those that were not cut.
    Raises `ThinkSwitchError` if there is no sample.
    """
    if not samples:
        raise ThinkSwitchError("the samples file holds no question.")
    k = len(samples[0].correct)
    n = len(samples)
    completions = n * k
    means = [sum(s.correct) / k for s in samples]
    mean = sum(means) / n
    whole = sum(not cut for s in samples for cut in s.truncated)
    closed = sum(c and not t for s in samples for c, t in zip(s.closed_trace, s.truncated, strict=True))
    return {
        "n": n,
        "k": k,
        "mean@k": mean,
        "pass@k": sum(pass_at_k(k, sum(s.correct), k) for s in samples) / n,
        "vote@k": sum(vote_is_right(s) for s in samples) / n,
        "ci95": interval(means, k),
        "tokens": sum(sum(s.tokens) for s in samples) / completions,
        "think_ratio": closed / whole if whole else 0.0,
        "truncated": 1 - whole / completions,
        "answered": sum(f is not None for s in samples for f in s.found) / completions,
    }


def vote_is_right(sample: Sample) -> bool:
    """Whether the majority answer of a question's samples is right."""
    winner = answers.majority(sample.found)
    return winner is not None and sample.correct[sample.found.index(winner)]


def interval(means: Sequence[float], k: int) -> list[float]:
    """95 % interval of a mean over questions, each question's mean in [0, 1]."""
    from scipy.stats import binomtest

    if k > 1 and len(set(means)) > 1:  # where all are alike a bootstrap has nothing to draw from
        return bootstrapped(means)
    found = binomtest(round(sum(means)), len(means)).proportion_ci(method="wilson")
    return [float(found.low), float(found.high)]


def bootstrapped(values: Sequence[float]) -> list[float]:
    """95 % percentile interval of the mean of values, one a question (10,000 draws, seed 0)."""
    import numpy as np
    from scipy.stats import bootstrap

    if len(set(values)) == 1:
        return [values[0], values[0]]
    found = bootstrap(
        (np.asarray(values),),
        np.mean,
        n_resamples=DRAWS,
        batch=max(1, DRAWN_AT_ONCE // len(values)),
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return [float(found.low), float(found.high)]


def uses_server(keys: EvaluationKeys, engine: str) -> bool:
    """Whether lm-eval asks vLLM, started here for each checkpoint, rather than transformers in process."""
    return keys.backend == "server" or (keys.backend == "auto" and engine == "vllm")


def run_lm_eval(
    checkpoint: str,
    out: Path,
    keys: EvaluationKeys,
    engine: str,
    engine_keys: EngineKeys,
    *,
    logs: Path,
    title: str,
    answer: str | None = None,
    convention: conventions.Convention | None = None,
    lora: Path | None = None,
) -> None:
    """Run `lm_eval` on one checkpoint and keep its results and samples files in `out`.

    Args:
        answer: how the final answer is read; with it the samples are graded too, into `graded.jsonl`.
        convention: how traces are written, as the recipe says; None goes by the chat template.
        lora: a PEFT adapter put on the checkpoint; its tokenizer and chat template count then.

    Raises:
        ThinkSwitchError: lm-eval fails (with the end of the log), or would misread a name.
    """
    if (
        "," in f"{checkpoint}{lora or ''}"
    ):  # what follows would be further options of lm-eval, `trust_remote_code=True` among them
        raise ThinkSwitchError(f"The checkpoint {checkpoint} has a comma in its name; rename the folder.")
    building = files.temporary_sibling(out)
    files.remove(building)
    common: list[str | Path] = [
        "--include_path",
        str(places.find(places.TASKS)),
        "--tasks",
        keys.task,
        "--apply_chat_template",
        "--log_samples",
        "--output_path",
        building,
    ]
    if keys.limit is not None:
        common += ["--limit", str(keys.limit)]
    generation: dict[str, Any] = {} if keys.max_tokens is None else {"max_gen_toks": keys.max_tokens}
    lm_eval = [str(Path(sys.executable).with_name("lm_eval")), "run"]
    log = logs / f"{title}.log"
    if uses_server(keys, engine):
        room = min(
            context_length(checkpoint), (keys.max_tokens or task_budget(keys.task) or LARGEST_BUDGET) + PROMPT_ROOM
        )
        name = checkpoint
        if lora is not None:
            name = lora.name
            extra = [*lora_arguments({name: lora}), "--chat-template", str(lora / "chat_template.jinja")]
            engine_keys = engine_keys.model_copy(update={"vllm_args": [*engine_keys.vllm_args, *extra]})
        with serving("vllm", checkpoint, engine_keys, log, max_len=room) as server, server.explaining(log):
            model_args = (
                f"model={name},base_url={server.base_url}/chat/completions,"
                f"num_concurrent={engine_keys.concurrency},timeout={engine_keys.timeout:g},tokenizer_backend=none"
            )
            backend: list[str | Path] = ["--model", "local-chat-completions", "--model_args", model_args]
            backend += _gen_kwargs({**generation, **SERVED})
            run_logged([*lm_eval, *backend, *common], log, title="lm_eval")
    else:
        device = "cuda" if has_cuda() else "cpu"
        with tempfile.TemporaryDirectory() as scratch:
            tokenizer = keep_tags_of(str(lora or checkpoint), Path(scratch), convention) or lora
            model_args = f"pretrained={checkpoint},dtype=auto" + (f",peft={lora}" if lora else "")
            model_args += f",tokenizer={tokenizer}" if tokenizer else ""
            backend = ["--model", "hf", "--model_args", model_args, "--device", device]
            backend += ["--batch_size", keys.batch_size, *_gen_kwargs(generation)]
            run_logged([*lm_eval, *backend, *common], log, title="lm_eval")
    samples_file(building, keys.task)
    if answer is not None:
        store_graded(building, keys.task, str(lora or checkpoint), answer, convention)
    files.put_in_place(building, out)


def _gen_kwargs(generation: Mapping[str, Any]) -> list[str | Path]:
    """Generation settings as an option of `lm_eval run`."""
    return ["--gen_kwargs", ",".join(f"{name}={value}" for name, value in generation.items())] if generation else []
