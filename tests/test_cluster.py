"""Work that is spread over a Ray cluster: three nodes on this machine, one of which is lost on the way."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import BIN
from thinkswitch_plugin import files
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.run import cluster

pytest.importorskip("ray")


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """Three nodes with one processor each, to which this process is connected."""
    import ray
    from ray.cluster_utils import Cluster

    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    others = [started.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=started.address, log_to_driver=False)
    yield started, others
    ray.shutdown()
    started.shutdown()


def work(folder: Path, number: int) -> int:
    with (folder / f"{number}.txt").open("a") as handle:
        handle.write("attempt\n")
    time.sleep(0.2)
    if number == 77:
        raise ThinkSwitchError("this point cannot be merged.")
    return number * number


def test_the_tasks_of_a_lost_node_are_done_again_and_every_result_comes_once(nodes: Any, tmp_path: Path) -> None:
    started, others = nodes
    found: dict[str, int] = {}

    def finished(name: str, result: int) -> None:
        assert name not in found
        found[name] = result
        if len(found) == 2:
            started.remove_node(others.pop())

    tasks = {f"point {n}": (tmp_path, n) for n in range(6)}
    cluster.scatter("auto", work, tasks, finished, "points")
    assert found == {f"point {n}": n * n for n in range(6)}
    attempts = sum(len(path.read_text().splitlines()) for path in tmp_path.glob("*.txt"))
    assert 6 <= attempts <= 7


def test_a_task_that_fails_is_named_with_its_host_and_the_others_are_finished(nodes: Any, tmp_path: Path) -> None:
    found: list[str] = []
    tasks = {f"point {n}": (tmp_path, n) for n in (77, 1, 2)}
    with pytest.raises(
        ThinkSwitchError, match=r"1 of 3 tasks failed.*point 77 failed on \S+: this point cannot be merged"
    ):
        cluster.scatter("auto", work, tasks, lambda name, _: found.append(name), "points")
    assert sorted(found) == ["point 1", "point 2"]


@pytest.mark.slow
def test_a_sweep_over_nodes_finds_what_it_finds_on_one_machine_and_then_has_nothing_to_do(
    nodes: Any, finished_run: Path, forked: Any, tmp_path: Path
) -> None:
    def sweep(name: str, *cluster: str) -> tuple[list[dict[str, Any]], str]:
        words = ["--domain", "arithmetic", "--runs", finished_run.parent, "--lambdas", "0.3 0.8", "--limit", "20"]
        command = [BIN / "thinkswitch", "sweep", *words, "--out", tmp_path / name, *cluster]
        done = forked(*command, RAY_ADDRESS=nodes[0].address)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        points = files.read_json(tmp_path / name / "sweep" / "sweep.json")["points"]
        return [{k: v for k, v in point.items() if k != "seconds"} for point in points], done.stdout + done.stderr

    serial, _ = sweep("serial")
    spread, _ = sweep("spread", "--cluster", "auto")
    assert spread == serial and len(serial) == 2
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("spread/sweep/points/*/candidate.json")}
    assert sweep("spread", "--cluster", "auto")[0] == serial
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps and len(stamps) == 2
