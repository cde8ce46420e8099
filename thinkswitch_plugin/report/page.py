"""`report.html`: the whole run as one file that needs no network, no server and no other file.

`page.html.j2` is the page, `page.css` and `page.js` stand in it, and a Content-Security-Policy lets nothing
else run or load. Everything that a model wrote is either escaped by Jinja or inside base64.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from thinkswitch_plugin import files
from thinkswitch_plugin.judging import paired
from thinkswitch_plugin.report import pictures, search_pictures, tables
from thinkswitch_plugin.report import sweeps as of_sweeps
from thinkswitch_plugin.report.build import Evaluation
from thinkswitch_plugin.report.charts import inline
from thinkswitch_plugin.report.questions import BLOCK, Questions
from thinkswitch_plugin.run import MODES, Run, stages, stamp_path, sweep_files
from thinkswitch_plugin.run.hashes import Hashes, read_stamp

FOLDER = Path(__file__).parent
SWEEP_SIZE = (5.0, 7.0)  # inches; narrow, so that letters can be read on a phone


def write_page(run: Run, report: dict[str, Any], judged: Sequence[Evaluation], path: Path) -> None:
    """Write the page as it is made; never more than one block of questions is in memory.

    Args:
        report: what `report.json` holds.
        judged: what it was made of.
    """
    environment = Environment(
        loader=PackageLoader("thinkswitch_plugin.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("page.html.j2")
    with files.atomic_file(path) as handle:
        for piece in template.generate(**content(run, report, judged)):
            handle.write(piece.encode())


def content(run: Run, report: dict[str, Any], judged: Sequence[Evaluation]) -> dict[str, Any]:
    """What the template shows."""
    questions = Questions(judged, run.folder)
    style, script = ((FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return {
        "report": report,
        "modes": list(report["iterations"][-1]["paired"]),
        "headline": tables.headline(report),
        "hybrid": tables.about_hybrid(report),
        "header": tables.header(report),
        "rows": list(tables.rows(report)),
        "summaries": [summary(report, mode) for mode in MODES],
        "compared": list(compared(report)),
        "charts": charts(report),
        "sweeps": list(sweeps(run)),
        "costs": list(costs(report)),
        "rebuilt": [entry for entry in report["iterations"] if "merge" in entry],
        "provenance": provenance(run),
        "questions": questions,
        "block": BLOCK,
        "style": Markup(style),
        "script": Markup(script),
        "policy": policy(style, script),
    }


def policy(style: str, script: str) -> str:
    """A Content-Security-Policy under which nothing is loaded and only our own style and script count."""

    def source(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return f"default-src 'none'; style-src {source(style)}; script-src {source(script)}; base-uri 'none'; form-action 'none'"


def summary(report: dict[str, Any], mode: str) -> dict[str, Any]:
    """One mode before and after, for the two fields at the top of the page."""
    before, after = report["iterations"][0][mode], report["iterations"][-1][mode]
    found = report["iterations"][-1]["paired"][mode][-1]
    return {
        "mode": mode,
        "before": f"{100 * before['mean@k']:.1f}",
        "after": f"{100 * after['mean@k']:.1f}",
        "change": f"{100 * found['difference']:+z.1f}",
        "interval": "{:+z.1f} to {:+z.1f}".format(*(100 * v for v in found["ci95"])),
        "tokens": (f"{before['tokens']:.1f}", f"{after['tokens']:.1f}"),
        "think_ratio": (f"{before['think_ratio']:.3f}", f"{after['think_ratio']:.3f}"),
        "verdict": found["verdict"],
        "direction": paired.direction(found),
    }


def compared(report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every comparison of two iterations, as the page's table shows it."""
    for entry in report["iterations"][1:]:
        for mode in entry["paired"]:
            for found in entry["paired"][mode]:
                low, high = (100 * v for v in found["ci95"])
                yield {
                    "mode": mode,
                    "iteration": entry["iteration"],
                    "against": found["against"],
                    "won": len(found["won"]),
                    "lost": len(found["lost"]),
                    "n": found["n"],
                    "p": paired.p_value(found["p"]),
                    "change": f"{100 * found['difference']:+z.1f}",
                    "interval": f"{low:+z.1f} to {high:+z.1f}",
                    "verdict": found["verdict"],
                    "few": found["k"] == 1 and len(found["won"]) + len(found["lost"]) < paired.FEWEST,
                    "direction": paired.direction(found),
                }


