"""Complexity labels by cross-validation: which questions does a student answer right before it thinks?

Questions are divided into K folds. For each fold a baseline that answers first (post-thinking) is trained
on the other folds, and answers this fold's questions. Where it is right the label is `post`: the question needs
no thinking. Else it is `pre`. One greedy answer decides, as in arXiv 2404.09170, or several sampled ones
(`thinkswitch.adaptive.samples`), of which a share has to be right: a lucky guess is then no skill.

RUNS/DOMAIN/adaptive/seed-0/
  student/                         the student, with the format's tokens in its tokenizer
  labels/rationales.jsonl          every question's rationale, or several
  labels/fold-1/rationales.jsonl   those of the other folds: what the fold's baselines learn from
  labels/fold-1/requests.jsonl     the fold's questions
  labels/fold-1/post/…             adapter, generations.jsonl, what both depend on
  labels/labels.jsonl .json        the labels; counts, seconds and where all came from
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from thinkswitch_plugin import console, files
from thinkswitch_plugin.args import SamplingKeys, ThinkSwitchKeys, resolve_seed
from thinkswitch_plugin.data import answers, batch, formats
from thinkswitch_plugin.data.formats import POST, PRE, Format
from thinkswitch_plugin.data.prompts import write_requests
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.perception.label_job import LabelJob
from thinkswitch_plugin.perception.label_material import (
    ASSUMES,
    RATIONALES,
    Material,
    Question,
    Source,
    assign_folds,
    read_material,
)
from thinkswitch_plugin.perception.training import TYPES, Condition, answer, train_condition
from thinkswitch_plugin.run import checkpoint, locked, versions
from thinkswitch_plugin.run.hashes import Hashes
from thinkswitch_plugin.run.progress import duration
from thinkswitch_plugin.run.stamp import once


def make_labels(job: LabelJob) -> dict[str, Any]:
    """Label every question; write `labels.jsonl` and `labels.json`, and return what the latter holds.

    Folds that are done and made of the same files are kept, so the same command continues after a kill.

    Raises:
        ThinkSwitchError: what the generations or the gold answers lack, too few questions, or an engine failed.
    """
    with locked(job.home):
        return label(job, Hashes(job.work))


def label(job: LabelJob, hashes: Hashes) -> dict[str, Any]:
    """`make_labels` within a job that holds the lock."""
    material = read_material(job)
    keys, fold_of = job.recipe.keys.adaptive, assign_folds(material.questions, job.folds, job.seed)
    source: Source = "gold" if keys.gold else "majority"
    console.say(
        f"[labels] {len(material.questions)} questions in {job.folds} folds, compared with the "
        + ("right answers" if source == "gold" else "majority of the thinking checkpoint's answers")
    )
    console.say(f"  {material.report.summary()}; {material.without_reference} questions have no reference")
    if material.repeated:
        console.say(f"  {material.repeated} questions share their text with another id; such questions share a fold")
    student, seconds = prepare_student(job, hashes)
    shares: dict[str, dict[Format, float]] = {question.prompt_id: {} for question in material.questions}
    every = prepare_folds(job, material, fold_of, student, hashes)
    folds = []
    for fold in every:
        number = fold.number
        facts: dict[str, Any] = {"fold": number, "questions": len(fold.questions)}
        for form in job.formats:
            found, facts[form] = fold.evaluate(form)
            seconds += facts[form]["seconds"]
            for prompt_id, share in found.items():
                shares[prompt_id][form] = share
        folds.append(facts)
    rows = [row_of(q, fold_of[q.prompt_id], shares[q.prompt_id], source, keys.certainty) for q in material.questions]
    out = job.work / "labels"
    files.write_jsonl(out / "labels.jsonl", rows)
    counts = Counter(row["label"] for row in rows)
    result: dict[str, Any] = {
        "domain": job.recipe.keys.domain,
        "seed": job.seed,
        "engine": job.engine,
        "questions": len(rows),
        "labels": {form: counts[form] for form in (POST, PRE)},
        "reference_from": source,
        "assumes": ASSUMES[source],
        "samples": keys.samples,
        "certainty": keys.certainty,
        "without_reference": material.without_reference,
        "repeated": material.repeated,
        "generations": str(job.generations),
        "rationales": material.report.as_json(),
        "folds": folds,
        "seconds": round(seconds, 1),
        "inputs": {
            name: hashes.of(path)
            for name, path in (("generations", job.generations), ("requests", job.requests), ("student", student))
        },
        "versions": versions(),
    }
    files.write_json(out / "labels.json", result)
    hashes.save()
    parts = ", ".join(f"{form} {n} ({100 * n / len(rows):.1f} %)" for form, n in result["labels"].items())
    console.say(f"[labels] {parts}; {duration(seconds)} of training and answering; {out / 'labels.jsonl'}")
    return result


def prepare_student(job: LabelJob, hashes: Hashes, soft_tokens: int = 0) -> tuple[Path, float]:
    """The checkpoint that learns, with placeholders for so many soft-prompt tokens; and its seconds."""
    from thinkswitch_plugin.perception.student import NEW_ROWS, make_student

    keys = job.recipe.keys
    name = keys.adaptive.student or keys.pair.instruct
    revision = None if keys.adaptive.student else keys.pair.revision_instruct
    base, _ = checkpoint.resolve(resolve_seed(name, job.seed), revision, "student")
    out = job.work / ("student-soft" if soft_tokens else "student")

    def work(_resume: bool) -> dict[str, Any]:
        make_student(base, out, soft_tokens=soft_tokens)
        return {}

    key = {"base": hashes.of(base), "soft_tokens": soft_tokens, "new_rows": NEW_ROWS}
    hashes.save()
    return out, float(once(out.with_suffix(".json"), {"key": key}, (out,), work)["seconds"])


def sampling_of(keys: ThinkSwitchKeys) -> SamplingKeys:
    """How baselines are asked: greedily, or `adaptive.samples` times at temperature 1."""
    samples = keys.adaptive.samples
    temperature, budget = float(samples > 1), keys.sampling.max_tokens
    return SamplingKeys(samples=samples, temperature=temperature, top_p=1, top_k=-1, max_tokens=budget)


@dataclass(frozen=True)
class Fold:
    """One fold: its questions, and the baselines that never saw them."""

    job: LabelJob
    number: int
    questions: list[Question]
    student: Path
    hashes: Hashes

    @property
    def here(self) -> Path:
        """Its folder."""
        return self.job.work / "labels" / f"fold-{self.number}"

    def write(self, material: Material, fold_of: Mapping[str, int]) -> None:
        """Write what the fold's baselines learn from (the other folds' rationales) and its questions.

        Raises `ThinkSwitchError` if there is nothing to learn from.
        """
        rationales = 0
        with files.atomic_file(self.here / RATIONALES) as handle:
            for _, row in files.read_jsonl(material.rationales):
                if fold_of.get(row["prompt_id"], self.number) != self.number:
                    handle.write(files.dumps_line(row))
                    rationales += 1
        if not rationales:
            raise ThinkSwitchError(
                f"{self.job.generations}: no question outside fold {self.number} has a complete answer with its trace; "
                "lower FOLDS=, or generate more answers."
            )
        write_requests(
            self.here / "requests.jsonl",
            [(question.prompt_id, question.turns) for question in self.questions],
            model="student",
            how=batch.Asked(arguments=self.job.recipe.keys.pair.arguments("instruct")),
            sampling=sampling_of(self.job.recipe.keys),
            seed=self.job.seed,
            more={"stop": list(formats.STOP)},
        )

    def evaluate(self, form: Format) -> tuple[dict[str, float], dict[str, Any]]:
        """Train one baseline, have it answer, and compare: each question's share of right answers, and figures."""
        job, place = self.job, self.here / form
        console.say(f"[labels] fold {self.number} of {job.folds}, {form}")
        data = ((self.here / RATIONALES, TYPES[form]),)
        trained = train_condition(job.recipe, Condition(self.student, data, job.seed), place, self.hashes)
        answered = answer(
            trained,
            self.here / "requests.jsonl",
            place / "generations.jsonl",
            engine=job.engine,
            keys=job.recipe.keys.engine,
            hashes=self.hashes,
            seed=job.seed,
        )
        self.hashes.save()
        read = dict(completions(place / "generations.jsonl"))
        kind, reference = job.recipe.keys.answers.kind, {q.prompt_id: q.reference for q in self.questions}
        verdicts: dict[str, list[bool]] = {}
        for _, request in batch.read_requests(self.here / "requests.jsonl"):
            prompt_id = batch.prompt_id(request)
            right = is_right(read[request["custom_id"]], form, reference[prompt_id], kind)
            verdicts.setdefault(prompt_id, []).append(right)
        shares = {prompt_id: sum(right) / len(right) for prompt_id, right in verdicts.items()}
        seconds = round(trained.seconds + answered["seconds"], 1)
        figures = {
            "right": sum(share >= job.recipe.keys.adaptive.certainty for share in shares.values()),
            "answers_right": sum(shares.values()) / len(shares),
            "in_format": sum(parsed.form == form and parsed.closed for parsed in read.values()),
            "adapter_change": trained.change,
            "seconds": seconds,
        }
        console.say(
            f"  {figures['right']} of {len(shares)} right, {figures['in_format']} of {len(read)} answers whole and in the "
            f"format, {seconds:.1f} s"
        )
        return shares, figures


