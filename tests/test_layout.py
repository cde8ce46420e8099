"""How the work is spread over GPUs, machines and servers, and that this changes nothing about what is learnt."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from thinkswitch_plugin import environment, files
from thinkswitch_plugin.engine_args import learning_options
from thinkswitch_plugin.engines.servers import data_parallel
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.run import processes
from thinkswitch_plugin.training.layout import spread

CONFIG = {"micro_batch_size": 4, "gradient_accumulation_steps": 3}


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(environment, "has_cuda", lambda: True)
    return lambda names: monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)


@pytest.mark.parametrize(
    ("options", "processes", "each"),
    [
        (["--launcher", "torchrun", "--", "--nproc_per_node", "2"], 2, (3, 2)),
        (["--launcher=torchrun", "--", "--nproc-per-node=2", "--nnodes", "3", "--node_rank", "1"], 6, (2, 1)),
        (["--launcher", "accelerate", "--", "--num_processes", "12"], 12, (1, 1)),
        (["--launcher", "python"], 1, (4, 3)),
    ],
)
def test_a_step_has_the_same_rows_with_any_number_of_processes(
    gpus: Any, options: list[str], processes: int, each: tuple[int, int]
) -> None:
    gpus("0")
    config, kept, found = spread(CONFIG, options)
    assert (found, kept) == (processes, options)
    assert (config["micro_batch_size"], config["gradient_accumulation_steps"]) == each


@pytest.mark.parametrize(("number", "reason"), [("5", "divides 12"), ("two", "whole number above 0")])
def test_processes_that_cannot_share_a_step_are_refused(number: str, reason: str) -> None:
    with pytest.raises(ThinkSwitchError, match=reason):
        spread(CONFIG, ["--launcher", "torchrun", "--", "--nproc_per_node", number])


def test_accelerate_without_a_gpu_is_refused_instead_of_learning_from_a_share_of_each_step(
    gpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "has_cuda", lambda: False)
    with pytest.raises(ThinkSwitchError, match="torchrun, --, --nproc_per_node, 2"):
        spread(CONFIG, ["--", "--num-processes", "2"])
    with pytest.raises(ThinkSwitchError, match="needs GPUs"):
        spread(CONFIG, ["--launcher", "accelerate", "--", "--num_processes", "2"])
    monkeypatch.setattr(environment, "has_cuda", lambda: True)
    gpus("0,1")
    assert spread(CONFIG, ["--", "--num-processes", "2"])[2] == 2


def test_distributions_are_learnt_by_one_process_and_a_batch_is_a_number(gpus: Any) -> None:
    gpus("0,1")
    assert spread({**CONFIG, "kd_trainer": True}, [])[2] == 1
    with pytest.raises(ThinkSwitchError, match="works with one"):
        spread({**CONFIG, "kd_trainer": True}, ["--launcher", "torchrun", "--", "--nproc_per_node", "2"])
    with pytest.raises(ThinkSwitchError, match="whole numbers"):
        spread({"micro_batch_size": "two"}, [])


def test_an_engine_finds_the_launchers_of_its_own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    asks = "import shutil; print(shutil.which('torchrun'), shutil.which('accelerate'))"
    processes.run_logged(["python", "-c", asks], tmp_path / "log", title="which")
    found = (tmp_path / "log").read_text().split()
    assert found == [str(Path(sys.executable).with_name(name)) for name in ("torchrun", "accelerate")]


def test_all_visible_gpus_train_that_can_share_a_step_and_gpus_takes_the_first(gpus: Any) -> None:
    gpus("0,1,2,3,7")
    config, options, processes = spread(CONFIG, ["--debug"])
    assert processes == 4 and config["micro_batch_size"] * config["gradient_accumulation_steps"] == 3
    assert options == ["--debug", "--launcher", "torchrun", "--", "--nproc_per_node", "4"]
    environment.use_gpus(2)
    assert environment.variable("CUDA_VISIBLE_DEVICES") == "0,1"
    assert spread(CONFIG, [])[2] == 2
    with pytest.raises(ThinkSwitchError, match="GPUS=8, but 2 GPUs are visible"):
        environment.use_gpus(8)
    gpus("7")
    assert spread(CONFIG, ["--debug"]) == (CONFIG, ["--debug"], 1)


@pytest.mark.parametrize(
    ("words", "added"),
    [
        ([], ["--data-parallel-size", "8"]),
        (["--tensor_parallel_size=2", "-pp", "2"], ["--data-parallel-size", "2"]),
        (["-tp", "8"], []),
        (["--data-parallel-size-local", "1"], []),
        (["--nnodes", "2"], []),
    ],
)
def test_vllm_fills_the_visible_gpus_with_copies(gpus: Any, words: list[str], added: list[str]) -> None:
    gpus("0,1,2,3,4,5,6,7")
    assert data_parallel(words) == added


def test_options_of_the_launcher_do_not_count_as_learning() -> None:
    over_nodes = ["--launcher", "torchrun", "--", "--nproc_per_node", "2", "--nnodes=2", "--rdzv_endpoint", "a:1"]
    assert learning_options(over_nodes) == []
    assert learning_options(["--learning-rate", "0.1", *over_nodes]) == ["--learning-rate", "0.1"]


@pytest.mark.parametrize("name", ["slurm.sbatch", "skypilot.yaml", "kuberay.yaml"])
def test_a_launcher_can_be_read_and_runs_a_target_of_the_makefile(name: str) -> None:
    path = ROOT / "recipes" / "cluster" / name
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        assert isinstance(files.read_yaml(path), dict)
        targets = re.findall(r"^\s*(?:make|entrypoint: make -C /thinkswitch) ([a-z-]+)", text, re.MULTILINE)
        assert targets and all(f"\n{target}:" in (ROOT / "Makefile").read_text() for target in targets)
    else:
        subprocess.run(["bash", "-n", path], check=True)
        assert 'exec make "$@"' in text


def test_a_dry_run_prints_what_would_be_submitted_to_slurm() -> None:
    words = ["GOAL=sweep", "DOMAIN=aime", "NODES=4", "LAMBDAS=0 0.1 … 1", "SBATCH=--gpus-per-node=8", "DRYRUN=1"]
    done = subprocess.run(["make", "-s", "submit-slurm", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    command, _, script = done.stdout.partition("\n")
    assert shlex.split(command) == [
        *("sbatch", "--job-name=sweep-aime", "--nodes=4", "--gpus-per-node=8"),
        *("./recipes/cluster/slurm.sbatch", "sweep", "DOMAIN=aime", "LAMBDAS=0 0.1 … 1"),
    ]
    assert script == (ROOT / "recipes" / "cluster" / "slurm.sbatch").read_text(encoding="utf-8")
