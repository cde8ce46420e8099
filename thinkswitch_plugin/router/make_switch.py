"""`make switch`: labels for a finished pair, a router, and what it makes of the held-out questions.

    iter-2/switch/labels.jsonl    what each label prompt needs (`agreement.py`)
    iter-2/switch/router.skops    the router (`classifier.py`)
    iter-2/switch/switch.json     how it was chosen, the threshold, the curve (`curve.py`)
    iter-2/switch/switch.md .png .svg    the same as tables and as a picture

Killed at any time, the same command continues with the answers that are missing. Router and threshold come from the
label prompts alone; the evaluation's questions only measure them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from thinkswitch_plugin import console, files
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.judging.figures import Sample, interval, summarize
from thinkswitch_plugin.judging.paired import compare
from thinkswitch_plugin.judging.samples import samples_file, samples_of
from thinkswitch_plugin.loop import work
from thinkswitch_plugin.report import templates
from thinkswitch_plugin.report.pictures import switch_title
from thinkswitch_plugin.report.tables import percent, points, points_span
from thinkswitch_plugin.router import curve
from thinkswitch_plugin.router.agreement import Labels, label_by_agreement, read_labels
from thinkswitch_plugin.router.classifier import Router, Trained, require_installed, threshold_that_keeps, train
from thinkswitch_plugin.run import MODES, Run, locked, versions
from thinkswitch_plugin.run.hashes import Hashes

KEEP = 0.99  # share of the label prompts that must still get what they need at the default threshold
RULE = (
    f"the largest threshold at which at most {100 * (1 - KEEP):.0f} % of the label prompts need thinking and do not "
    "get it, each evaluated with a router that had not seen it"
)


def make_switch(run: Run, k: int, *, labels_file: Path | None = None, limit: int | None = None) -> dict[str, Any]:
    """Label, train, evaluate; write everything under `iter-k/switch/`, print the table, and return `switch.json`.

    Args:
        labels_file: labels to learn from instead of the pair's agreement; rows {"prompt", "label"}.
        limit: at most so many label prompts.

    Raises:
        ThinkSwitchError: the iteration is not finished or not evaluated, the labels are too few, or skops is not installed.
    """
    from thinkswitch_plugin.report.pictures import save, switch_picture

    require_installed()  # before any prompt is answered
    work.require_finished(run, k)
    folder = run.iteration(k) / "switch"
    started = time.monotonic()
    with locked(run.folder):
        prompts, samples = held_out(run, k)
        if labels_file is None:
            labels = label_by_agreement(run, k, Hashes(run.folder), limit)
        else:
            labels = read_labels(labels_file).first(limit)
        if both := set(map(str.strip, labels.prompts)) & set(map(str.strip, prompts)):
            raise ThinkSwitchError(
                f"{len(both)} label prompt(s) are questions of the evaluation ({sorted(both)[0]!r:.80}); remove them: "
                "a router is evaluated on questions that it has not seen."
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
            **router_facts(trained, labels),
        }
        result["evaluation"] = evaluated(judged, samples, result["threshold"]["value"])
        # For comparison only; the choice was made before.
        result["evaluation"]["area_by_router"] = {
            router.name: curve.area(replace(judged, p=router.p_think(prompts)))
            for router in (trained.router, *trained.others)
        }
        result |= {"seconds": round(time.monotonic() - started, 1), "versions": versions()}
        text = markdown(result)
        files.write_json(folder / "switch.json", result)
        files.write_text(folder / "switch.md", text)
        save(switch_picture(result), folder / "switch")
    console.say(text)
    console.say(f"  {folder / 'switch.json'}, switch.md, switch.png, switch.svg, router.skops")
    return result


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
        samples[mode] = {sample.doc_id: sample for sample in samples_of(folder, keys, run.checkpoint(mode, k))}
    asked = texts["instruct"]
    if asked != texts["thinking"] or not asked:
        raise ThinkSwitchError(
            f"The two checkpoints of iteration {k} of {run.folder} were evaluated on different questions; "
            "run `make iterate` first."
        )
    return list(asked.values()), {mode: [samples[mode][n] for n in asked] for mode in MODES}


def router_facts(trained: Trained, labels: Labels) -> dict[str, Any]:
    """What `switch.json` holds of the router and its default threshold, all of it from the label prompts."""
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
    """What `switch.json` holds of the held-out questions."""
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


def stored_switch(run: Run, k: int) -> tuple[Router, float]:
    """The router of an iteration and its default threshold. Raises `ThinkSwitchError` if there is none yet."""
    folder = run.iteration(k) / "switch"
    if not ((folder / "router.skops").is_file() and (folder / "switch.json").is_file()):
        raise ThinkSwitchError(
            f"{folder} has no router yet; train one first: make switch DOMAIN={run.recipe.keys.domain} ITERATION={k}"
        )
    return Router.load(folder / "router.skops"), float(files.read_json(folder / "switch.json")["threshold"]["value"])


def markdown(result: dict[str, Any]) -> str:
    """`switch.md` from `switch.json`."""
    return templates.markdown(
        "switch.md.j2", result=result, title=switch_title(result), points=_rows(result["evaluation"])
    )


def _rows(found: dict[str, Any]) -> Iterator[list[str]]:
    """Always instruct, the router at about every tenth of thinking, always thinking, the default, the oracle."""

    def always(mode: str, share: float) -> list[str]:
        return _row(f"always {mode}", {**found[mode], "accuracy": found[mode]["mean@k"], "share": share})

    seen = [p for p in found["curve"] if "ahead_at_same_share" in p and 0 < p["share"] < 1]
    tenths = range(1, 10) if seen else ()
    nearest = {min(range(len(seen)), key=lambda i: abs(10 * seen[i]["share"] - tenth)) for tenth in tenths}
    yield always("instruct", 0.0)
    yield from (_row("router", seen[i]) for i in sorted(nearest))
    yield always("thinking", 1.0)
    yield _row("router, default", found["default"])
    yield _row("oracle", found["oracle"])


def _row(name: str, point: dict[str, Any]) -> list[str]:
    """What there is of a point; only the router's have a threshold and a comparison."""
    cells = [name, "", percent(point["share"]), percent(point["accuracy"]), f"{point['tokens']:.1f}"]
    if "threshold" not in point:
        return [*cells, "", "", "", "", ""]
    cells[1] = f"{point['threshold']:.3f}"
    ahead = [(f"ahead_at_same_{by}", f"ahead_at_same_{by}_ci95") for by in curve.BY]
    return [*cells, percent(point["mix"]), *(c for n, i in ahead for c in (points(point[n]), points_span(point[i])))]
