"""`make switch`: labels for a finished pair, a router, and what it makes of the held-out questions.

    iter-2/switch/labels.jsonl    what each label prompt needs (`agreement.py`)
    iter-2/switch/router.skops    the router (`router.py`)
    iter-2/switch/switch.json     how it was chosen, the threshold, the curve (`curve.py`)
    iter-2/switch/switch.md .png .svg    the same as tables and as a picture

Killed at any time, the same command goes on with the answers that are missing. Router and threshold come from the
label prompts alone; the evaluation's questions only say what they are worth.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from thinkswitch_plugin import console, files
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.judging.figures import Sample, interval, summarize
from thinkswitch_plugin.judging.paired import compare
from thinkswitch_plugin.judging.samples import read_samples, samples_file
from thinkswitch_plugin.loop import work
from thinkswitch_plugin.report.pictures import switch_title
from thinkswitch_plugin.router import curve
from thinkswitch_plugin.router.agreement import Labels, label_by_agreement, read_labels
from thinkswitch_plugin.router.classifier import Router, Trained, threshold_that_keeps, train
from thinkswitch_plugin.run import MODES, Run, locked, versions
from thinkswitch_plugin.run.hashes import Hashes

KEEP = 0.99  # share of the label prompts that must still get what they need at the default threshold
RULE = (
    f"the largest threshold at which at most {100 * (1 - KEEP):.0f} % of the label prompts need thinking and do not "
    "get it, each judged by a router that had not seen it"
)


def make_switch(run: Run, k: int, *, labels_file: Path | None = None, limit: int | None = None) -> dict[str, Any]:
    """Label, train, judge; write everything under `iter-k/switch/`, print the table, and return `switch.json`.

    Args:
        labels_file: labels to learn from instead of the pair's agreement; rows {"prompt", "label"}.
        limit: at most so many label prompts.

    Raises:
        ThinkSwitchError: the iteration is not finished or not evaluated, or the labels are too few.
    """
    work.require_finished(run, k)
    folder = run.iteration(k) / "switch"
    started = time.monotonic()
    with locked(run.folder):
        prompts, samples = held_out(run, k)
        labels = labels_of(run, k, labels_file, limit)
        if both := set(map(str.strip, labels.prompts)) & set(map(str.strip, prompts)):
            raise ThinkSwitchError(
                f"{len(both)} label prompt(s) are questions of the evaluation ({sorted(both)[0]!r:.80}); take them out: "
                "a router is judged on questions that it has not seen."
            )
        console.say(f"  learning from {len(labels.prompts)} label prompts, {sum(labels.needs_thinking)} need thinking")
        trained = train(labels.prompts, labels.needs_thinking, run.seed)
        trained.router.save(folder / "router.skops")
        judged = curve.Judged.of(trained.router.p_think(prompts), samples["instruct"], samples["thinking"])
        result = {
            "domain": run.recipe.keys.domain,
            "iteration": k,
            "seed": run.seed,
            "engine": run.engine,
            "labels": labels.facts,
            **learnt(trained, labels),
        }
        result["evaluation"] = evaluated(judged, samples, result["threshold"]["value"])
        # Said for comparison; the choice was made before.
        result["evaluation"]["area_by_router"] = {
            router.name: curve.area(replace(judged, p=router.p_think(prompts)))
            for router in (trained.router, *trained.others)
        }
        result |= {"seconds": round(time.monotonic() - started, 1), "versions": versions()}
        files.write_json(folder / "switch.json", result)
        with files.atomic_file(folder / "switch.md") as handle:
            handle.write(markdown(result).encode())
        draw(result, folder)
    console.say(markdown(result))
    console.say(f"  {folder / 'switch.json'}, switch.md, switch.png, switch.svg, router.skops")
    return result


def labels_of(run: Run, k: int, labels_file: Path | None, limit: int | None) -> Labels:
    """Labels of a file, or of the pair's agreement. The run is locked."""
    if labels_file is None:
        return label_by_agreement(run, k, Hashes(run.folder), limit)
    found = read_labels(labels_file)
    return found if limit is None else found.first(limit)


