"""Sweep λ over a pair: score, tokens and think ratio at every point, the three stages, λ*.

    iter-1/sweep/points/lambda-0.7/…   one point: lm-eval's samples, candidate.json
    iter-1/sweep/sweep.json            every point, the stages, λ*
    iter-1/sweep/sweep.md .png .svg    the same as a table and as a picture

Killed at any time, the same command continues with the first missing point. Points of
earlier calls with the same settings are part of the result, so a coarse sweep can be refined.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from thinkswitch_plugin import console, files
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.judging.evaluation import Sampling
from thinkswitch_plugin.merging.config import of_recipe, place_models, set_lambda
from thinkswitch_plugin.report import sweeps
from thinkswitch_plugin.run import MODES
from thinkswitch_plugin.search import stages
from thinkswitch_plugin.search.candidates import Bench, Candidate, bench_of, evaluate_all, finished
from thinkswitch_plugin.search.pair import Pair, Template, few_questions, of_settings, write_results

ELLIPSIS = ("…", "...")


def parse_weights(text: str) -> list[float]:
    """λ values of `LAMBDAS="0 0.1 … 1"`, ascending, each once; `…` or `...` goes on in equal steps.

    Raises `ThinkSwitchError` naming the word that is not a number, or a series that does not end.
    """
    words = text.replace(",", " ").split()
    found: list[float] = []
    for index, word in enumerate(words):
        if word in ELLIPSIS:
            if index < 2 or index + 1 >= len(words):
                raise ThinkSwitchError(f'LAMBDAS="{text}": write two values before `{word}` and one after it.')
            step, last = found[-1] - found[-2], _number(words[index + 1], text)
            count = (last - found[-1]) / step if step else -1.0
            if count < 0 or count > 1000 or abs(count - round(count)) > 1e-6:
                raise ThinkSwitchError(f'LAMBDAS="{text}": steps of {step:g} from {found[-1]:g} do not meet {last:g}.')
            found += [found[-1] + step * i for i in range(1, round(count))]
        else:
            found.append(_number(word, text))
    if not found:
        raise ThinkSwitchError('LAMBDAS is empty; write for example LAMBDAS="0 0.1 … 1".')
    return sorted({round(value, 6) for value in found})


def _number(word: str, text: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ThinkSwitchError(f'LAMBDAS="{text}": {word!r} is not a number.')
    return value


def parse_sampling(text: str, samples: int | None) -> list[Sampling]:
    """Sampling settings of `SAMPLING="0.6/0.95 0.7/0.8"`: temperature/top-p, or the temperature alone.

    Raises `ThinkSwitchError` naming the word that is none.
    """
    found = []
    for word in text.split():
        match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)(?:/(\d+(?:\.\d*)?|\.\d+))?", word)
        if not match or (match[2] and not 0 < float(match[2]) <= 1):
            raise ThinkSwitchError(f'SAMPLING="{text}": {word!r} is not temperature/top-p, such as 0.6/0.95.')
        found.append(Sampling(float(match[1]), float(match[2]) if match[2] else None, samples))
    return found or [Sampling(samples=samples)]


def sweep(pair: Pair, weights: Sequence[float], sampling: Sequence[Sampling], template: Template) -> None:
    """Evaluate every point, then write `sweep.json`, `sweep.md` and the picture, and print the table.

    Raises `ThinkSwitchError` if λ cannot be set in the recipe's merge config or a point fails.
    """
    config, source = of_recipe(pair.keys.rebuild)
    folder = pair.out / ("sweep" + of_settings(pair, template))
    roles = {name: str(pair.roles[name]) for name in MODES}

    def point(weight: float, drawn: Sampling) -> Candidate:
        identity = set_lambda(config, weight, source)
        name = f"points/lambda-{weight:g}{drawn.slug}{few_questions(pair)}"
        return Candidate(name, place_models(identity, roles), identity, drawn)

    with bench_of(pair, folder, template, MODES) as bench:
        asked = [(w, s, point(w, s)) for s, w in itertools.product(sampling, weights)]
        title = f"sweep of {len(asked)} points"
        evaluate_all(bench, [c for _, _, c in asked], title)
        every = {c.name: (w, s, c) for w, s, c in asked}
        for weight, drawn in earlier(folder):
            candidate = point(weight, drawn)
            if candidate.name not in every and finished(bench, candidate):
                every[candidate.name] = (weight, drawn, candidate)
        result = build(bench, sorted(every.values(), key=lambda e: (str(e[1]), e[0])), config["merge_method"])
    write_results(folder / "sweep.json", result)
    files.write_text(folder / "sweep.md", sweeps.markdown(result))
    draw(result, folder)
    show(result, pair)
    console.say(f"  {folder / 'sweep.json'}, sweep.md, sweep.png, sweep.svg")


def earlier(folder: Path) -> list[tuple[float, Sampling]]:
    """λ and sampling of the points that lie in a sweep's folder, by their names."""
    pattern = re.compile(r"lambda-(-?[\d.e-]+?)(?:-t([\d.]+))?(?:-p([\d.]+))?(?:-k(\d+))?(?:-n\d+)?")
    names = sorted(path.parent.name for path in (folder / "points").glob("lambda-*/candidate.json"))
    found = [match.groups() for name in names if (match := pattern.fullmatch(name))]
    return [
        (float(w), Sampling(float(t) if t else None, float(p) if p else None, int(k) if k else None))
        for w, t, p, k in found
    ]


def build(bench: Bench, points: Sequence[tuple[float, Sampling, Candidate]], method: str) -> dict[str, Any]:
    """`sweep.json`: every point's figures, and for each sampling setting the stages and λ*."""
    rows: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    for drawn, group in itertools.groupby(points, key=lambda e: e[1]):
        stored, setting = [], asdict(drawn)
        for weight, _, candidate in group:
            one = files.read_json(bench.work / candidate.name / "candidate.json")
            stored.append({**one, "lambda": weight})
            rows.append({"lambda": weight, **setting, **one["figures"], "seconds": one["seconds"]})
        curve = stages.Curve.of(stored)
        found = stages.stages(curve)
        curves.append(
            {
                "sampling": str(drawn),
                **setting,
                "stages": found,
                "stages_in_words": stages.describe(found, curve),
                "sweet_spot": stages.sweet_spot(curve),
            }
        )
    return {
        **bench.pair.described(),
        "method": method,
        "template": bench.mode,
        "task": bench.keys.evaluation.task,
        "points": rows,
        "curves": curves,
    }


def show(result: dict[str, Any], pair: Pair) -> None:
    """The table on the terminal, and what to do with λ*."""
    for curve in result["curves"]:
        title = f"{sweeps.title_of(result)}; sampling: {curve['sampling']}"
        console.print_table(title, sweeps.HEADER, sweeps.table_rows(result, curve))
        console.say(f"  {curve['stages_in_words']}")
        console.say(f"  {sweeps.sentence(curve)}")
    if pair.of_run and len(result["curves"]) == 1:
        console.say("  The loop rebuilds with `thinkswitch.rebuild.lambda` of the recipe (and checks it).")


def draw(result: dict[str, Any], folder: Path) -> None:
    """`sweep.png` and `sweep.svg`."""
    from thinkswitch_plugin.report.pictures import save
    from thinkswitch_plugin.report.search_pictures import sweep_picture

    save(sweep_picture(result), folder / "sweep")
