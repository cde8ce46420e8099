"""The notebook of examples/: its cells run as they are, with other values in the cell tagged `parameters`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_every_cell_runs_on_the_tiny_pair(
    finished_run: Path, forked_engines: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT / "examples")
    notebook = json.loads((ROOT / "examples" / "first-run.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert notebook["nbformat"] == 4 and not any(cell["outputs"] for cell in cells)
    names: dict[str, Any] = {}
    for cell in cells:
        exec(compile("".join(cell["source"]), "first-run.ipynb", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            names |= {"DOMAIN": "arithmetic", "RUNS": finished_run.parent, "QUESTION": "7*3+4*2"}
    shown = capfd.readouterr().out
    assert "Nothing to do" in shown  # the run is finished
    assert "iteration 1  instruct" in shown and "tokens per answer" in shown
    assert "questions won" in shown and "thinking (iteration 1)" in shown
