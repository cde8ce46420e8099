"""What a search is about: a pair of checkpoints, and the domain whose task evaluates what is made of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from thinkswitch_plugin import files
from thinkswitch_plugin.args import ThinkSwitchKeys, resolve_seed
from thinkswitch_plugin.data.task_files import task_files
from thinkswitch_plugin.engines import servers
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.merging.compatibility import Allowances, require_compatible
from thinkswitch_plugin.recipe import overlay_path, recipe_of
from thinkswitch_plugin.run import MODES, Run, checkpoint, open_run, settings_file, versions
from thinkswitch_plugin.run.folder import of_run
from thinkswitch_plugin.run.hashes import Hashes

Template = Literal["instruct", "thinking"]


@dataclass(frozen=True)
class PairOptions:
    """What a command was asked to work on.

    Attributes:
        runs: the folder that holds the runs.
        seed, engine, overlay: where there is no run; a run has its own.
        instruct, thinking: checkpoints (folders or hub ids) in place of the run's; empty where none is given.
        out: where the results go, instead of the run's iteration.
        limit: evaluate on the first so many questions only.
        data: a folder that the evaluation sets are read from; empty is the hub.
        task: an lm-eval task, with its own token budget, instead of the recipe's; empty is the recipe's.
        cluster: a Ray cluster that evaluates what is made of the pair; empty is this machine.
    """

    domain: str
    runs: Path
    seed: int
    engine: str
    overlay: Sequence[str]
    iteration: int
    instruct: str
    thinking: str
    out: Path | None
    limit: int | None
    data: str
    task: str = ""
    cluster: str = ""

    @property
    def folder(self) -> Path:
        """Of the run."""
        return self.runs / self.domain

    @property
    def of_run(self) -> bool:
        """Whether both checkpoints are those of the run."""
        return not (self.instruct or self.thinking)

    @property
    def results(self) -> Path:
        """Where the results go: the run's iteration, or for other checkpoints a folder of `sweeps` with their names."""
        if self.of_run:
            return self.out or self.folder / f"iter-{self.iteration}"
        named = "--".join(checkpoint.folder_name(name) for name in (self.instruct, self.thinking) if name)
        return self.out or self.runs.parent / "sweeps" / self.domain / named


@dataclass(frozen=True)
class Pair:
    """Checkpoints by the names that merge configs give them, and what evaluates them.

    Attributes:
        roles: `instruct` and `thinking`; `instruct-0` (before distillation) and `base`
            (the common ancestor) where they are known.
        home: the folder that is locked.
        of_run: the pair is the one that an iteration of a run rebuilds from.
        data: a folder that the evaluation sets are read from; empty is the hub.
        task: the task of `keys`, if it is not the recipe's.
        cluster: a Ray cluster that evaluates; empty is this machine.
    """

    keys: ThinkSwitchKeys
    roles: dict[str, Path]
    seed: int
    engine: str
    out: Path
    home: Path
    iteration: int | None
    of_run: bool
    data: str = ""
    task: str = ""
    cluster: str = ""

    @property
    def allowed(self) -> Allowances:
        """The settings in which checkpoints that are merged may differ."""
        return Allowances(may_differ=tuple(self.keys.rebuild.may_differ))

    def task_hashes(self, hashes: Hashes) -> dict[str, str | None]:
        """The hash of every file that the evaluation task is made of, by its path."""
        return {str(path): hashes.of(path) for path in task_files(self.keys.evaluation.task, data=self.data)}

    def lacks(self, named: Iterable[str]) -> str | None:
        """Why a merge config that names these models cannot be made of this pair; None if it can."""
        for name in sorted(named):
            if name not in self.roles:
                hint = {
                    "base": "name the common ancestor as `thinkswitch.pair.base` in the recipe",
                    "instruct-0": "the instruct checkpoint that a run started from: use ITERATION= of a run",
                }.get(name, "models are called ./instruct, ./thinking, ./instruct-0 and ./base")
                return f"there is no ./{name}; {hint}"
        if "instruct-0" in named and self.roles["instruct-0"] == self.roles["instruct"]:
            return "./instruct-0 is ./instruct here; it needs an iteration of a run"
        return None

    def fetch(self, named: Iterable[str]) -> dict[str, Path]:
        """The folders of these models; the common ancestor may come from the hub.

        Raises `ThinkSwitchError` if it cannot be had, or cannot be merged with the pair.
        """
        found = {name: self.roles[name] for name in named}
        if "base" in found:
            found["base"], _ = checkpoint.resolve(str(found["base"]), None, "common ancestor")
            require_compatible(self.roles["thinking"], found["base"], self.allowed)
        return found

    def described(self) -> dict[str, Any]:
        """What result files say of the pair."""
        return {
            "domain": self.keys.domain,
            "iteration": self.iteration,
            "seed": self.seed,
            "engine": self.engine,
            "pair": {name: str(self.roles[name]) for name in MODES},
        }


