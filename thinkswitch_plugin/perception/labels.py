"""Complexity labels by cross-validation: which questions does a student answer right before it thinks?

Questions are dealt out to K folds. For each fold a baseline that answers first (post-thinking) is trained
on the other folds, and answers this fold's questions. Where it is right the label is `post`: the question needs
no thinking. Else it is `pre`. One greedy answer says so, as in arXiv 2404.09170, or several drawn ones
(`thinkswitch.adaptive.samples`), of which a share has to be right: a lucky guess is then no skill.

RUNS/DOMAIN/adaptive/seed-0/
  student/                         the student, with the format's tokens in its tokenizer
  labels/rationales.jsonl          every question's rationale, or several
  labels/fold-1/rationales.jsonl   those of the other folds: what the fold's baselines learn from
  labels/fold-1/requests.jsonl     the fold's questions
  labels/fold-1/post/…             adapter, generations.jsonl, what both depend on
  labels/labels.jsonl .json        the labels; counts, seconds and where all came from

What an answer is compared with is the right answer, where the recipe names the field that holds it, else the
majority of the thinking checkpoint's own answers. The latter needs no labels, and assumes that the majority
is right often enough: a question it gets wrong is labelled by agreement with a wrong answer.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from thinkswitch_plugin import console, files
from thinkswitch_plugin.args import resolve_seed
from thinkswitch_plugin.data import answers, batch, formats, pairs
from thinkswitch_plugin.data.formats import POST, PRE, Format
from thinkswitch_plugin.data.prompts import read_field
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.perception.answering import answer, choose_engine, write_questions
from thinkswitch_plugin.perception.training import TYPES, Condition, train_condition
from thinkswitch_plugin.recipe import Recipe, load_recipe, overlay_path, recipe_path
from thinkswitch_plugin.run import Run, checkpoint, locked, open_run, settings_file, versions
from thinkswitch_plugin.run.hashes import Hashes
from thinkswitch_plugin.run.progress import duration
from thinkswitch_plugin.run.stamp import once

RATIONALES = "rationales.jsonl"
Source = Literal["gold", "majority"]
ASSUMES: dict[Source, str] = {
    "gold": "The field of the prompts that the recipe names holds the right answer.",
    "majority": "The majority of the thinking checkpoint's answers to a question counts as right; where it is "
    "wrong, the label says whether the baseline agrees with a wrong answer.",
}


@dataclass(frozen=True)
class Job:
    """What is labelled, from which generations, and how.

    Attributes:
        home: RUNS/DOMAIN, which is locked.
        generations: batch output of a thinking checkpoint, `requests.jsonl` beside it.
        baselines: the formats that are trained; the label needs post-thinking alone.
    """

    recipe: Recipe
    seed: int
    engine: str
    home: Path
    generations: Path
    folds: int
    baselines: tuple[Format, ...]

    @property
    def work(self) -> Path:
        """The folder of everything adaptive of this seed."""
        return self.home / "adaptive" / f"seed-{self.seed}"

    @property
    def requests(self) -> Path:
        """What the generations answer."""
        return self.generations.with_name("requests.jsonl")


@dataclass(frozen=True)
class Question:
    """One question and what counts as its right answer, in the normal form of the domain's answers."""

    prompt_id: str
    turns: list[dict[str, Any]]
    reference: str

    @property
    def prompt(self) -> str:
        """What the last user turn says."""
        return next((str(turn["content"]) for turn in reversed(self.turns) if turn["role"] == "user"), "")


@dataclass(frozen=True)
class Material:
    """Everything read from the generations: questions that can be labelled, and the rationales to learn from."""

    questions: list[Question]
    rationales: Path  # of every question, in a file, since traces are long
    report: pairs.PairReport
    without_reference: int
    repeated: int  # questions whose text stands under another id too


def parse_baselines(text: str) -> tuple[Format, ...]:
    """`BASELINES="post pre"` as formats, post first. Raises `ThinkSwitchError` for any other word."""
    words = text.replace(",", " ").split() or [POST]
    if unknown := [word for word in words if word not in TYPES]:
        raise ThinkSwitchError(f'BASELINES="{text}": {unknown[0]!r} is none; use post, or post and pre.')
    return (POST, PRE) if PRE in words else (POST,)


