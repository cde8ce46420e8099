"""What `make labels` is about: a recipe, a seed, an engine, and the generations to learn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from thinkswitch_plugin.args import resolve_seed
from thinkswitch_plugin.data.formats import POST, PRE, Format
from thinkswitch_plugin.engines import servers
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.perception.training import TYPES
from thinkswitch_plugin.recipe import Recipe, recipe_of
from thinkswitch_plugin.run import Run, open_run, settings_file


@dataclass(frozen=True)
class LabelJob:
    """What is labelled, from which generations, and how.

    Attributes:
        home: RUNS/DOMAIN, which is locked.
        generations: batch output of a thinking checkpoint, `requests.jsonl` beside it.
        formats: of the baselines that are trained; the label needs post-thinking alone.
        cluster: a Ray cluster whose machines train the baselines; empty for this machine.
    """

    recipe: Recipe
    seed: int
    engine: str
    home: Path
    generations: Path
    folds: int
    formats: tuple[Format, ...] = (POST,)
    cluster: str = ""

    @property
    def work(self) -> Path:
        """The folder of everything adaptive of this seed."""
        return self.home / "adaptive" / f"seed-{self.seed}"

    @property
    def requests(self) -> Path:
        """What the generations answer."""
        return self.generations.with_name("requests.jsonl")


def parse_formats(text: str) -> tuple[Format, ...]:
    """`FORMATS="post pre"` as formats, post first. Raises `ThinkSwitchError` for any other word."""
    words = text.replace(",", " ").split() or [POST]
    if unknown := [word for word in words if word not in TYPES]:
        raise ThinkSwitchError(f'FORMATS="{text}": {unknown[0]!r} is not a format; use post, or post and pre.')
    return (POST, PRE) if PRE in words else (POST,)


def find_job(
    name: str,
    runs: Path,
    *,
    seed: int,
    engine: str,
    overlays: Sequence[str] = (),
    folds: int | None = None,
    generations: str = "",
) -> LabelJob:
    """The job for a domain's recipe: its settings checked, its generations found (or made, for a demo domain).

    Args:
        folds: K; None takes the recipe's.
        generations: path of a generations.jsonl; empty takes the recipe's, else iteration 1 of RUNS/DOMAIN.

    Raises:
        ThinkSwitchError: no such recipe, too few folds, or no generations yet.
    """
    home = runs / name
    run = open_run(home) if settings_file(home).is_file() else None
    recipe = run.recipe if run and not overlays else recipe_of(name, overlays)
    keys = recipe.keys.adaptive
    count = keys.folds if folds is None else folds
    if count < 2:
        raise ThinkSwitchError(
            f"FOLDS={count}: give 2 or more; each fold is labelled by a baseline that never saw its questions."
        )
    chosen = run.engine if run and engine == "auto" else servers.choose(engine)
    if chosen not in ("vllm", "embedded"):
        raise ThinkSwitchError(
            f"ENGINE={chosen}: a server of your own does not have the adapters that are trained here; "
            "use ENGINE=vllm or ENGINE=embedded."
        )
    named = generations or (resolve_seed(keys.generations, seed) if keys.generations else "")
    found = Path(named) if named else _of_run(run, home, name, seed)
    job = LabelJob(recipe, seed, chosen, home, found, count)
    if recipe.keys.pair.demo:
        from thinkswitch_plugin.demo.cache import ensure

        ensure(recipe.keys, seed)
    for path in (job.generations, job.requests):
        if not path.exists():
            raise ThinkSwitchError(
                f"{path} does not exist; labels need a generations.jsonl with its requests.jsonl in the same folder."
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
    return run.generations(1)
