"""The stages of a run: the one list of their names, order, inputs, outputs and work.

`TABLE` has a row for each stage. The commands, `make status`, the times in the report and what a stamp compares
follow from it, and a test checks that the Makefile has the same stages in the same order. A row makes the `Stage`
of one iteration, which says what is read and written there and which settings count:

    rebuild of iteration 1: iter-1/instruct, the anchor, merge_configs/slerp.yaml, … -> iter-1/thinking, rebuild.json

and its stamp records them:

    runs/arithmetic/iter-1/.stamps/pairs.json
    {"stage": "pairs", "values": {"selection": "first", …}, "inputs": {"iter-1/generations.jsonl": "9f8e…"},
     "outputs": {"iter-1/pairs.jsonl": "41c0…", …}, "seconds": 0.2, "seed": 0, "command": "thinkswitch pairs …", …}
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from thinkswitch_plugin import places
from thinkswitch_plugin.engine_args import addresses, learning_options
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.run.folder import MODES, Run
from thinkswitch_plugin.run.hashes import Hashes, within

# axolotl's keys that say where a training is logged; they do not change what is trained.
TRACKING = re.compile(r"(use_|hf_)?(wandb|mlflow|comet|trackio|otel|tensorboard|swanlab)(_|$)")
TEMPLATE_FILES = ("tokenizer_config.json", "chat_template.jinja")
REPORT_PICTURES = ("iterations", "paired", "time")
REPORT_FILES = (
    *("report.json", "report.md", "report.html"),
    *(f"{name}.{kind}" for name in REPORT_PICTURES for kind in ("png", "svg")),
)


@dataclass(frozen=True)
class Stage:
    """One stage of one iteration: what it reads, depends on and writes.

    Args:
        resume_on: a failed attempt is continued if the inputs and these values are the same;
            None: the stage always starts anew.
        needs: must be there for the stage to count as done, but are not its outputs.
        scratch: what an attempt leaves beside its outputs to continue from.
        writes_like: a checkpoint about as large as what the stage writes.
    """

    name: str
    iteration: int
    inputs: tuple[Path, ...] = ()
    outputs: tuple[Path, ...] = ()
    values: dict[str, Any] = field(default_factory=dict)
    resume_on: tuple[str, ...] | None = None
    needs: tuple[Path, ...] = ()
    scratch: tuple[Path, ...] = ()
    writes_like: Path | None = None

    @property
    def title(self) -> str:
        """Its name in messages."""
        return self.name if self.name == "report" else f"{self.name} of iteration {self.iteration}"

    @property
    def key(self) -> tuple[str, int]:
        """Its name and iteration."""
        return self.name, self.iteration

    def resumed_part(self, key: Any) -> Any:
        """The part of `depends_on` that half-finished outputs depend on."""
        values = key.get("values")
        found = {name: values.get(name) for name in self.resume_on or ()} if isinstance(values, dict) else None
        return key.get("inputs"), found

    def depends_on(self, hashes: Hashes) -> dict[str, Any]:
        """The settings and the hashes of the inputs, as the stamp records them: paths are from the run folder on."""
        values: dict[str, Any] = within(self.values, hashes.folder)
        return {"values": values, "inputs": {hashes.name(path): hashes.of(path) for path in self.inputs}}


def stamp_path(run: Run, stage: Stage) -> Path:
    """The stamp of a stage, which is also its target in the Makefile."""
    folder = run.folder if stage.name == "report" else run.iteration(stage.iteration)
    return folder / ".stamps" / f"{stage.name}.json"


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Args:
        command: of `thinkswitch`, on a run folder; with `mode` behind it if there are two rows of it.
        when: which iterations have it: `pair` (0), `iteration` (1 and later), `both`, or `end` (the last one).
        work: the function of `loop` that does it.
        timed: the name under which `report.json` adds up its seconds.
        help: what `thinkswitch COMMAND --help` prints.
        plan: makes the stage of one iteration of a run.
    """

    command: str
    when: Literal["pair", "iteration", "both", "end"]
    work: str
    timed: str
    help: str
    plan: Callable[[Run, int], Stage]
    mode: str | None = None

    @property
    def name(self) -> str:
        """The name of its stamp."""
        return f"{self.command}-{self.mode}" if self.mode else self.command

    @property
    def single(self) -> bool:
        """Whether a run has it once, not for each iteration."""
        return self.when in ("pair", "end")

    def belongs_to(self, iteration: int, last: int) -> bool:
        """Whether this iteration of a run has the stage."""
        return {"pair": iteration == 0, "iteration": iteration > 0, "both": True, "end": iteration == last}[self.when]