def find_job(
    name: str,
    runs: Path,
    *,
    seed: int,
    engine: str,
    overlays: Sequence[str] = (),
    folds: int | None = None,
    baselines: str = "",
    generations: str = "",
) -> Job:
    """The job for a domain's recipe: its settings checked, its generations found (or made, if embedded).

    Args:
        folds: K; None takes the recipe's.
        generations: path of a generations.jsonl; empty takes the recipe's, else iteration 1 of RUNS/DOMAIN.

    Raises:
        ThinkSwitchError: no such recipe, too few folds, or no generations yet.
    """
    home = runs / name
    run = open_run(home) if settings_file(home).is_file() else None
    if run and not overlays:
        recipe = run.recipe
    else:
        recipe = load_recipe(recipe_path(name), tuple(overlay_path(extra) for extra in overlays))
    keys = recipe.keys.adaptive
    count = keys.folds if folds is None else folds
    if count < 2:
        raise ThinkSwitchError(
            f"FOLDS={count}: give 2 or more; each fold is labelled by a baseline that never saw its questions."
        )
    chosen = choose_engine(engine)
    found = Path(generations or (resolve_seed(keys.generations, seed) if keys.generations else ""))
    if not generations and not keys.generations:
        found = _of_run(run, home, name, seed)
    job = Job(recipe, seed, chosen, home, found, count, parse_baselines(baselines))
    if recipe.keys.pair.embedded:
        from thinkswitch_plugin.demo import cache

        cache.ensure(recipe.keys, seed)
    for path in (job.generations, job.requests):
        if not path.is_file():
            raise ThinkSwitchError(
                f"{path} does not exist; the labels need a generations.jsonl and the requests.jsonl it answers beside it."
            )
    return job


def _of_run(run: Run | None, home: Path, name: str, seed: int) -> Path:
    begin = f"run `make iterate DOMAIN={name} ITERATIONS=1` first"
    other = "or name other generations by GENERATIONS="
    if run is None:
        raise ThinkSwitchError(
            f"{home} is not a run folder, so there are no generations to learn from; {begin}, {other}."
        )
    if run.seed != seed:
        raise ThinkSwitchError(
            f"{home} was begun with SEED={run.seed}; give SEED={run.seed} (for `make adaptive`: SEEDS={run.seed}), {other}."
        )
    if not (stamp := run.iteration(1) / ".stamps" / "generate.json").is_file():
        raise ThinkSwitchError(
            f"{home} has not finished the generations of iteration 1 (no {stamp}); {begin}, {other}."
        )
    return run.iteration(1) / "generations.jsonl"


def make_labels(job: Job) -> dict[str, Any]:
    """Label every question; write `labels.jsonl` and `labels.json`, and return what the latter holds.

    Folds that are done and made of the same files are kept, so the same command goes on after a kill.

    Raises:
        ThinkSwitchError: what the generations or the gold answers lack, too few questions, or an engine failed.
    """
    with locked(job.home):
        return label(job, Hashes(job.work))


