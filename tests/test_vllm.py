"""Real vLLM on the CPU, from its own environment, answers one iteration's requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import BIN
from thinkswitch_plugin import engines, files
from thinkswitch_plugin.args import EngineKeys
from thinkswitch_plugin.generate import generate
from thinkswitch_plugin.pairs import write_pairs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(engines.vllm_python() is None, reason="vLLM is not installed: make setup-vllm"),
]


def test_pairs_from_vllm_equal_those_of_the_embedded_engine(finished_run: Path, tmp_path: Path) -> None:
    here = finished_run / "iter-1"
    teacher = files.read_json(finished_run / "iter-0" / "pair.json")["thinking"]["path"]
    out = tmp_path / "generations.jsonl"
    keys = EngineKeys.model_validate({})
    report = generate(here / "requests.jsonl", out, teacher, "vllm", keys, log=tmp_path / "log")
    assert (report.answered, report.failed) == (512, 0)
    message = next(files.read_jsonl(out))[1]["response"]["body"]["choices"][0]["message"]
    assert "</think>" in message["content"]  # raw text, the trace in it
    write_pairs(here / "requests.jsonl", out, tmp_path / "pairs.jsonl", selection="first", answer_kind="digit")
    assert (tmp_path / "pairs.jsonl").read_bytes() == (here / "pairs.jsonl").read_bytes()


def test_a_sweep_through_vllm_scores_as_the_sweep_in_memory(finished_run: Path, tmp_path: Path, command: Any) -> None:
    overlay = tmp_path / "server.overlay.yaml"
    files.write_yaml(overlay, {"thinkswitch": {"evaluation": {"backend": "server"}}})
    pair = files.read_json(finished_run / "iter-0" / "pair.json")
    words = ["sweep", "--domain", "arithmetic", "--runs", tmp_path, "--lambdas", "0.2 0.9", "--limit", "60"]
    words += ["--instruct", pair["instruct"]["path"], "--thinking", pair["thinking"]["path"]]
    found = {}
    for engine, extra in (("embedded", []), ("vllm", ["--overlay", overlay])):
        out = tmp_path / engine
        done = command(BIN / "thinkswitch", *words, "--engine", engine, "--out", out, *extra)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        points = files.read_json(out / "sweep" / "sweep.json")["points"]
        found[engine] = [(p["lambda"], p["mean@k"], p["tokens"], p["think_ratio"]) for p in points]
        assert not list(out.rglob("*.safetensors"))  # one candidate at a time, and none is left
    assert found["vllm"] == found["embedded"]