def held_out(run: Run, k: int) -> tuple[list[str], dict[str, list[Sample]]]:
    """The evaluation's questions, as they were asked, and the graded samples of both checkpoints in their order.

    Raises `ThinkSwitchError` if a checkpoint was not evaluated, or the two were asked other questions.
    """
    from thinkswitch_plugin.report.questions import asked_texts

    keys = run.recipe.keys
    texts: dict[str, dict[int, str]] = {}
    samples: dict[str, dict[int, Sample]] = {}
    for mode in MODES:
        folder = run.iteration(k) / "eval" / mode
        texts[mode] = asked_texts(samples_file(folder, keys.evaluation.task))
        found = read_samples(folder, keys.evaluation.task, run.checkpoint(mode, k), keys.labels.answer)
        samples[mode] = {sample.doc_id: sample for sample in found}
    asked = texts["instruct"]
    if asked != texts["thinking"] or not asked:
        raise ThinkSwitchError(
            f"The two checkpoints of iteration {k} of {run.folder} were evaluated on different questions; "
            "run `make iterate` first."
        )
    return list(asked.values()), {mode: [samples[mode][n] for n in asked] for mode in MODES}


def learnt(trained: Trained, labels: Labels) -> dict[str, Any]:
    """What `switch.json` says of the router and its default threshold, all of it from the label prompts."""
    needs = np.asarray(labels.needs_thinking)
    threshold = threshold_that_keeps(trained.p, labels.needs_thinking, KEEP)
    think = trained.p >= threshold
    return {
        "router": {"chosen": trained.router.name, "tried": trained.tried, "reliability": trained.reliability},
        "threshold": {
            "value": threshold,
            "rule": RULE,
            "share": float(think.mean()),
            "kept": float(1 - (needs & ~think).mean()),
        },
    }


def evaluated(judged: curve.Judged, samples: dict[str, list[Sample]], threshold: float) -> dict[str, Any]:
    """What `switch.json` says of the held-out questions."""
    think = judged.p >= threshold
    routed = [t if thinks else i for i, t, thinks in zip(*(samples[mode] for mode in MODES), think, strict=True)]
    points = curve.curve(judged)
    k = len(samples["instruct"][0].correct)
    default = {"threshold": threshold, **curve.chosen(judged, think), **curve.compared(judged, think)}
    scores = np.where(think, judged.score["thinking"], judged.score["instruct"])
    return {
        "n": len(think),
        "k": k,
        **{mode: summarize(samples[mode]) for mode in MODES},
        "default": {
            **default,
            "mix": curve.mixed(judged, default["share"])["accuracy"],
            "ci95": interval([float(score) for score in scores], k),
            "paired": {mode: compare(samples[mode], routed)["sentence"] for mode in MODES},
        },
        "oracle": curve.oracle(judged),
        "curve": points,
        "area": curve.area(judged),
        "verdict": {by: curve.verdict(points, by) for by in curve.BY},
    }


HEADER = [
    "asked",
    "threshold",
    "thinking",
    "accuracy",
    "tokens",
    "random mix",
    "ahead",
    "95 %",
    "ahead at same tokens",
    "95 %",
]


def table_rows(found: dict[str, Any]) -> list[list[str]]:
    """The rows of the table of `switch.md`: always instruct, the router over its threshold, always thinking, oracle.

    Args:
        found: `evaluation` of `switch.json`.
    """
    seen = [p for p in found["curve"] if "ahead_at_same_share" in p and 0 < p["share"] < 1]
    nearest = {
        min(range(len(seen)), key=lambda i: abs(10 * seen[i]["share"] - tenth)) for tenth in range(1, 10) if seen
    }
    first, last = (
        _bare(f"always {mode}", float(mode == "thinking"), found[mode]["mean@k"], found[mode]["tokens"])
        for mode in MODES
    )
    best = found["oracle"]
    return [
        first,
        *(_row("router", seen[i]) for i in sorted(nearest)),
        last,
        _row("router, default", found["default"]),
        _bare("oracle", best["share"], best["accuracy"], best["tokens"]),
    ]


def _bare(name: str, share: float, accuracy: float, tokens: float) -> list[str]:
    return [name, "", f"{100 * share:.1f} %", f"{100 * accuracy:.1f} %", f"{tokens:.1f}", "", "", "", "", ""]