def charts(report: dict[str, Any]) -> dict[str, Any]:
    """The pictures of the page, by the same code as the files beside it, each with words for a screen reader."""
    panels = [
        inline(
            pictures.iterations_picture(report, (panel,)),
            f"over-{panel.replace(' ', '-')}",
            f"{panel} over iterations: " + "; ".join(f"{mode} {_series(report, mode, panel)}" for mode in MODES),
        )
        for panel in pictures.PANELS
    ]
    won = "; ".join(
        f"{c['mode']} {c['iteration']} against {c['against']}: {c['won']} won, {c['lost']} lost"
        for c in compared(report)
    )
    minutes = "; ".join(
        f"iteration {entry['iteration']}: {sum(entry['seconds'].values()) / 60:.1f}" for entry in report["iterations"]
    )
    return {
        "iterations": panels,
        "paired": inline(pictures.paired_picture(report), "paired", f"Questions won and lost. {won}"),
        "time": inline(pictures.time_picture(report), "time", f"Minutes by stage. {minutes} in all"),
    }


def _series(report: dict[str, Any], mode: str, panel: str) -> str:
    def shown(figures: dict[str, Any]) -> str:
        if panel == "score":
            return f"{100 * figures['mean@k']:.1f} %"
        return f"{figures['tokens']:.1f}" if panel == "tokens" else f"{figures['think_ratio']:.3f}"

    return ", ".join(shown(entry[mode]) for entry in report["iterations"])


def sweeps(run: Run) -> Iterator[dict[str, Any]]:
    """Picture, tables and words of every sweep over λ that lies in the run."""
    for path in sweep_files(run):
        result = files.read_json(path)
        name = path.parent.parent.name
        words = " ".join(f"{curve['stages_in_words']} {of_sweeps.sentence(curve)}" for curve in result["curves"])
        yield {
            "name": name,
            "title": of_sweeps.title_of(result),
            "chart": inline(
                search_pictures.sweep_picture(result, SWEEP_SIZE, titled=False),
                f"sweep-{name}",
                f"Score, tokens and think ratio over λ. {words}",
            ),
            "header": of_sweeps.HEADER,
            "curves": [
                {
                    "sampling": curve["sampling"],
                    "rows": of_sweeps.table_rows(result, curve),
                    "words": curve["stages_in_words"],
                    "sentence": of_sweeps.sentence(curve),
                }
                for curve in result["curves"]
            ],
        }


def costs(report: dict[str, Any]) -> Iterator[list[str]]:
    """Iteration, stage, seconds, share and, with a price, money of every stage."""
    price, total = report["cost"]["price_per_hour"], 3600 * report["cost"]["hours"]
    for entry in report["iterations"]:
        for stage, seconds in entry["seconds"].items():
            row = [str(entry["iteration"]), stage.replace("_", " "), f"{seconds:,.1f}"]
            row.append(f"{100 * seconds / total:.1f} %" if total else "")
            yield [*row, f"{price * seconds / 3600:.4f}"] if price else row


def provenance(run: Run) -> dict[str, Any]:
    """Recipe, settings and what every stage's stamp says: command, seconds, hashes of what it read and wrote."""
    hashes = Hashes(run.folder)
    recipes = [
        {"path": str(path), "hash": hashes.of(path), "text": path.read_text(encoding="utf-8")}
        for path in (run.recipe.path, *run.recipe.overlays)
    ]
    empty = {"seconds": 0.0, "command": "", "inputs": {}, "outputs": {}}
    done = []
    for stage in stages(run):
        stamp = read_stamp(stamp_path(run, stage)) if stage.name != "report" else None
        if stamp is not None:
            said = {key: stamp.get(key) or default for key, default in empty.items()}
            done.append({"name": stage.name, "iteration": stage.iteration, **said})
    hashes.save()
    settings = {
        "DOMAIN": run.recipe.keys.domain,
        "ITERATIONS": run.iterations,
        "SEED": run.seed,
        "ENGINE": run.engine,
        "RUNS": run.folder.parent,
        "OVERLAY": " ".join(str(path) for path in run.recipe.overlays),
    }
    given = [f"{name}={shlex.quote(str(value))}" for name, value in settings.items() if value != ""]
    command = " ".join(["make iterate", *given])
    return {"folder": str(run.folder), "recipes": recipes, "stages": done, "command": command}
