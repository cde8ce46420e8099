"""What ThinkSwitch can do with each architecture, found out on tiny random models: the table of docs/models.md.

    .venv/bin/python -m experiments.models [--columns merge,train] [--results FILE] [--write docs/models.md] [NAME…]

A cell is `ok` only if what its column checks is so (`model_merges.py`, `model_stages.py`); else it is the sentence that
refuses the pair. Anything else (a traceback, other numbers, a key too few) is a failure and exit code 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

from experiments.model_merges import merge, similarity, sweep_in_memory
from experiments.model_pairs import MODELS, Model, make_pair
from thinkswitch_plugin import files
from thinkswitch_plugin.errors import ThinkSwitchError

START, END = "<!-- table of `make models` -->", "<!-- end of the table -->"

# A column of the table: what it does with a pair in a folder of its own. It raises `ThinkSwitchError` to refuse.
Check = Callable[[Model, dict[str, Path], Path], None]
COLUMNS: dict[str, Check] = {
    "merge": merge,
    "similarity": similarity,
    "sweep in memory": sweep_in_memory,
}
SERVED = "sweep by server"
ENGINES = (SERVED, "train", "merge-lora", "export", "loop")


def checks(names: Iterable[str]) -> dict[str, Check]:
    """The columns of these names, and how each is tried."""
    from experiments import model_stages as stages

    by_engines = (stages.sweep_by_server, stages.train, stages.merge_lora, stages.export, stages.loop)
    every = COLUMNS | dict(zip(ENGINES, by_engines, strict=True))
    return {name: every[name] for name in names}


def try_all(model: Model, folder: Path, columns: Mapping[str, Check] = COLUMNS) -> dict[str, str]:
    """`ok`, the sentence of a refusal, or `FAILED: …` for every column."""
    try:
        roles = make_pair(model, folder)
    except Exception as error:
        traceback.print_exc()
        return dict.fromkeys(columns, f"FAILED: no tiny model: {error}")
    found = {}
    for name, check in columns.items():
        started = time.monotonic()
        try:
            check(model, roles, folder)
            found[name] = "ok"
        except ThinkSwitchError as error:
            found[name] = note_of(str(error), model, folder)
        except Exception as error:
            traceback.print_exc()
            found[name] = f"FAILED: {type(error).__name__}: {error}"
        print(f"{model.name}: {name}: {found[name]} ({time.monotonic() - started:.0f} s)", file=sys.stderr)
    return found


def note_of(sentence: str, model: Model, folder: Path) -> str:
    """A refusal without what differs from row to row, so that one note serves all rows that are refused alike."""
    for found, name in (
        (rf"{re.escape(str(folder))}/(?:start/)?(?:instruct|thinking)\b", "{checkpoint}"),
        (rf"{re.escape(str(folder))}/", ""),
        (rf"\b{model.kind}\b", "{architecture}"),
        (r"\bmodel\.(?:\w+\.)+\w+", "{tensor}"),
        (r"\d+ %", "{share} %"),
    ):
        sentence = re.sub(found, name, sentence)
    return sentence


def table(rows: dict[str, dict[str, str]]) -> str:
    """The rows as Markdown, with every column; sentences stand below, each once."""
    notes: list[str] = []
    columns = (*COLUMNS, *ENGINES)
    lines = ["| architecture | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name, cells in rows.items():
        shown = []
        for column in columns:
            cell = cells.get(column, "not run")
            if cell not in ("ok", "not run", *notes):
                notes.append(cell)
            word = "FAILED" if cell.startswith("FAILED") else "refused"
            shown.append(f"{word} ({notes.index(cell) + 1})" if cell in notes else cell)
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join([*lines, "", *(f"{i}. {note}" for i, note in enumerate(notes, 1))]).rstrip() + "\n"


def rows_of(words: Collection[str]) -> list[Model]:
    """The rows of these names, or else all whose names hold one of the words; every row where there are none."""
    named = [model for model in MODELS if model.name in words]
    return named or [m for m in MODELS if not words or any(word.lower() in m.name.lower() for word in words)]


def main() -> int:
    """Print the table, and write it into a document if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="Markdown file whose table is replaced.")
    parser.add_argument("--columns", default=",".join((*COLUMNS, *ENGINES)), help="Columns to try, between commas.")
    parser.add_argument(
        "--results", type=Path, help="JSON file that keeps the cells, for columns and rows tried by other calls."
    )
    parser.add_argument("names", nargs="*", help="Rows of these names, or with these words in them (default: all).")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "fork")  # a spawned engine loads vLLM once more
    from thinkswitch_plugin.engines.servers import NO_VLLM, vllm_python

    asked = options.columns.split(",")
    if unknown := set(asked) - {*COLUMNS, *ENGINES}:
        parser.error(f"there is no column {unknown.pop()!r}; the columns are {', '.join((*COLUMNS, *ENGINES))}")
    if not rows_of(options.names):
        parser.error(f"no row has any of {options.names} in its name")
    columns = checks(asked)
    if vllm_python() is None and columns.pop(SERVED, None):
        print(f"{SERVED} is left as it is: {NO_VLLM}", file=sys.stderr)
    kept = files.read_json(options.results) if options.results and options.results.is_file() else {}
    rows = {model.name: kept.get(model.name, {}) for model in MODELS}
    for model in rows_of(options.names):
        with tempfile.TemporaryDirectory() as folder:
            found = try_all(model, Path(folder), columns)
        rows[model.name] = {**rows[model.name], **found}
        if options.results:
            files.write_json(options.results, rows)
    rows = {name: cells for name, cells in rows.items() if cells}
    text = table(rows)
    if options.write:
        document = options.write.read_text(encoding="utf-8")
        before, _, rest = document.partition(START)
        options.write.write_text(f"{before}{START}\n\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    failed = [name for name, cells in rows.items() if any(cell.startswith("FAILED") for cell in cells.values())]
    print(text)
    print(json.dumps({"architectures": len(rows), "failed": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
