from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, Command

sys.path.append(str(ROOT / "experiments"))
import gpu_check
import gpu_merges
import gpu_qlora
import gpu_shape


def test_the_tiny_check_prints_a_table_and_the_same_as_json(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    done = command(
        sys.executable, ROOT / "experiments" / "gpu_check.py", "--tiny", "--out", out, "--only", "merges", "live"
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures == json.loads(out.read_text())
    cases = {row["case"]: row for row in figures["rows"]}
    assert cases["ThinkSwitch's kernel, slerp, 24 tensors"]["rate"] > 0
    assert cases["mergekit's slerp, 24 tensors"]["seconds"] > 0
    assert cases["from files in the page cache, a λ"]["note"] == "there is no checkpoint to read"
    for case in cases:
        assert f"| {case} |" in done.stdout
    assert "=== merges" in out.with_suffix(".log").read_text()


def test_a_part_that_fails_leaves_its_reason_and_the_rest_goes_on(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").touch()  # in the way of the folder
    rows = gpu_check.measure(["checkpoint", "live"], tmp_path, True)
    assert rows[0]["case"] == "stopped early" and rows[0]["note"].startswith("failed: FileExistsError")
    assert any(row["case"].startswith("in GPU memory, linear") and "rate" in row for row in rows)
    assert "failed: FileExistsError" in gpu_check.table(rows)


def test_a_part_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    assert gpu_check.run("merges", tmp_path, True, 0.01)[-1]["note"] == "stopped after 0 s"


def test_peft_stands_in_only_where_axolotl_measured_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured = {"axolotl-limited": [{"case": "64 tokens, a step", "rate": 1.0}], "axolotl": []}
    ran: list[str] = []
    monkeypatch.setattr(gpu_check, "run", lambda name, *_: ran.append(name) or measured.get(name, []))
    gpu_check.measure(["axolotl-limited", "peft-limited", "axolotl", "peft"], tmp_path, True)
    assert ran == ["axolotl-limited", "axolotl", "peft"]


def test_the_full_size_is_qwen3_4bs(tmp_path: Path) -> None:
    shapes = gpu_shape.shapes(gpu_shape.full(tmp_path))
    assert len(shapes) == 398
    assert sum(math.prod(shape) for shape in shapes.values()) == 4_022_468_096


def test_the_chunked_loss_is_transformers_own() -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    logits, labels = torch.randn(2, 16, 11), torch.randint(11, (2, 16))
    labels[0, :5] = -100
    assert gpu_qlora.chunked_cross_entropy(logits, labels, 11) == pytest.approx(ForCausalLMLoss(logits, labels, 11))


def test_rows_come_shortest_first_with_enough_of_each_length(tmp_path: Path) -> None:
    setting = dataclasses.replace(gpu_shape.tiny(tmp_path), lengths=(4, 8), steps=2)
    assert [len(row["input_ids"]) for row in gpu_qlora.rows(setting, 3)] == [4] * 6 + [8] * 6


@pytest.mark.parametrize("merge", [gpu_merges.ours, gpu_merges.mergekits])
def test_both_merges_are_near_the_float64_reference(merge: gpu_merges.Merge, tmp_path: Path) -> None:
    difference, rounding = gpu_merges.largest_differences(*gpu_shape.pair(gpu_shape.tiny(tmp_path)), merge)
    assert 0 < difference < 1e-6 and rounding > 0
