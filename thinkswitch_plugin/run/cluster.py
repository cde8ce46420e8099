"""Spread work that has no order over the machines of a Ray cluster: points of a sweep, merges, folds.

Ray places a task, and runs it again if its machine is lost. Every task runs the function that does the same work on one
machine, in the folder of the command that started it, which all machines must see under the same path.
"""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from thinkswitch_plugin import console, environment
from thinkswitch_plugin.errors import ThinkSwitchError, first_line
from thinkswitch_plugin.run import processes
from thinkswitch_plugin.run.progress import Bar

# Seconds that a second attempt waits for the folder of the first, whose machine was lost but may still be at work.
PATIENCE = 3600.0
ATTEMPTS_AFTER_LOSS = 5  # of a task whose machine was lost; one that fails by itself is not repeated


def scatter(
    address: str,
    work: Callable[..., Any],
    tasks: Mapping[str, tuple[Any, ...]],
    finished: Callable[[str, Any], None],
    title: str,
) -> None:
    """Call `work` once for each task, many at once, one a GPU if the cluster has GPUs.

    Args:
        address: `auto` (the cluster that this machine belongs to) or `ray://host:port`.
        work: a function of a module, which raises `ThinkSwitchError` if it fails.
        tasks: its arguments, by the task's name.
        finished: called here with the name of a task and its result, as soon as there is one.
        title: of the progress bar.

    Raises:
        ThinkSwitchError: there is no such cluster, or a task failed; the others are finished first.
    """
    if not tasks:
        return
    failed: list[str] = []
    with _connected(address) as ray, Bar(len(tasks), title, unit="task") as bar:
        options = {
            "num_cpus": 1,
            "num_gpus": 1 if ray.cluster_resources().get("GPU") else 0,
            "max_retries": ATTEMPTS_AFTER_LOSS,
            "max_calls": 1,  # the memory of a task, and what it started, go with its process
            "scheduling_strategy": "SPREAD",
        }
        remote = ray.remote(**options)(_in_place)
        told = environment.for_other_machines()
        left = {remote.remote(told, work, arguments): name for name, arguments in tasks.items()}
        while left:
            (done, *_), _ = ray.wait(list(left))
            name = left.pop(done)
            try:
                host, result, problem = ray.get(done)
            except ray.exceptions.RayError as error:
                host, result, problem = "the cluster", None, first_line(error)
            if problem:
                failed.append(f"{name} failed on {host}: {problem}")
                console.notice(f"  {failed[-1]}")
            else:
                finished(name, result)
            bar.update(1)
    if failed:
        raise ThinkSwitchError(f"{len(failed)} of {len(tasks)} tasks failed; the others are kept. {failed[0]}")


def _in_place(told: tuple[str, dict[str, str]], work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """What a machine of the cluster does: the host, and either the result or the problem."""
    folder, variables = told
    host = socket.gethostname()
    try:
        environment.take_over(folder, variables)
        console.quiet_engines()
        console.fetch_no_code()
        return host, work(*arguments), ""
    except (ThinkSwitchError, OSError) as error:
        return host, None, str(error)


def with_log(error: Exception, log: Path) -> ThinkSwitchError:
    """An error of a task with the end of its log, which lies on another machine's screen for nobody to see."""
    ending = processes.tail(log) if log.is_file() else ""
    return ThinkSwitchError(f"{error}\n{log} ends with:\n{ending}" if ending else str(error))


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """The module `ray`, connected; afterwards none of the tasks is left."""
    try:
        import ray
    except ImportError:
        raise ThinkSwitchError(
            "CLUSTER= needs Ray, which is not installed; run `pip install 'thinkswitch[ray]'` on every machine."
        ) from None
    before = signal.getsignal(signal.SIGTERM)
    joined = ray.is_initialized()
    try:
        if not joined:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ThinkSwitchError(
            f"CLUSTER={address}: no Ray cluster answers ({first_line(error)}); start one with `ray start --head`, and "
            "`ray start --address=…` on the other machines."
        ) from None
    finally:
        signal.signal(signal.SIGTERM, before)
    try:
        yield ray
    finally:
        if not joined:
            ray.shutdown()