def prepare_folds(
    job: LabelJob, material: Material, fold_of: Mapping[str, int], student: Path, hashes: Hashes
) -> list[Fold]:
    """Every fold with its files written; with a cluster, their baselines are trained and asked afterwards."""
    folds = [
        Fold(job, number, [q for q in material.questions if fold_of[q.prompt_id] == number], student, hashes)
        for number in range(1, job.folds + 1)
    ]
    for fold in folds:
        fold.write(material, fold_of)
    if job.cluster:
        train_in_cluster(job, folds)
    return folds


def train_in_cluster(job: LabelJob, folds: Sequence[Fold]) -> None:
    """Have every baseline trained and asked on some machine of the cluster; each has a folder of its own."""
    from thinkswitch_plugin.run import cluster

    tasks = {f"fold {fold.number}, {form}": (fold, form) for fold in folds for form in job.formats}
    cluster.scatter(job.cluster, evaluate_elsewhere, tasks, lambda name, _: None, "folds")


def evaluate_elsewhere(fold: Fold, form: Format) -> None:
    """`Fold.evaluate` with hashes of its own, since the job's are written by one process."""
    from thinkswitch_plugin.run import cluster

    place = fold.here / form
    try:
        with locked(place, cluster.PATIENCE):
            replace(fold, hashes=Hashes(place)).evaluate(form)
    except ThinkSwitchError as error:
        raise cluster.with_log(error, place / "logs" / "train.log") from None