def find_pair(options: PairOptions) -> Pair:
    """The pair to work on: any two checkpoints (both given), or that of an iteration of a run.

    The pair of iteration k is the one its thinking checkpoint is rebuilt from: the instruct
    checkpoint of iteration k and the recipe's anchor, so λ here is the recipe's λ. Giving one
    of the two replaces that one.

    Raises:
        ThinkSwitchError: no such run or iteration, other overlays than the run's, or the two checkpoints do not match.
    """
    instruct, thinking = (of_run(options.folder, getattr(options, mode), mode, options.iteration) for mode in MODES)
    options = replace(options, instruct=instruct, thinking=thinking)
    both = bool(options.instruct and options.thinking)
    roles: dict[str, Path] = {}
    if settings_file(options.folder).is_file():
        run = _run_of(options)
        keys, seed, engine = run.recipe.keys, run.seed, run.engine
        if not both:
            roles = _roles_of(run, options.iteration)
    elif both:
        keys, seed = recipe_of(options.domain, options.overlay).keys, options.seed
        engine = servers.choose(options.engine)
    else:
        raise ThinkSwitchError(
            f"{options.folder} is not a run folder; run `make iterate DOMAIN={options.domain}` first (`make pair` for "
            "ITERATION=0), or give any two checkpoints: INSTRUCT=folder THINKING=folder."
        )
    changes: dict[str, Any] = {"limit": options.limit} if options.limit else {}
    if options.task:
        changes |= {"task": options.task, "max_tokens": None}
    keys = keys.model_copy(update={"evaluation": keys.evaluation.model_copy(update=changes)})
    if keys.pair.base:
        roles["base"] = Path(resolve_seed(keys.pair.base, seed))
    for name, given in (("instruct", options.instruct), ("thinking", options.thinking)):
        if given:
            roles[name], _ = checkpoint.resolve(given, None, name)
    for role in roles.values():
        checkpoint.require_weights(role)
    if roles["instruct"].resolve() == roles["thinking"].resolve():
        raise ThinkSwitchError(
            f"Both checkpoints are {roles['instruct']}, so there is nothing between them; of a hybrid's run, choose an "
            "iteration from 1 on (ITERATION=1)."
        )
    iteration = options.iteration if options.of_run else None
    home = options.folder if options.of_run else options.results
    of = (options.of_run, options.data, options.task, options.cluster)
    pair = Pair(keys, roles, seed, engine, options.results, home, iteration, *of)
    require_compatible(roles["instruct"], roles["thinking"], pair.allowed)
    return pair


def _run_of(options: PairOptions) -> Run:
    run = open_run(options.folder)
    overlays = tuple(overlay_path(name) for name in options.overlay)
    if overlays and overlays != tuple(run.recipe.overlays):
        raise ThinkSwitchError(
            f"{run.folder} was begun with OVERLAY='{' '.join(map(str, run.recipe.overlays))}', which applies here as well; "
            "remove OVERLAY=, or select another run."
        )
    if not (run.iteration(0) / "pair.json").is_file():
        raise ThinkSwitchError(f"{run.folder} has no starting pair yet; run `make pair DOMAIN={options.domain}` first.")
    return run


def _roles_of(run: Run, iteration: int) -> dict[str, Path]:
    """The checkpoints that an iteration rebuilds from."""
    thinking = Path(run.anchor(max(iteration, 1)))
    return {
        "instruct-0": Path(run.checkpoint("instruct", 0)),
        "instruct": run.made("instruct", iteration),
        "thinking": thinking,
    }


def few_questions(pair: Pair) -> str:
    """For a candidate's folder: `-n20` where only the first 20 questions are asked, so that a trial spoils nothing."""
    limit = pair.keys.evaluation.limit
    return f"-n{limit}" if limit else ""


def of_settings(pair: Pair, template: str) -> str:
    """For a job's folder: a task or a template that is not the usual one, so that neither replaces the other's results."""
    task = f"-{pair.task}" if pair.task else ""
    return task + ("" if template == "instruct" else f"-template-{template}")


def write_results(path: Path, value: dict[str, Any]) -> None:
    """Write a job's results with the versions that made them."""
    files.write_json(path, {**value, "versions": versions()})
