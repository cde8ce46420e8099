"""The stages of the loop: what each reads, which engine it calls, what it writes.

Each function does the work of one row of `run.TABLE` for iteration k; `run.execute`
decides whether it is needed and keeps its stamp. Follow one prompt: `write_requests`
-> `answer_requests` -> `build_pairs` -> `train` -> `merge_lora` -> `rebuild` -> `evaluate`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinkswitch_plugin import console, files
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.recipe import iteration_config
from thinkswitch_plugin.report import cards
from thinkswitch_plugin.run import MODES, Run, checkpoint, processes

if TYPE_CHECKING:
    from thinkswitch_plugin.judging.served import Served


def prepare_pair(run: Run, _k: int = 0) -> None:
    """Download (or, for the demo domain, train) the starting pair and check that the two belong together.

    Writes `iter-0/pair.json`: name, folder and hub commit of both checkpoints.
    """
    from thinkswitch_plugin.merging.compatibility import Allowances, require_compatible

    keys = run.recipe.keys.pair
    if keys.demo:
        from thinkswitch_plugin.demo import cache

        cache.ensure(run.recipe.keys, run.seed)
    clean_prompts(run, 1)  # `write_requests` asks again, but after downloads and hours of evaluating the starting pair
    found: dict[str, dict[str, Any]] = {}
    for mode, revision in (("instruct", keys.revision_instruct), ("thinking", keys.revision_thinking)):
        name = run.checkpoint(mode, 0)
        folder, commit = checkpoint.resolve(name, revision, mode)
        found[mode] = {"name": name, "path": str(folder), "revision": commit}
    allowed = Allowances(may_differ=tuple(run.recipe.keys.rebuild.may_differ))
    require_compatible(Path(found["instruct"]["path"]), Path(found["thinking"]["path"]), allowed)
    if not keys.demo:
        from thinkswitch_plugin.training import distil

        distil.require_switch(keys, {mode: found[mode]["path"] for mode in found})
        distil.require_trainable(run.recipe, found["instruct"]["path"])
    files.write_json(run.iteration(0) / "pair.json", found)


def clean_prompts(run: Run, k: int) -> tuple[list[tuple[str, str]], str | None]:
    """The prompts of iteration k and their hub commit; see `prompts_of_iteration`.

    Raises `ThinkSwitchError` if one of them is an evaluation question.
    """
    from thinkswitch_plugin.data.contamination import require_uncontaminated
    from thinkswitch_plugin.data.prompts import prompts_of_iteration

    prompts, commit = prompts_of_iteration(run.recipe.keys.prompts, run.seed, k)
    require_uncontaminated(prompts, run.recipe.keys.evaluation)
    return prompts, commit


def write_requests(run: Run, k: int) -> dict[str, Any]:
    """Prompts -> `requests.jsonl`, asked of the thinking checkpoint of iteration k − 1."""
    from thinkswitch_plugin.data import distributions
    from thinkswitch_plugin.data.prompts import ask_in_mode

    teacher, out, keys = run.checkpoint("thinking", k - 1), run.iteration(k) / "requests.jsonl", run.recipe.keys
    prompts, commit = clean_prompts(run, k)
    more = distributions.request(keys.distribution.top_k) if keys.loss == "distribution" else None
    count = ask_in_mode(out, prompts, teacher, "thinking", keys, run.seed, more)
    console.say(f"  {len(prompts)} prompts, {count} requests")
    return {"prompts": len(prompts), "requests": count, "prompts_revision": commit}


def answer_requests(run: Run, k: int) -> dict[str, Any]:
    """The thinking checkpoint answers: `requests.jsonl` -> `generations.jsonl`."""
    from thinkswitch_plugin.engines.generate import generate

    keys, here = run.recipe.keys, run.iteration(k)
    report = generate(
        here / "requests.jsonl",
        run.generations(k),
        run.checkpoint("thinking", k - 1),
        run.engine,
        keys.engine,
        retry_max_tokens=keys.retry_budget,
        log=here / "logs" / "generate.log",
    )
    console.say(
        f"  {report.answered} answered, {report.already_stored} stored before, {report.retried} retried, "
        f"{report.failed} failed, {report.tokens:,} tokens at {report.tokens_per_second:,.0f} a second"
    )
    return vars(report)


def build_pairs(run: Run, k: int) -> dict[str, Any]:
    """Traces removed: `generations.jsonl` -> `pairs.jsonl` and the counts in `pairs.json`."""
    from thinkswitch_plugin.data.pairs import write_pairs

    here = run.iteration(k)
    report = write_pairs(
        here / "requests.jsonl",
        run.generations(k),
        here / "pairs.jsonl",
        keys=run.recipe.keys.answers,
        convention=run.recipe.keys.convention,
    )
    console.say(f"  {report.summary()}")
    return report.as_json()


def train(run: Run, k: int) -> dict[str, Any]:
    """axolotl QLoRA on the pairs: writes `axolotl.yaml` and `adapter/`.

    Goes on from the trainer's last checkpoint where a killed attempt with the same inputs left one.
    """
    here = run.iteration(k)
    return train_adapter(run, pairs=here / "pairs.jsonl", base_model=run.checkpoint("instruct", k - 1), here=here)


def train_adapter(run: Run, *, pairs: Path, base_model: str, here: Path) -> dict[str, Any]:
    """Train one adapter on pairs into `here/adapter`; see `distil.train`."""
    from thinkswitch_plugin.training import distil

    keys = run.recipe.keys
    config = iteration_config(run.recipe, base_model=base_model, pairs=pairs, here=here, seed=run.seed)
    return distil.train(config, here, options=keys.axolotl_args, minimum=keys.min_adapter_change)


def merge_lora(run: Run, k: int) -> None:
    """axolotl merges the adapter in full precision: writes the complete checkpoint `instruct/`."""
    here = run.iteration(k)
    merge_adapter(
        here,
        run.checkpoint("instruct", k - 1),
        here / "instruct",
        on_cpu=run.recipe.keys.merge_on == "cpu",
        card=lambda folder: cards.write_card(run, k, "instruct", folder),
    )


def merge_adapter(
    here: Path,
    parent: str,
    out: Path,
    *,
    on_cpu: bool = False,
    rounded: bool = False,
    card: Callable[[Path], None] | None = None,
) -> None:
    """Merge `here/adapter` into `parent` with axolotl and write the checkpoint `out`, in the dtype of `parent`.

    Args:
        card: writes the model card into the folder that is given to it.
        on_cpu: keep the GPU out of it, where its memory cannot hold the model.
        rounded: use axolotl's default merge, which passes every matrix through NF4.
    """
    from thinkswitch_plugin.merging.lora import (
        in_small_files,
        merge_config,
        read_by_merge,
        require_same_layout,
        restore,
    )
    from thinkswitch_plugin.training import distil

    building = files.temporary_sibling(out.with_name(f"{out.name}-merge"))
    files.remove(building)
    config, adapter = here / "merge-lora.yaml", here / "adapter"
    trained = read_by_merge(files.read_yaml(here / "axolotl.yaml"))
    told = {**trained, "merge_method": "memory_efficient"} if rounded else merge_config(trained, adapter, Path(parent))
    if told["merge_method"] == "memory_efficient":
        told["base_model"] = str(in_small_files(Path(parent), building / "parent"))
    files.write_yaml(config, told)
    processes.run_logged(
        ["axolotl", "merge-lora", config, "--lora-model-dir", adapter, "--output-dir", building],
        here / "logs" / "merge-lora.log",
        env=distil.ENGINE_ENV | ({"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {}),
        title="axolotl merge-lora",
    )
    files.write_yaml(config, {**told, "base_model": parent})  # so that it merges again without the copy
    with files.atomic_folder(out) as folder:
        for file in (building / "merged").iterdir():
            file.replace(folder / file.name)
        restore(Path(parent), folder)
        require_same_layout(Path(parent), folder)
        checkpoint.adopt_mode(Path(parent), folder)
        if card is not None:
            card(folder)
    files.remove(building)


def rebuild(run: Run, k: int) -> None:
    """mergekit interpolates the new thinking checkpoint; it is accepted only if it still thinks."""
    from thinkswitch_plugin.loop.rebuild import Check, rebuild_thinking

    here, first, keys = run.iteration(k), run.iteration(1), run.recipe.keys
    check = Check(
        here / "requests.jsonl",
        reference_requests=first / "requests.jsonl",
        reference=run.generations(1),
        engine=run.engine,
        engine_keys=keys.engine,
        logs=here / "logs",
        convention=keys.convention,
        retry_max_tokens=keys.retry_budget,
    )

    def card(folder: Path, text: str) -> None:
        cards.write_card(run, k, "thinking", folder, text)

    result = rebuild_thinking(here / "instruct", Path(run.anchor(k)), keys.rebuild, here / "thinking", check, card)
    files.write_json(here / "rebuild.json", result)


def evaluate(run: Run, k: int, mode: str, served: Served | None = None) -> None:
    """lm-eval evaluates one checkpoint (a hybrid in both modes): its files, and the stored answers, under `eval/`.

    Args:
        served: the vLLM that answers, if it is to answer for more than this checkpoint.

    Raises `ThinkSwitchError` as `evaluate_checkpoint`, and if a guard task fell by more than the recipe allows.
    """
    from thinkswitch_plugin.judging import guard
    from thinkswitch_plugin.judging.evaluation import evaluate_checkpoint

    here, keys = run.iteration(k), run.recipe.keys
    for name, subject in run.subjects(mode, k).items():
        log, out = here / "logs" / f"eval-{name}.log", here / "eval" / name
        evaluate_checkpoint(subject, out, keys, run.engine, log=log, resume=True, served=served)
        guard.require_kept(run, k, name)


def report(run: Run, k: int) -> None:
    """What changed up to iteration k: writes `report.html`, `report.json`, `report.md` and the pictures."""
    from thinkswitch_plugin.report import write_report

    write_report(run)
    cards.complete_cards(run)


def require_finished(run: Run, k: int) -> None:
    """Raise `ThinkSwitchError` unless iteration k has both checkpoints."""
    for mode in MODES:
        if not Path(run.checkpoint(mode, k)).is_dir():
            raise ThinkSwitchError(
                f"Iteration {k} of {run.folder} has no {mode} checkpoint yet; run `make iterate` first."
            )
        checkpoint.require_weights(Path(run.checkpoint(mode, k)))