def completions(generations: Path) -> Iterator[tuple[str, formats.Parsed]]:
    """(prompt id, parsed completion) of every stored answer to a fold's questions."""
    for name, row in batch.read_stored(generations):
        body = batch.completion_body(row)
        if body is not None:
            choice = body["choices"][0]
            text, cut = choice["message"].get("content") or "", choice.get("finish_reason") == "length"
            yield name, formats.parse(text, cut=cut)


def is_right(parsed: formats.Parsed, form: Format, reference: str, kind: str) -> bool:
    """Whether a completion is whole, in the format it was trained for, and its answer the reference."""
    return parsed.closed and parsed.form == form and answers.extract(kind, parsed.answer) == reference


def row_of(
    question: Question, fold: int, right: Mapping[Format, float], source: str, certainty: float
) -> dict[str, Any]:
    """One row of `labels.jsonl`.

    Args:
        right: by baseline, the share of its answers to this question that are right.
        certainty: the share from which on it counts as right.
    """
    verdicts = {form: share >= certainty for form, share in right.items()}
    return {
        "prompt_id": question.prompt_id,
        "prompt": question.prompt,
        "fold": fold,
        "post_correct": verdicts[POST],
        "pre_correct": verdicts.get(PRE),
        "post_share": right[POST],
        "pre_share": right.get(PRE),
        "label": POST if verdicts[POST] else PRE,
        "reference": question.reference,
        "reference_from": source,
    }