def _pair(run: Run, k: int) -> Stage:
    pair = run.recipe.keys.pair.model_dump(exclude={"base"})
    pair["embedded"] = pair.pop("demo")  # the key's former name, so that older runs go on
    values = {"pair": pair, "seed": run.seed}
    needs = tuple(Path(run.checkpoint(mode, k)) for mode in MODES)
    return Stage("pair", k, (), (run.iteration(k) / "pair.json",), values, needs=needs)


def _requests(run: Run, k: int) -> Stage:
    from thinkswitch_plugin.args import resolve_seed

    keys, judged = run.recipe.keys, run.recipe.keys.evaluation
    prompts = (Path(resolve_seed(keys.prompts.path, run.seed)),) if keys.prompts.path else ()
    template = (Path(run.checkpoint("thinking", k - 1)) / name for name in TEMPLATE_FILES)
    inputs = (*prompts, *(path for path in template if path.is_file()), *run.task)
    values = {
        "prompts": keys.prompts.model_dump(),
        "sampling": keys.sampling.model_dump(),
        "seed": run.seed,
        "contamination": [judged.task, judged.contamination_ngram, judged.contamination_share, *judged.guard],
        "data": run.given.data,
        **keys.pair.asked_with("thinking"),
        **({"top_logprobs": keys.distribution.top_k} if keys.loss == "distribution" else {}),
    }
    return Stage("requests", k, inputs, (run.iteration(k) / "requests.jsonl",), values)


def _generate(run: Run, k: int) -> Stage:
    here, learnt = run.iteration(k), run.recipe.keys.answers
    inputs = (here / "requests.jsonl", Path(run.checkpoint("thinking", k - 1)))
    answering, server = run.answering, run.recipe.keys.engine.server.changing_answers()
    values = {
        "engine": [*answering, server] if server and addresses(run.engine) else answering,
        "unfinished": learnt.unfinished,
        "retry_max_tokens": learnt.retry_max_tokens,
    }
    return Stage("generate", k, inputs, (run.generations(k),), values, resume_on=("engine",))


def _pairs(run: Run, k: int) -> Stage:
    here, keys = run.iteration(k), run.recipe.keys
    inputs, outputs = (here / "requests.jsonl", run.generations(k)), ("pairs.jsonl", "pairs.json")
    values = {**keys.answers.selecting(), "answer": keys.answers.kind, "trace": keys.trace}
    return Stage("pairs", k, inputs, tuple(here / n for n in outputs), values)


def _train(run: Run, k: int) -> Stage:
    from thinkswitch_plugin.recipe import iteration_config

    here, keys, learner = run.iteration(k), run.recipe.keys, run.checkpoint("instruct", k - 1)
    inputs = (here / "pairs.jsonl", Path(learner))
    config = iteration_config(run.recipe, base_model=learner, pairs=inputs[0], here=here, seed=run.seed)
    values = {
        "axolotl": {key: v for key, v in config.items() if key != "thinkswitch" and not TRACKING.match(key)},
        "axolotl_args": learning_options(keys.axolotl_args),
        "min_change": keys.min_adapter_change,
    }
    outputs = (here / "adapter", here / "axolotl.yaml")
    return Stage("train", k, inputs, outputs, values, resume_on=("axolotl", "axolotl_args"))


def _merge_lora(run: Run, k: int) -> Stage:
    here, learner = run.iteration(k), Path(run.checkpoint("instruct", k - 1))
    inputs = (here / "adapter", here / "axolotl.yaml", learner)
    return Stage("merge-lora", k, inputs, (here / "instruct",), writes_like=learner)


def _rebuild(run: Run, k: int) -> Stage:
    here, trace, keys, anchor = run.iteration(k), run.recipe.keys.trace, run.recipe.keys.rebuild, Path(run.anchor(k))
    asked = (here / "requests.jsonl", run.generations(1))
    return Stage(
        "rebuild",
        k,
        (here / "instruct", anchor, places.find(keys.config), *asked),
        (here / "thinking", here / "rebuild.json", here / "merge.yaml"),
        {"rebuild": keys.model_dump(), "engine": run.answering, "trace": trace},
        resume_on=("rebuild", "engine"),
        scratch=tuple((here / "logs").glob("check-lambda-*.jsonl")),
        writes_like=anchor,
    )


