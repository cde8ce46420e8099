"""`make adaptive`: labels, every condition trained and judged, table and picture, over several seeds.

    RUNS/DOMAIN/adaptive/
      adaptive.json .md .png .svg            all seeds: conditions, claims, prefix swap
      seed-0/labels/labels.jsonl             what each question needs; see labels.py
      seed-0/student, student-soft           the model that learns, without and with room for a soft prompt
      seed-0/conditions/adaptive/            data, axolotl.yaml, adapter/ of one condition
      seed-0/conditions/adaptive/eval*/      lm-eval's files of one evaluation; verdicts are read from them each time
      seed-0/checkpoint/                     the adaptive model, merged in full precision
      seed-0/served.json                     vLLM's answers to prompts sent as embeddings, beside transformers'

Killed at any time, the same command continues with what is missing.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from experiments import adaptive_results
from experiments.adaptive_models import Evaluations, merge_checkpoint, perception_keys, serve_checkpoint
from experiments.adaptive_picture import adaptive_picture
from thinkswitch_plugin import console, files
from thinkswitch_plugin.args import PerceptionKeys
from thinkswitch_plugin.data import batch
from thinkswitch_plugin.data.contamination import require_uncontaminated
from thinkswitch_plugin.data.formats import ANSWER, PRE, THINK, Format
from thinkswitch_plugin.engines.servers import vllm_python
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.judging.samples import samples_file
from thinkswitch_plugin.perception.label_job import LabelJob
from thinkswitch_plugin.perception.label_material import RATIONALES
from thinkswitch_plugin.perception.labels import label, prepare_student
from thinkswitch_plugin.perception.training import TYPES, Condition, train_condition
from thinkswitch_plugin.report.pictures import save
from thinkswitch_plugin.report.questions import asked_texts
from thinkswitch_plugin.router.classifier import candidates, describe
from thinkswitch_plugin.run import locked, versions
from thinkswitch_plugin.run.checkpoint import MODULE
from thinkswitch_plugin.run.cluster import PATIENCE, scatter
from thinkswitch_plugin.run.hashes import Hashes

if TYPE_CHECKING:
    pass

FORCED = {"forced_pre": THINK[0], "forced_post": ANSWER[0]}
ROUTERS = {"mlp": "length, characters by place; MLP", "length": "length; logistic regression, C 1"}
SWAPPED = "swapped"  # the adaptive model, every question with the soft prompt of another one drawn at random


@dataclass(frozen=True)
class Plan:
    """One condition: the format that each training question is written in, and the perception module, if any."""

    data: Literal["pre", "post", "labels", "random"]
    perception: PerceptionKeys | None


def plans(keys: PerceptionKeys) -> dict[str, Plan]:
    """Every condition that is trained; what differs from `adaptive` is what it controls for."""
    found = {
        "pre_only": Plan("pre", None),
        "post_only": Plan("post", None),
        "adaptive": Plan("labels", keys),
        "no_prompt": Plan("labels", None),
        "static_prompt": Plan("labels", keys.model_copy(update={"static": True})),
        "random_mixture": Plan("random", keys),
    }
    if keys.static:  # the adaptive model is that control itself
        del found["static_prompt"]
    elif keys.cross_attention and keys.features:
        found["no_words"] = Plan("labels", keys.model_copy(update={"features": []}))
        found["no_attention"] = Plan("labels", keys.model_copy(update={"cross_attention": False}))
    return found


NEEDED = ("pre_only", "post_only", "adaptive")


def choose_plans(keys: PerceptionKeys, names: str) -> dict[str, Plan]:
    """The conditions of `CONDITIONS="no_prompt static_prompt"`, and those that the table cannot do without.

    Args:
        names: by spaces; empty for all. Raises `ThinkSwitchError` for an unknown one.
    """
    every = plans(keys)
    wanted = names.split() or list(every)
    for name in wanted:
        if name not in every:
            raise ThinkSwitchError(f'CONDITIONS="{names}": {name!r} is not a condition; there are {", ".join(every)}.')
    return {name: plan for name, plan in every.items() if name in (*NEEDED, *wanted)}


def run_experiment(jobs: Sequence[LabelJob], conditions: str = "", cluster: str = "") -> dict[str, Any]:
    """Label, train and evaluate for the job of every seed, then write and print the table of all of them.

    Args:
        jobs: one a seed, of one domain.
        conditions: see `choose_plans`.
        cluster: a Ray cluster whose machines each run the experiment of one seed; empty for this machine.

    Raises:
        ThinkSwitchError: as `make_labels`, or a training or an evaluation fails; what is done stays done.
    """
    planned = choose_plans(perception_keys(jobs[0]), conditions)
    for job in jobs:
        require_held_out(job)
    with locked(jobs[0].home):
        result = combine_seeds(jobs, run_seeds(jobs, planned, cluster))
        folder = jobs[0].home / "adaptive"
        files.write_json(folder / "adaptive.json", result)
        text = adaptive_results.markdown(result)
        files.write_text(folder / "adaptive.md", text)
        save(adaptive_picture(result), folder / "adaptive")
    console.say(text)
    console.say(f"  {folder / 'adaptive.json'}, adaptive.md, adaptive.png, adaptive.svg")
    return result


def require_held_out(job: LabelJob) -> None:
    """Raise `ThinkSwitchError` if a question of the evaluation is among the training questions."""
    asked = {
        batch.prompt_id(row): row["body"]["messages"][-1]["content"] for _, row in batch.read_requests(job.requests)
    }
    require_uncontaminated(list(asked.items()), job.recipe.keys.evaluation)


@dataclass(frozen=True)
class Seed:
    """What one seed came to.

    Attributes:
        judged: by condition, what became of every held-out question, column by column.
        routed: by router, whether it sends each held-out question to thinking.
        swap: what the soft prompts of the held-out questions are like.
        served: how many answers vLLM gave as transformers did; None if vLLM is not installed.
        seconds: of all trainings and evaluations, whenever they were done.
    """

    judged: dict[str, dict[str, Any]]
    routed: dict[str, list[bool]]
    swap: dict[str, float]
    served: dict[str, int] | None
    labels: dict[str, Any]
    seconds: float


def run_seeds(jobs: Sequence[LabelJob], planned: Mapping[str, Plan], cluster: str) -> list[Seed]:
    """Every seed, in the order of its job; each writes only into its own folder."""
    tasks = {f"seed {job.seed}": (job, planned) for job in jobs}
    if not cluster:
        return [run_seed(*task) for task in tasks.values()]
    found: dict[str, Seed] = {}
    scatter(cluster, run_seed_alone, tasks, found.__setitem__, "seeds")
    return [found[name] for name in tasks]


def run_seed_alone(job: LabelJob, planned: Mapping[str, Plan]) -> Seed:
    """`run_seed`, after an earlier attempt has left the seed's folder."""
    with locked(job.work, PATIENCE):
        return run_seed(job, planned)


