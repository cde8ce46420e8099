"""Before the first stage: find every problem that can be found without doing any work."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from thinkswitch_plugin import console, files, places
from thinkswitch_plugin.args import resolve_seed
from thinkswitch_plugin.data.prompts import made_with_pair, prompts_of_iteration
from thinkswitch_plugin.engine_args import identity
from thinkswitch_plugin.engines import servers
from thinkswitch_plugin.environment import has_cuda
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.judging.evaluation import uses_server
from thinkswitch_plugin.loop.reference import require_reference
from thinkswitch_plugin.merging.config import read_config, set_lambda
from thinkswitch_plugin.recipe import Recipe, check_axolotl_keys, load_recipe, overlay_path, recipe_of, recipe_path
from thinkswitch_plugin.run import MODES, NOTHING_MORE, Given, Run, forget_stale, locked, settings_file
from thinkswitch_plugin.run.folder import Settings, read_settings
from thinkswitch_plugin.run.hashes import Hashes
from thinkswitch_plugin.run.prune import iterations_kept, prune
from thinkswitch_plugin.run.stamp import once


def begin_run(
    domain: str,
    runs: Path,
    seed: int,
    engine: str,
    iterations: int,
    overlays: Sequence[str] = (),
    given: Given = NOTHING_MORE,
) -> Run:
    """Check the settings, write `run.json`, delete stale stamps, and print what is left to do.

    Raises `ThinkSwitchError`: no such recipe, a wrong key, a file that is missing, or a
    run folder that was begun with another seed or engine. Nothing is written then.
    """
    iterations_kept(given.keep)
    path = recipe_path(domain)
    folder = runs / domain
    before = read_settings(settings_file(folder)) if settings_file(folder).is_file() else None
    recipe = _recipe_of_run(path, folder, before, [places.named(overlay_path(name)) for name in overlays])
    chosen = before.engine if before and engine == "auto" else servers.choose(engine)
    if before and (before.seed, identity(before.engine)) != (seed, identity(chosen)):
        raise ThinkSwitchError(
            f"{folder} was begun with SEED={before.seed} ENGINE={before.engine}; "
            f"use another folder for this run, such as RUNS={runs}-seed{seed}."
        )
    run = Run(folder, recipe, seed, chosen, iterations, given)
    require_gpu(recipe)
    _check_files(run)
    if uses_server(recipe.keys.evaluation, chosen) and servers.vllm_python() is None:
        raise ThinkSwitchError(f"{path}: `thinkswitch.evaluation.backend` asks for a server. {servers.NO_VLLM}")
    hashes = Hashes(folder)
    read = {"inputs": {str(p): hashes.of(p) for p in (path, *recipe.overlays)}}
    once(folder / ".stamps" / "recipe-checked.json", read, (), lambda _: check_axolotl_keys(recipe), part=None)
    with locked(run.folder):
        settings = Settings(
            domain=domain,
            recipe=places.named(path),
            overlays=[places.named(p) for p in recipe.overlays],
            seed=seed,
            engine=chosen,
            iterations=iterations,
        )
        files.write_json(settings_file(folder), settings.model_dump())
        total, waiting = forget_stale(run)
        prune(run, Hashes(folder))
    if waiting:
        done = f"{total - len(waiting)} of {total} stages done, next is {waiting[0].title}"
        console.say(f"{folder}: seed {seed}, engine {chosen}; {done}")
    else:
        console.say(f"Nothing to do: {folder} has all {iterations} iterations; see {folder / 'report.html'}")
    return run


def _recipe_of_run(path: Path, folder: Path, before: Settings | None, overlays: list[str]) -> Recipe:
    begun = [places.opened(name) for name in before.overlays] if before else []
    extra = [places.opened(name) for name in overlays] or begun
    if before and [file.resolve() for file in begun] != [file.resolve() for file in extra]:
        raise ThinkSwitchError(
            f"{folder} was begun with OVERLAY='{' '.join(before.overlays)}'; use another folder for this run: RUNS=."
        )
    recipe = load_recipe(path, tuple(extra))
    if recipe.keys.domain != folder.name:
        raise ThinkSwitchError(
            f"{path}: `thinkswitch.domain` is {recipe.keys.domain!r}, but the file is named {folder.name}; make the two the same."
        )
    if recipe.keys.perception:
        raise ThinkSwitchError(
            f"{path}: `thinkswitch.perception` belongs to `make adaptive`; the loop's checkpoints have no such module: "
            "remove it, or move it to an overlay that only `make adaptive` uses."
        )
    return recipe


def require_gpu(recipe: Recipe) -> None:
    """Raise `ThinkSwitchError` if the recipe needs a GPU and there is none."""
    if recipe.keys.needs.gpu_gb and not has_cuda():
        raise ThinkSwitchError(
            f"{recipe.path} needs a CUDA GPU with {recipe.keys.needs.gpu_gb:g} GB, and this machine has none; "
            "`make iterate DOMAIN=arithmetic` runs the same loop on a CPU with a pair made on the spot."
        )


def _check_files(run: Run) -> None:
    """Raise `ThinkSwitchError` unless the prompts can be read and the merge config takes every λ that may be tried."""
    recipe, keys = run.recipe.path, run.recipe.keys
    config = places.find(keys.rebuild.config)
    if not config.is_file():
        raise ThinkSwitchError(
            f"{recipe}: `thinkswitch.rebuild.config` names {keys.rebuild.config}, which does not exist; name a file of merge_configs/."
        )
    if keys.prompts.path and not made_with_pair(keys):
        path = Path(resolve_seed(keys.prompts.path, run.seed))
        if not path.exists():
            raise ThinkSwitchError(
                f"{recipe}: `thinkswitch.prompts.path` names {path}, which does not exist; put it there or name another."
            )
        prompts_of_iteration(keys.prompts, run.seed, 1)
    require_reference(run.recipe, run.seed)
    values = read_config(config)
    for weight in (keys.rebuild.lambda_, *keys.rebuild.lambda_steps):
        set_lambda(values, weight, config)


def evaluate_model(domain: str, model: str, engine: str, out: Path, overlays: Sequence[str] = ()) -> None:
    """Evaluate any checkpoint with a domain's task, in both modes if the recipe tells them apart, and print its figures."""
    from thinkswitch_plugin.judging.evaluation import evaluate_checkpoint
    from thinkswitch_plugin.judging.figures import summarize
    from thinkswitch_plugin.judging.samples import samples_of
    from thinkswitch_plugin.judging.served import Served
    from thinkswitch_plugin.run import checkpoint

    keys = recipe_of(domain, overlays).keys
    folder, _ = checkpoint.resolve(model, None, "evaluated")
    target = out / domain / checkpoint.folder_name(model)
    modes = MODES if any(map(keys.pair.arguments, MODES)) else ("",)
    with locked(target), closing(Served(keys.engine)) as served:
        for mode in modes:
            subject = checkpoint.Subject(str(folder), keys.pair.arguments(mode) if mode else {})
            place, log = target / mode, target / "logs" / f"{folder.name}{mode and f'-{mode}'}.log"
            evaluate_checkpoint(subject, place / "lm-eval", keys, servers.choose(engine), log=log, served=served)
            figures = summarize(samples_of(place / "lm-eval", keys, str(folder)))
            files.write_json(place / "figures.json", figures)
            if mode:
                console.say(f"{mode} mode:")
            for name, value in figures.items():
                console.say(f"  {name:12} {value}")