def label(job: Job, hashes: Hashes) -> dict[str, Any]:
    """`make_labels` within a job that holds the lock."""
    material = read_material(job)
    dealt = deal_questions(material.questions, job.folds, job.seed)
    source: Source = "gold" if job.recipe.keys.adaptive.gold else "majority"
    console.say(
        f"[labels] {len(material.questions)} questions in {job.folds} folds, compared with the "
        + ("right answers" if source == "gold" else "majority of the thinking checkpoint's answers")
    )
    console.say(f"  {material.report.summary()}; {material.without_reference} questions have no reference")
    if material.repeated:
        console.say(
            f"  {material.repeated} questions are asked under another id too, and lie in the same fold as that one"
        )
    student, seconds = prepare_student(job, hashes)
    found: dict[str, dict[Format, float]] = {question.prompt_id: {} for question in material.questions}
    folds = []
    for fold in range(1, job.folds + 1):
        one = Fold(job, fold, [q for q in material.questions if dealt[q.prompt_id] == fold], student, hashes)
        one.write(material, dealt)
        facts: dict[str, Any] = {"fold": fold, "questions": len(one.questions)}
        for form in job.baselines:
            verdicts, facts[form] = one.judge(form)
            seconds += facts[form]["seconds"]
            for prompt_id, share in verdicts.items():
                found[prompt_id][form] = share
        folds.append(facts)
    certainty = job.recipe.keys.adaptive.certainty
    rows = [
        row_of(question, dealt[question.prompt_id], found[question.prompt_id], source, certainty)
        for question in material.questions
    ]
    out = job.work / "labels"
    with files.atomic_file(out / "labels.jsonl") as handle:
        for row in rows:
            handle.write(files.dumps_line(row))
    counts = Counter(row["label"] for row in rows)
    result: dict[str, Any] = {
        "domain": job.recipe.keys.domain,
        "seed": job.seed,
        "engine": job.engine,
        "questions": len(rows),
        "labels": {form: counts[form] for form in (POST, PRE)},
        "reference_from": source,
        "assumes": ASSUMES[source],
        "samples": job.recipe.keys.adaptive.samples,
        "certainty": certainty,
        "without_reference": material.without_reference,
        "repeated": material.repeated,
        "generations": str(job.generations),
        "rationales": material.report.as_json(),
        "folds": folds,
        "seconds": round(seconds, 1),
        "inputs": {
            "generations": hashes.of(job.generations),
            "requests": hashes.of(job.requests),
            "student": hashes.of(student),
        },
        "versions": versions(),
    }
    files.write_json(out / "labels.json", result)
    hashes.save()
    shares = ", ".join(f"{form} {n} ({100 * n / len(rows):.1f} %)" for form, n in result["labels"].items())
    console.say(f"[labels] {shares}; {duration(seconds)} of training and answering; {out / 'labels.jsonl'}")
    return result


def read_material(job: Job) -> Material:
    """Read the generations: what each question's reference is, and which rationales may be learnt from.

    Raises:
        ThinkSwitchError: a file is broken, or there is no complete answer, no rationale, no reference, or
            fewer questions than folds.
    """
    keys = job.recipe.keys
    turns: dict[str, list[dict[str, Any]]] = {}
    for _, request in batch.read_requests(job.requests):
        turns.setdefault(batch.prompt_id(request), request["body"]["messages"])
    rationales = job.work / "labels" / RATIONALES
    report = pairs.write_pairs(
        job.requests,
        job.generations,
        rationales,
        selection=keys.labels.selection,
        answer_kind=keys.labels.answer,
        keep_trace=True,
        convention=keys.convention,
    )
    references = gold_references(job, turns) if keys.adaptive.gold else majority_references(job)
    questions = [Question(name, asked, references[name]) for name, asked in turns.items() if name in references]
    texts = Counter(question.prompt for question in questions)
    if len(texts) < job.folds:
        raise ThinkSwitchError(
            f"FOLDS={job.folds}, but {job.generations} has only {len(texts)} questions with a reference answer; "
            "lower FOLDS=, or generate more answers."
        )
    return Material(
        questions,
        rationales,
        report,
        without_reference=len(turns) - len(questions),
        repeated=sum(n for n in texts.values() if n > 1),
    )


def majority_references(job: Job) -> dict[str, str]:
    """The majority of all complete answers to each question (the earliest of equals); none where none can be read."""
    labels, convention = job.recipe.keys.labels, job.recipe.keys.convention
    read: dict[str, list[str | None]] = {}
    report = pairs.PairReport()
    for row in pairs.build_pairs(job.requests, job.generations, selection="all", convention=convention, report=report):
        read.setdefault(row["prompt_id"], []).append(answers.extract(labels.answer, row["messages"][-1]["content"]))
    majorities = ((prompt_id, answers.majority(found)) for prompt_id, found in read.items())
    return {prompt_id: winner for prompt_id, winner in majorities if winner is not None}


def gold_references(job: Job, prompts: Mapping[str, Any]) -> dict[str, str]:
    """The right answer of each question, from the field of the prompts that the recipe names.

    Raises `ThinkSwitchError` where a prompt has no row, the row no such field, or the field no answer.
    """
    keys = job.recipe.keys
    field = str(keys.adaptive.gold)
    rows = read_field(keys.prompts, job.seed, field)
    where = keys.prompts.hub or resolve_seed(str(keys.prompts.path), job.seed)
    found = {}
    for prompt_id in prompts:
        if prompt_id not in rows:
            raise ThinkSwitchError(
                f"{where} has no row for the prompt {prompt_id!r} of {job.requests}, so its right answer is not known; "
                "use the prompts these generations were made of, or leave `thinkswitch.adaptive.gold` out."
            )
        read = answers.gold(keys.labels.answer, rows[prompt_id])
        if read is None:
            raise ThinkSwitchError(
                f"{where}: `{field}` of the prompt {prompt_id!r} is {rows[prompt_id][:80]!r}, in which "
                f"`thinkswitch.labels.answer: {keys.labels.answer}` reads no answer; correct one of the two."
            )
        found[prompt_id] = read
    return found


