"""Real kills of real engines: training that resumes, and the whole loop."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import orjson
import pytest

from experiments.chaos import IN_TURN, VICTIMS, differing_tensors
from tests.conftest import BIN, ROOT
from thinkswitch_plugin.loop import work
from thinkswitch_plugin.recipe import load_recipe
from thinkswitch_plugin.run import Run, hashes

pytestmark = pytest.mark.slow

TRAIN = "import sys; from pathlib import Path; from tests.test_resume import train; train(*map(Path, sys.argv[1:]))"


def train(finished: Path, here: Path, overlay: Path) -> dict[str, Any]:
    """Train the adapter of a finished run's pairs again into `here`, with an overlay of the recipe."""
    opened = Run(finished, load_recipe(ROOT / "recipes" / "arithmetic.yaml", (overlay,)), 0, "embedded", 1)
    first = opened.checkpoint("instruct", 0)
    return work.train_adapter(opened, pairs=finished / "iter-1" / "pairs.jsonl", base_model=first, here=here)


def processes_with(text: str) -> list[str]:
    return [p.parent.name for p in Path("/proc").glob("[0-9]*/cmdline") if text.encode() in read(p)]


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_a_kill_of_every_kind_changes_nothing(finished_run: Path, command: Any) -> None:
    done = command(sys.executable, "-m", "experiments.chaos", "--in-turn", "--undisturbed", finished_run, timeout=1500)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    result = orjson.loads(done.stdout.splitlines()[-1])
    assert result["kills"] == len(IN_TURN) == len(VICTIMS) and len(result["hits"]) >= 3


def test_a_killed_training_goes_on_from_its_checkpoint_to_the_same_adapter(
    finished_run: Path, tmp_path: Path, forked_engines: None
) -> None:
    overlay = tmp_path / "save.yaml"
    overlay.write_text("num_epochs: 2\nsave_strategy: epoch\n")
    whole, here = tmp_path / "whole", tmp_path / "here"
    assert train(finished_run, whole, overlay)["resumed_from"] is None
    words = [BIN / "python", "-c", TRAIN, finished_run, here, overlay]
    first = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 300
    while not any(hashes.read_stamp(p) for p in here.glob(".adapter.partial/checkpoint-*/trainer_state.json")):
        assert first.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    first.kill()
    first.wait()
    end = time.monotonic() + 10
    while processes_with(str(here)):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert str(train(finished_run, here, overlay)["resumed_from"]).startswith("checkpoint-")
    name = "adapter/adapter_model.safetensors"
    assert differing_tensors(whole / name, here / name) == 0


def test_a_finished_run_verifies_and_its_cards_say_where_it_comes_from(finished_run: Path, command: Any) -> None:
    done = command(BIN / "thinkswitch", "verify", finished_run)
    assert done.returncode == 0 and "12 stages fit their stamps" in done.stdout
    for mode in ("instruct", "thinking"):
        card = (finished_run / "iter-1" / mode / "README.md").read_text()
        for row in (
            "| Seed | 0 |",
            "| Parents | `",
            "| Recipe | `recipes/arithmetic.yaml` (sha256 ",
            "| Prompts | `",
            "| Pairs | `",
            "| Versions | python ",
        ):
            assert row in card
