"""Evaluate a set of merge configs on one pair: layer ranges, modules, baselines, or a user's own.

A row of the table is an ordinary mergekit YAML of `merge_configs/`; a new file is a new row.

    iter-1/merges/layers/candidates/2-first/…    lm-eval's samples, candidate.json
    iter-1/merges/layers/merges.json .md         the table (and the picture of modules/)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from thinkswitch_plugin import console, files
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.judging.evaluation import Sampling
from thinkswitch_plugin.merging.config import (
    NAME,
    allow,
    fit_layers,
    named_models,
    place_models,
    read_config,
    set_lambda,
)
from thinkswitch_plugin.merging.settings import layers_of
from thinkswitch_plugin.report.tables import interval
from thinkswitch_plugin.search.candidates import Candidate, bench_of, evaluate_all
from thinkswitch_plugin.search.pair import Pair, Template, few_questions, of_settings, write_results

SETTABLE = (NAME, "slerp", "linear")  # methods that have a λ


def collect(paths: Sequence[Path]) -> list[Path]:
    """Every YAML of the files and folders given. Raises `ThinkSwitchError` if there is none."""
    found: list[Path] = []
    for path in paths:
        inside = sorted((*path.glob("*.yaml"), *path.glob("*.yml"))) if path.is_dir() else [path]
        if not inside or not inside[0].is_file():
            raise ThinkSwitchError(
                f"{path} is neither a merge config nor a folder of merge configs (*.yaml); merge_configs/ has some."
            )
        found += inside
    return found


def judge_configs(
    pair: Pair, paths: Sequence[Path], *, name: str, weight: float | None, sampling: Sampling, template: Template
) -> None:
    """Evaluate every config, with instruct and thinking alone beside them, and write the table.

    A config that names a checkpoint this pair does not have is left out, with a line that says why.

    Args:
        name: the folder under `merges/` that the results go to.
        weight: λ put into every config that has one; None leaves it as the file says.
        template: whose tokenizer and chat template all candidates get.

    Raises:
        ThinkSwitchError: no config can be made of the checkpoints there are, or one fails.
    """
    layers = layers_of(pair.roles["thinking"])
    found, roles = prepare(pair, paths, weight, layers)
    used = sorted(set().union(*(named_models(config) for _, config in found)))
    folders = {role: str(roles[role]) for role in used}
    drawn = (f"-lambda-{weight:g}" if weight is not None else "") + sampling.slug + few_questions(pair)
    candidates = [
        Candidate(f"candidates/{path.stem.replace(' ', '-')}{drawn}", place_models(config, folders), config, sampling)
        for path, config in found
    ]
    work = pair.out / "merges" / (name + of_settings(pair, template))
    with bench_of(pair, work, template, used) as bench:
        stored = evaluate_all(bench, candidates, f"{name}: {len(candidates)} merges")
    rows = [
        {
            "name": path.stem,
            "about": first_comment(path),
            "layers": interpolated_layers(config, layers),
            "modules": {key: config["parameters"].get(f"lambda_{key}") for key in ("attention", "ffn")}
            if config["merge_method"] == NAME
            else None,
            "lambda": (config.get("parameters") or {}).get("lambda"),
            "method": config["merge_method"],
            **one["figures"],
            "seconds": one["seconds"],
        }
        for (path, config), one in zip(found, stored, strict=True)
    ]
    about = {"name": name, "template": template, "model_layers": layers}
    publish({**pair.described(), **about, "merges": rows}, work)


def prepare(
    pair: Pair, paths: Sequence[Path], weight: float | None, layers: int
) -> tuple[list[tuple[Path, dict[str, Any]]], dict[str, Path]]:
    """Both checkpoints alone and every config that can be made of the pair; the folders of all models that they name."""
    may_differ = pair.keys.rebuild.may_differ
    ends = {"merge_method": "linear", "models": [{"model": "./instruct"}, {"model": "./thinking"}]}
    alone = allow({**ends, "parameters": {"normalize": False}}, may_differ)
    found = [(Path(f"{mode} alone"), set_lambda(alone, w, Path())) for mode, w in (("instruct", 0), ("thinking", 1))]
    roles = pair.roles
    for path in collect(paths):
        config = allow(fit_layers(read_config(path), layers), may_differ)
        if weight is not None and has_lambda(config):
            config = set_lambda(config, weight, path)
        if reason := pair.lacks(named_models(config)):
            console.say(f"  left out: {path.stem} ({reason})")
            continue
        roles = {**roles, **pair.fetch(named_models(config))}
        found.append((path, config))
    if len(found) == 2:
        raise ThinkSwitchError(
            "None of these merge configs can be applied to this pair; use ITERATION= of a run with finished iterations."
        )
    return found, roles


def publish(result: dict[str, Any], work: Path) -> None:
    """Write `merges.json`, `merges.md` and, for all nine choices of modules, their picture; print the table."""
    write_results(work / "merges.json", result)
    files.write_text(work / "merges.md", markdown(result))
    console.print_table(title_of(result), header(result), table_rows(result), left=header(result)[:1])
    pictures = ""
    if grid := module_grid(result):
        from thinkswitch_plugin.report.pictures import save
        from thinkswitch_plugin.report.search_pictures import modules_picture

        save(modules_picture(grid, title_of(result)), work / "modules")
        pictures = ", modules.png, modules.svg"
    console.say(f"  {work / 'merges.json'}, merges.md{pictures}")


def has_lambda(config: dict[str, Any]) -> bool:
    """Whether one number λ can be put into a config: its method has one, and it mixes the pair alone."""
    pair = {"instruct", "thinking"}
    return (
        config.get("merge_method") in SETTABLE
        and named_models(config) == pair
        and (config["merge_method"] == NAME or "slices" not in config)
    )


def first_comment(path: Path) -> str:
    """A config's first line, if it is a comment."""
    if not path.is_file():
        return ""
    line = path.read_text(encoding="utf-8").split("\n", 1)[0]
    return line.removeprefix("#").strip() if line.startswith("#") else ""


