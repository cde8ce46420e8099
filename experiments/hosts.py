"""Hosts on one machine: network namespaces on a bridge, each with an address, a host name and a loopback of its own.

They share the processors and the file system, as nodes of a cluster share theirs. Needs root, and `ip`, `nsenter` and `unshare`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

BRIDGE, NETWORK = "tsbridge", "10.77.0"


@dataclass(frozen=True)
class Host:
    """One of the hosts; `interface` is the name of its network card."""

    name: str
    address: str
    interface: str = "eth0"

    def command(self, words: Sequence[str | Path]) -> list[str]:
        """The command line that runs a command there."""
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name]
        return ["nsenter", f"--net=/run/netns/{self.name}", *named, *map(str, words)]

    def kill(self) -> None:
        """Kill everything that runs there, at once, as a power cut does."""
        found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True)
        for pid in map(int, found.stdout.split()):
            with suppress(psutil.NoSuchProcess):
                psutil.Process(pid).kill()


def missing() -> str:
    """What this machine lacks for hosts of its own; empty if nothing."""
    if os.geteuid():
        return "network namespaces need root"
    lacking = [name for name in ("ip", "nsenter", "unshare") if shutil.which(name) is None]
    return f"the command `{lacking[0]}` is not installed" if lacking else ""


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """So many hosts, which reach each other and this machine (at .254); nothing of them is left afterwards."""
    found = [Host(f"tshost{n}", f"{NETWORK}.{n}") for n in range(1, count + 1)]
    try:
        _ip("link", "add", BRIDGE, "type", "bridge")
        _ip("address", "add", f"{NETWORK}.254/24", "dev", BRIDGE)
        _ip("link", "set", BRIDGE, "up")
        for host in found:
            _ip("netns", "add", host.name)
            ours = f"{host.name}-0"
            _ip("link", "add", ours, "type", "veth", "peer", "name", host.interface, "netns", host.name)
            _ip("link", "set", ours, "master", BRIDGE, "up")
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", host.interface)
            for interface in ("lo", host.interface):
                _ip("-n", host.name, "link", "set", interface, "up")
        yield found
    finally:
        for host in found:
            with suppress(subprocess.CalledProcessError):
                host.kill()
                _ip("netns", "delete", host.name)
        with suppress(subprocess.CalledProcessError):
            _ip("link", "delete", BRIDGE)
