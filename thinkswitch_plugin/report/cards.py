"""Model cards in the form the Hugging Face hub renders: parents, data, recipe, merge config, scores.

A card is written with its checkpoint and completed with the scores by the report. It is documentation: no
stamp holds it (`hashes.CARD`), so completing it makes nothing run again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from thinkswitch_plugin import console, files
from thinkswitch_plugin.args import is_local, resolve_seed
from thinkswitch_plugin.data.task_files import evaluation_set
from thinkswitch_plugin.errors import first_line
from thinkswitch_plugin.report import tables, templates
from thinkswitch_plugin.run import MODES, Run, versions
from thinkswitch_plugin.run.hashes import CARD, Hashes, read_stamp

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

RESULTS = "<!-- thinkswitch: results -->"  # what follows is written anew by every report
LICENCE_KEYS = ("license", "license_name", "license_link")
ABOUT = {
    "instruct": "Answers directly. The answers of a thinking checkpoint, without their traces, were distilled into it",
    "thinking": "Writes a trace before it answers. Interpolated from a distilled instruct checkpoint and a thinking one",
}


def write_card(run: Run, k: int, mode: str, folder: Path, merge_yaml: str | None = None) -> None:
    """Write the card of a checkpoint of iteration k into `folder`, as yet without scores."""
    from huggingface_hub import ModelCardData

    parents, keys, on_hub = parents_of(run, k, mode), run.recipe.keys, hub_pair(run)
    ancestors = [on_hub[name]["name"] for name in (MODES if mode == "thinking" else ("instruct",)) if name in on_hub]
    relation = "merge" if mode == "thinking" else "finetune"
    data = ModelCardData(
        base_model=ancestors or None,
        base_model_relation=relation if ancestors else None,
        datasets=[keys.prompts.hub] if keys.prompts.hub else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["thinkswitch", keys.domain, *(["mergekit", "merge"] if mode == "thinking" else ["axolotl", "qlora"])],
        **licence(Path(parent) for parent in parents),
    )
    merge = ""
    if merge_yaml:
        for found in on_hub.values():
            merge_yaml = merge_yaml.replace(str(found["path"]), str(found["name"]))
        merge = f"## Merge\n\n```yaml\n{merge_yaml.strip()}\n```\n\n"
    title = f"{keys.domain}: {mode} checkpoint after iteration {k}"
    about = f"{ABOUT[mode]}, by [ThinkSwitch](https://arxiv.org/abs/2606.01080)."
    rest = f"{merge}{RESULTS}\n\nNot evaluated yet.\n"
    files.write_text(folder / CARD, str(compose(data, title, about, facts(run, k, mode, parents), rest)))


def compose(data: ModelCardData, title: str, about: str, rows: Mapping[str, Any], rest: str = "") -> ModelCard:
    """A card: metadata, a title, what it is in a sentence, a table of facts."""
    from huggingface_hub import ModelCard

    table = "".join(f"| {key} | {value} |\n" for key, value in rows.items())
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{about}\n\n| | |\n|---|---|\n{table}\n{rest}")


def complete_cards(run: Run) -> None:
    """Put the scores of `report.json` into the cards of all checkpoints, also of those whose weights were pruned.

    A card that cannot be read is reported and left unchanged.
    """
    from huggingface_hub import ModelCard

    found = files.read_json(run.folder / "report.json")
    for k in range(1, run.iterations + 1):
        for mode in MODES:
            path = run.iteration(k) / mode / CARD
            if not path.is_file():
                continue
            try:
                card = ModelCard.load(path)
            except (ValueError, TypeError, yaml.YAMLError) as error:
                console.say(f"  {path} is left as it is: its metadata cannot be read ({first_line(error)})")
                continue
            figures = found["iterations"][k][mode]
            card.data.model_name = f"thinkswitch-{run.recipe.keys.domain}-{mode}-{k}"
            card.data.eval_results = eval_results(run.recipe.keys.evaluation.task, figures, tables.score_of(found))
            card.data.metrics = [tables.score_of(found)]
            card.text = f"{card.text.partition(RESULTS)[0].rstrip()}\n\n{RESULTS}\n\n{results(found, k, mode)}"
            files.write_text(path, str(card))


def eval_results(task: str, figures: dict[str, Any], score: str = "accuracy") -> list[EvalResult]:
    """A checkpoint's figures as the hub's model index holds them."""
    from huggingface_hub import EvalResult

    k = figures["k"]
    dataset, name = evaluation_set(task)
    of_mean = {"k": k, "questions": figures["n"], "ci95": figures["ci95"]}
    shown: list[tuple[str, str, str, dict[str, Any] | None]] = [(score, f"Mean@{k}", "mean@k", of_mean)]
    if k > 1:
        shown += [("pass@k", f"Pass@{k}", "pass@k", {"k": k}), ("vote@k", f"Vote@{k}", "vote@k", {"k": k})]
    shown += [("tokens", "Tokens a completion", "tokens", None), ("think_ratio", "Think ratio", "think_ratio", None)]
    return [
        EvalResult(
            task_type="text-generation",
            task_name=task,
            dataset_type=dataset,
            dataset_name=name,
            metric_type=kind,
            metric_name=metric,
            metric_value=round(figures[name_in_report], 6),
            metric_args=arguments,
        )
        for kind, metric, name_in_report, arguments in shown
    ]


def results(found: dict[str, Any], k: int, mode: str) -> str:
    """The results section of a card: this checkpoint in a sentence, and the loop up to its iteration."""
    upto = {**found, "iterations": found["iterations"][: k + 1]}
    entry = upto["iterations"][k]
    return templates.markdown(
        "card_results.md.j2",
        s=entry[mode],
        against_start=entry["paired"][mode][-1]["sentence"],
        header=tables.header(upto),
        rows=tables.rows(upto),
    )


def parents_of(run: Run, k: int, mode: str) -> list[str]:
    """The checkpoints that one of iteration k is made from, as folders."""
    if mode == "instruct":
        return [run.checkpoint("instruct", k - 1)]
    return [str(run.iteration(k) / "instruct"), run.anchor(k)]


def hub_pair(run: Run) -> dict[str, dict[str, Any]]:
    """The checkpoints of the starting pair that come from the hub, as `pair.json` holds them, by mode."""
    pair = files.read_json(run.iteration(0) / "pair.json")
    return {mode: pair[mode] for mode in MODES if not is_local(str(pair[mode]["name"]))}


def licence(parents: Iterable[Path]) -> dict[str, Any]:
    """The licence of the parents by their cards, where all of them name the same; else nothing."""
    from huggingface_hub import ModelCard

    named: list[dict[str, Any]] = []
    for parent in parents:
        try:
            data = ModelCard.load(parent / CARD, ignore_metadata_errors=True).data
        except (OSError, ValueError, TypeError, yaml.YAMLError):
            return {}
        named.append({key: str(data[key]) for key in LICENCE_KEYS if data.get(key)})
    same = [key for key in LICENCE_KEYS if len({data.get(key) for data in named}) == 1]
    # Each parent may link to its own copy of one licence; another name makes it another licence.
    return {key: named[0][key] for key in same if key in named[0]} if {"license", "license_name"} <= set(same) else {}


def facts(run: Run, k: int, mode: str, parents: Sequence[str]) -> dict[str, Any]:
    """The table of a card: from what and how it was made, each file with the start of its sha256."""
    hashes = Hashes(run.folder)

    on_hub = {str(found["path"]): f"{found['name']} at {found['revision']}" for found in hub_pair(run).values()}

    def named(path: str | Path) -> str:
        return f"`{on_hub.get(str(path), path)}` (sha256 {str(hashes.of(Path(path)))[:16]}…)"

    here, keys = run.iteration(k), run.recipe.keys.prompts
    prompts = named(resolve_seed(keys.path, run.seed)) if keys.path else f"{keys.hub} of the hub"
    if not keys.path:
        stamp = read_stamp(here / ".stamps" / "requests.json") or {}
        prompts += f" at {(stamp.get('notes') or {}).get('prompts_revision')}"
    how = {
        "instruct": {"Distilled with": f"axolotl QLoRA, `{here / 'axolotl.yaml'}`, merged in full precision"},
        "thinking": {"Rebuilt with": "mergekit, the config below"},
    }[mode]
    found = {
        "Domain": run.recipe.keys.domain,
        "Iteration": k,
        "Seed": run.seed,
        **how,
        "Parents": ", ".join(named(parent) for parent in parents),
        "Recipe": ", ".join(named(path) for path in (run.recipe.path, *run.recipe.overlays)),
        "Prompts": prompts,
        "Pairs": named(here / "pairs.jsonl"),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }
    hashes.save()
    return found