def _evaluate(run: Run, k: int, mode: str) -> Stage:
    keys, subjects = run.recipe.keys.evaluation, run.subjects(mode, k)
    values = {
        "evaluation": keys.changing_figures() | keys.changing_guard(),
        "backend": "hf" if keys.backend == "hf" else run.answering,
        "data": run.given.data,
        **{name: dict(subject.arguments) for name, subject in subjects.items() if subject.arguments},
    }
    inputs = (Path(run.checkpoint(mode, k)), *run.task)
    outputs = tuple(run.iteration(k) / "eval" / name for name in subjects)
    margin = {} if keys.guard_margin is None else {"guard_margin": keys.guard_margin}  # asks nothing again
    return Stage(f"eval-{mode}", k, inputs, outputs, values | margin, resume_on=tuple(values))


def _report(run: Run, k: int) -> Stage:
    evaluated = (run.iteration(j) / "eval" / name for j in range(k + 1) for name in run.evaluated(j))
    counted = (run.iteration(j) / name for j in range(1, k + 1) for name in ("pairs.json", "rebuild.json"))
    values = {"iterations": k, "price": run.given.price, "answer": run.recipe.keys.answers.kind}
    outputs = tuple(run.folder / name for name in REPORT_FILES)
    return Stage("report", k, (*evaluated, *counted, *sweep_files(run), *control_files(run)), outputs, values)


# fmt: off
TABLE: tuple[Row, ...] = (
    Row("pair", "pair", "prepare_pair", "pair",
        "Download (or train, for the demo domain) the starting pair and check that the two belong together.", _pair),
    Row("requests", "iteration", "write_requests", "generate", "Task prompts -> requests.jsonl.", _requests),
    Row("generate", "iteration", "answer_requests", "generate",
        "The thinking checkpoint answers -> generations.jsonl.", _generate),
    Row("pairs", "iteration", "build_pairs", "pairs",
        "Traces removed -> pairs.jsonl and the counts in pairs.json.", _pairs),
    Row("train", "iteration", "train", "train", "axolotl QLoRA on the pairs -> adapter/.", _train),
    Row("merge-lora", "iteration", "merge_lora", "merge_lora",
        "axolotl merges the adapter in full precision -> instruct/.", _merge_lora),
    Row("rebuild", "iteration", "rebuild", "merge", "mergekit interpolates, checked -> thinking/.", _rebuild),
    *(Row("eval", "both", "evaluate", "eval", "lm-eval evaluates one checkpoint -> eval/MODE/.",
          partial(_evaluate, mode=mode), mode)
      for mode in MODES),
    Row("report", "end", "report", "report",
        "Scores, comparisons, pairs, λ, times and every question -> report.html, report.json, report.md, pictures.",
        _report),
)
# fmt: on


def stages(run: Run) -> Iterator[Stage]:
    """Every stage of a run in order."""
    for k in range(run.iterations + 1):
        yield from (row.plan(run, k) for row in TABLE if row.belongs_to(k, run.iterations))


def find_stage(run: Run, name: str, iteration: int) -> Stage:
    """The stage of that name. Raises `ThinkSwitchError` if the run has none."""
    for row in TABLE:
        if row.name == name and 0 <= iteration <= run.iterations and row.belongs_to(iteration, run.iterations):
            return row.plan(run, iteration)
    raise ThinkSwitchError(
        f"{run.folder} has no stage {name} in iteration {iteration} (it has {run.iterations} iterations); "
        "`make status` lists them."
    )


def sweep_files(run: Run) -> list[Path]:
    """The sweeps of a run's iterations, which the report shows where there are any."""
    every = (run.iteration(k) / "sweep" / "sweep.json" for k in range(run.iterations + 1))
    return [path for path in every if path.is_file()]


def control_files(run: Run) -> list[Path]:
    """The results of the control experiments on a run, which the report shows where there are any."""
    return sorted((run.folder / "controls").glob("*/result.json"))