def deal(prompt_ids: Sequence[str], folds: int, seed: int) -> dict[str, int]:
    """Deal questions out to folds 1 to K; sizes differ by one at most.

    The same questions, folds and seed give the same result, in whatever order the questions come.
    """
    shuffled = sorted(prompt_ids)
    random.Random(f"folds-{seed}").shuffle(shuffled)
    return {prompt_id: place % folds + 1 for place, prompt_id in enumerate(shuffled)}


def deal_questions(questions: Sequence[Question], folds: int, seed: int) -> dict[str, int]:
    """The fold of each question, by prompt id: one text lies in one fold, under however many ids it is asked."""
    ids: dict[str, list[str]] = {}
    for question in questions:
        ids.setdefault(question.prompt, []).append(question.prompt_id)
    dealt = deal([min(alike) for alike in ids.values()], folds, seed)
    return {prompt_id: dealt[min(alike)] for alike in ids.values() for prompt_id in alike}


def prepare_student(job: Job, hashes: Hashes, soft_tokens: int = 0) -> tuple[Path, float]:
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


@dataclass(frozen=True)
class Fold:
    """One fold: its questions, and the baselines that never saw them."""

    job: Job
    number: int
    questions: list[Question]
    student: Path
    hashes: Hashes

    @property
    def here(self) -> Path:
        """Its folder."""
        return self.job.work / "labels" / f"fold-{self.number}"

    def write(self, material: Material, dealt: Mapping[str, int]) -> None:
        """Write what the fold's baselines learn from (the other folds' rationales) and its questions.

        Raises `ThinkSwitchError` if there is nothing to learn from.
        """
        learnt = 0
        with files.atomic_file(self.here / RATIONALES) as handle:
            for _, row in files.read_jsonl(material.rationales):
                if dealt.get(row["prompt_id"], self.number) != self.number:
                    handle.write(files.dumps_line(row))
                    learnt += 1
        if not learnt:
            raise ThinkSwitchError(
                f"{self.job.generations}: no question outside fold {self.number} has a complete answer with its trace; "
                "lower FOLDS=, or generate more answers."
            )
        write_questions(
            self.here / "requests.jsonl",
            ((question.prompt_id, question.turns) for question in self.questions),
            max_tokens=self.job.recipe.keys.sampling.max_tokens,
            samples=self.job.recipe.keys.adaptive.samples,
            seed=self.job.seed,
        )

    def judge(self, form: Format) -> tuple[dict[str, float], dict[str, Any]]:
        """Train one baseline, have it answer, and compare: each question's share of right answers, and figures."""
        job, place = self.job, self.here / form
        title = f"fold {self.number} of {job.folds}, {form}"
        console.say(f"[labels] {title}")
        data = ((self.here / RATIONALES, TYPES[form]),)
        trained = train_condition(job.recipe, Condition(self.student, data, job.seed), place, self.hashes)
        answered = answer(
            self.student,
            trained.adapter,
            self.here / "requests.jsonl",
            place / "generations.jsonl",
            engine=job.engine,
            keys=job.recipe.keys.engine,
            hashes=self.hashes,
            seed=job.seed,
            title=f"answers, {title}",
        )
        self.hashes.save()
        read = dict(completions(place / "generations.jsonl"))
        kind, reference = job.recipe.keys.labels.answer, {q.prompt_id: q.reference for q in self.questions}
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


def completions(generations: Path) -> Iterator[tuple[str, formats.Parsed]]:
    """(prompt id, parsed completion) of every stored answer to a fold's questions."""
    for number, row in files.read_jsonl(generations):
        body = batch.completion_body(row)
        if body is not None:
            choice = body["choices"][0]
            text, cut = choice["message"].get("content") or "", choice.get("finish_reason") == "length"
            yield batch.stored_id(row, generations, number), formats.parse(text, cut=cut)


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