def run_seed(job: LabelJob, planned: Mapping[str, Plan]) -> Seed:
    """Labels, conditions and evaluations of one seed."""
    console.say(f"[adaptive] seed {job.seed}")
    hashes = Hashes(job.work)
    facts = label(job, hashes)
    rows = [row for _, row in files.read_jsonl(job.work / "labels" / RATIONALES)]
    labelled = [row for _, row in files.read_jsonl(job.work / "labels" / "labels.jsonl")]
    labels: dict[str, Format] = {row["prompt_id"]: row["label"] for row in labelled}
    seconds = facts["seconds"]
    judged: dict[str, dict[str, Any]] = {}
    swap: dict[str, float] = {}
    for number, (name, plan) in enumerate(planned.items(), 1):
        here = job.work / "conditions" / name
        student, _ = prepare_student(job, hashes, soft_tokens=plan.perception.tokens if plan.perception else 0)
        parts = write_parts(rows, forms_of(plan, labels, job.seed), here)
        console.say(f"[adaptive] seed {job.seed}: {name}, {number} of {len(planned)}")
        trained = train_condition(
            job.recipe,
            Condition(student, tuple(parts), job.seed, perception=plan.perception, axolotl=extra_keys(job, plan)),
            here,
            hashes,
        )
        evaluations = Evaluations(job, here, student, trained.adapter, hashes)
        judged[name] = evaluations.questions("eval")
        if name == "adaptive":
            for forced, prefix in FORCED.items():
                judged[forced] = evaluations.questions(f"eval-{forced}", prefix=prefix)
            judged[SWAPPED] = evaluations.questions(f"eval-{SWAPPED}", swapped=True)
            swap = evaluations.prompts()
        seconds += trained.seconds + evaluations.seconds
        evaluations.release()
    merge_checkpoint(job, hashes)
    served = serve_checkpoint(job, hashes) if vllm_python() else None
    hashes.save()
    texts = asked_texts(samples_file(job.work / "conditions/pre_only/eval", job.recipe.keys.evaluation.task))
    asked = [texts[doc_id] for doc_id in sorted(texts)]
    routed = {name: route(kind, labelled, asked) for name, kind in ROUTERS.items()}
    return Seed(judged, routed, swap, served, facts, seconds)


