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

from markupsafe import Markup

from thinkswitch_plugin import files
from thinkswitch_plugin.judging import paired
from thinkswitch_plugin.report import pictures, search_pictures, templates
from thinkswitch_plugin.report import sweeps as of_sweeps
from thinkswitch_plugin.report.beside import shown
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
    template = templates.environment(html=True).get_template("page.html.j2")
    with files.atomic_file(path) as handle:
        for piece in template.generate(**content(run, report, judged)):
            handle.write(piece.encode())


def content(run: Run, report: dict[str, Any], judged: Sequence[Evaluation]) -> dict[str, Any]:
    """What the template shows."""
    questions = Questions(judged, run.folder)
    style, script = ((FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return {
        **shown(report),
        "modes": MODES,
        "paired": paired,
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
        f"{mode} {entry['iteration']} against {c['against']}: {len(c['won'])} won, {len(c['lost'])} lost"
        for entry in report["iterations"][1:]
        for mode in entry["paired"]
        for c in entry["paired"][mode]
    )
    minutes = "; ".join(
        f"iteration {entry['iteration']}: {sum(entry['seconds'].values()) / 60:.1f}" for entry in report["iterations"]
    )
    ends = "; ".join(
        f"iteration {entry['iteration']}: from {entry['losses'][0][1]:.3f} to {entry['losses'][-1][1]:.3f}"
        for entry in report["iterations"]
        if "losses" in entry
    )
    return {
        "loss": inline(pictures.loss_picture(report), "loss", f"Training loss. {ends}") if ends else None,
        "iterations": panels,
        "paired": inline(pictures.paired_picture(report), "paired", f"Questions won and lost. {won}"),
        "time": inline(pictures.time_picture(report), "time", f"Minutes by stage. {minutes} in all"),
    }


def _series(report: dict[str, Any], mode: str, panel: str) -> str:
    forms = {"score": "{f[mean@k]:.1%}", "tokens": "{f[tokens]:.1f}", "think ratio": "{f[think_ratio]:.3f}"}
    return ", ".join(forms[panel].format(f=entry[mode]).replace("%", " %") for entry in report["iterations"])


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
                {**curve, "rows": of_sweeps.table_rows(result, curve), "sentence": of_sweeps.sentence(curve)}
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