def interpolated_layers(config: dict[str, Any], layers: int) -> str:
    """`0–11, 24–35`: the layers that are not instruct's alone; empty for a config without slices."""
    if "slices" not in config:
        return ""
    mixed = [
        piece["sources"][0]["layer_range"]
        for piece in config["slices"]
        if (piece.get("parameters") or {}).get("lambda") != 0
    ]
    return ", ".join(f"{a}" if b == a + 1 else f"{a}–{b - 1}" for a, b in mixed) or "none"


def module_grid(result: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """Rows of `modules/` by (attention, FFN), each `instruct`, `mixed` or `thinking`; empty if it is none."""
    words = {None: "mixed", 0: "instruct", 1: "thinking"}
    found = {}
    for row in result["merges"]:
        if row["modules"] and not row["layers"]:
            where = tuple(words.get(row["modules"][key], "mixed") for key in ("attention", "ffn"))
            found[(where[0], where[1])] = row
    return found if len(found) == 9 else {}


def header(result: dict[str, Any]) -> list[str]:
    """The columns of the paper's layer table, with an interval; Pass@k at every k there is."""
    k = result["merges"][0]["k"]
    passed = [f"Pass@{j}" for j in result["merges"][0]["pass"]]
    first = "layers interpolated" if any(row["layers"] for row in result["merges"]) else "merge"
    return [first, f"Mean@{k}", "95 %", *passed, f"Vote@{k}", "Token #N", "Think #R"]


def table_rows(result: dict[str, Any]) -> list[list[str]]:
    """One row a merge; scores and think ratio in per cent, as the paper has them."""
    return [
        [
            row["layers"] or row["name"],
            f"{100 * row['mean@k']:.2f}",
            interval(row["ci95"]),
            *(f"{100 * value:.2f}" for value in row["pass"].values()),
            f"{100 * row['vote@k']:.2f}",
            f"{row['tokens']:.1f}",
            f"{100 * row['think_ratio']:.2f}",
        ]
        for row in result["merges"]
    ]


def title_of(result: dict[str, Any]) -> str:
    """What was merged, in one line."""
    row = result["merges"][0]
    where = "" if result["iteration"] is None else f", iteration {result['iteration']}"
    return (
        f"{result['name']}: {result['domain']}, seed {result['seed']}{where}, {row['n']} questions × {row['k']}, "
        f"template of {result['template']}"
    )


def markdown(result: dict[str, Any]) -> str:
    """`merges.md`."""
    about = [f"- **{row['layers'] or row['name']}**: {row['about']}" for row in result["merges"] if row["about"]]
    return "\n".join([f"# {title_of(result)}", "", *console.table(header(result), table_rows(result)), "", *about, ""])