def extra_keys(job: LabelJob, plan: Plan) -> dict[str, Any]:
    """What a perception module adds to a recipe that does not name it: that its weights are saved."""
    named = job.recipe.axolotl.get("lora_modules_to_save") or []
    if plan.perception is None or MODULE in named:
        return {}
    return {"lora_modules_to_save": [*named, MODULE]}


def write_parts(rows: Sequence[dict[str, Any]], forms: Mapping[str, Format], folder: Path) -> list[tuple[Path, str]]:
    """Write each row into the file of its format; return (file, dataset type) of those that hold any.

    Args:
        rows: rationales.
        forms: format by prompt id; a row without one is left out.
    """
    parts = []
    for form, kind in TYPES.items():
        chosen = [row for row in rows if forms.get(row["prompt_id"]) == form]
        path = folder / f"{form}.jsonl"
        if not chosen:
            files.remove(path)
            continue
        with files.atomic_file(path) as handle:
            for row in chosen:
                handle.write(files.dumps_line(row))
        parts.append((path, kind))
    return parts


def forms_of(plan: Plan, labels: Mapping[str, Format], seed: int) -> dict[str, Format]:
    """Which format every training question is written in.

    `random` hands the labels themselves to other questions, so the share of each format stays.
    """
    if plan.data == "labels":
        return dict(labels)
    if plan.data == "random":
        shuffled = list(labels.values())
        random.Random(f"mixture-{seed}").shuffle(shuffled)
        return dict(zip(labels, shuffled, strict=True))
    return dict.fromkeys(labels, plan.data)


def route(kind: str, labelled: Sequence[dict[str, Any]], asked: Sequence[str]) -> list[bool]:
    """Whether a simple router (a name of `router.candidates`) fitted on labels sends each question to thinking."""
    thinks = [row["label"] == PRE for row in labelled]
    if len(set(thinks)) < 2:
        return [thinks[0]] * len(asked)
    router = candidates(0)[kind].fit(describe([row["prompt"] for row in labelled]), thinks)
    return [bool(found) for found in router.predict(describe(asked))]


def combine_seeds(jobs: Sequence[LabelJob], seeds: Sequence[Seed]) -> dict[str, Any]:
    """What `adaptive.json` holds.

    Raises `ThinkSwitchError` if the seeds were evaluated on different questions.
    """
    strata = seeds[0].judged["pre_only"]["stratum"]
    if any(rows["stratum"] != strata for seed in seeds for rows in seed.judged.values()):
        raise ThinkSwitchError(
            "the seeds were evaluated on different questions; delete the folders `conditions` and run it again."
        )

    def column(name: str, field: str) -> adaptive_results.Floats:
        return np.asarray([seed.judged[name][field] for seed in seeds], dtype=float)

    found = {
        name: adaptive_results.Condition(*(column(name, field) for field in ("correct", "tokens", "think")))
        for name in seeds[0].judged
    }
    routed = {name: np.asarray([seed.routed[name] for seed in seeds], dtype=float) for name in seeds[0].routed}
    swapped = found.pop(SWAPPED)
    answers_changed = sum(
        one != other
        for seed in seeds
        for one, other in zip(seed.judged["adaptive"]["answer"], seed.judged[SWAPPED]["answer"], strict=True)
    )
    every = {**found, **adaptive_results.derived(found, routed)}
    return {
        "domain": jobs[0].recipe.keys.domain,
        "seeds": [job.seed for job in jobs],
        **adaptive_results.summary(every, strata),
        "swap": {
            "questions": swapped.think.size,
            "decisions_changed": int((swapped.think != found["adaptive"].think).sum()),
            "answers_changed": int(answers_changed),
            "accuracy": float(swapped.correct.mean()),
            **{name: float(np.mean([seed.swap[name] for seed in seeds])) for name in seeds[0].swap},
        },
        "served": seeds[0].served
        and {name: sum((seed.served or {}).get(name, 0) for seed in seeds) for name in ("questions", "equal")},
        "labels": [seed.labels["labels"] for seed in seeds],
        "reference_from": seeds[0].labels["reference_from"],
        "seconds": round(sum(seed.seconds for seed in seeds), 1),
        "versions": versions(),
    }