def _row(name: str, point: dict[str, Any]) -> list[str]:
    cells = _bare(name, point["share"], point["accuracy"], point["tokens"])[:5]
    cells[1] = f"{point['threshold']:.3f}"
    cells.append(f"{100 * point['mix']:.1f} %")
    for by in curve.BY:
        low, high = (100 * v for v in point[f"ahead_at_same_{by}_ci95"])
        cells += [f"{100 * point[f'ahead_at_same_{by}']:+.1f}", f"{low:+.1f} to {high:+.1f}"]
    return cells


def markdown(result: dict[str, Any]) -> str:
    """`switch.md`."""

    labels, router, threshold, found = (result[n] for n in ("labels", "router", "threshold", "evaluation"))
    low, high = (100 * v for v in found["area"]["ci95"])
    default = found["default"]
    lines = [
        f"# {switch_title(result)}",
        "",
        f"{labels['prompts']} label prompts ({_source(labels)}): {labels['post']} need no thinking, {labels['pre']} do.",
        *([labels["caution"]] if "caution" in labels else []),
        f"Router: {router['chosen']}. Default threshold {threshold['value']:.3f}: {threshold['rule']}.",
        f"{found['n']} held-out questions, {found['k']} sample{'s' if found['k'] > 1 else ''} a question.",
        "",
        *console.table(HEADER, table_rows(found)),
        "",
        found["verdict"]["share"]["sentence"],
        "",
        found["verdict"]["tokens"]["sentence"],
        "",
        f"On the average over all shares the router is {100 * found['area']['ahead']:+.1f} points ahead of the random mix "
        f"(95 % interval {low:+.1f} to {high:+.1f}).",
        "",
        f"At the default threshold {100 * default['share']:.1f} % of the questions are thought about: "
        f"{100 * default['accuracy']:.1f} % at {default['tokens']:.1f} tokens.",
        "",
        *(f"- against always {mode}: {default['paired'][mode]}" for mode in MODES),
        "",
        "Routers, cross-validated on the label prompts, which decides; and points ahead of the random mix on the held-out "
        "questions, on the average over all shares, which does not:",
        "",
        *console.table(
            ["router", "log loss", "Brier score", "area under ROC", "held out: ahead", "95 %"], router_rows(result)
        ),
        "",
        "The chosen one's p(think), out of fold, and the share that did need thinking: "
        + ", ".join(f"{bin_['p']:.2f} → {bin_['share']:.2f}" for bin_ in router["reliability"])
        + ".",
        "",
    ]
    return "\n".join(lines)


def router_rows(result: dict[str, Any]) -> list[list[str]]:
    """A row for the best router of every kind, the chosen one first."""
    tried = {row["name"]: row for row in result["router"]["tried"]}
    rows = []
    for name, area in result["evaluation"]["area_by_router"].items():
        low, high = (100 * v for v in area["ci95"])
        figures = tried[name]
        rows.append(
            [
                name,
                f"{figures['log_loss']:.4f}",
                f"{figures['brier']:.4f}",
                f"{figures['roc_auc']:.3f}",
                f"{100 * area['ahead']:+.1f}",
                f"{low:+.1f} to {high:+.1f}",
            ]
        )
    return rows


def _source(labels: dict[str, Any]) -> str:
    if labels["source"] == "file":
        return f"labels of {labels['file']}"
    return (
        f"agreement of instruct with thinking; trained on {labels['trained_on']} of them; {labels['left_out']} left out"
    )


def draw(result: dict[str, Any], folder: Path) -> None:
    """`switch.png` and `switch.svg`."""
    from thinkswitch_plugin.report.pictures import save, switch_picture

    save(switch_picture(result), folder / "switch")


def stored_switch(run: Run, k: int) -> tuple[Router, float]:
    """The router of an iteration and its default threshold. Raises `ThinkSwitchError` if there is none yet."""
    folder = run.iteration(k) / "switch"
    if not ((folder / "router.skops").is_file() and (folder / "switch.json").is_file()):
        raise ThinkSwitchError(
            f"{folder} has no router yet; train one first: make switch DOMAIN={run.recipe.keys.domain} ITER={k}"
        )
    return Router.load(folder / "router.skops"), float(files.read_json(folder / "switch.json")["threshold"]["value"])
