"""What this machine has."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from thinkswitch_plugin.environment import variable


def has_cuda() -> bool:
    """Whether a CUDA device is there, without importing torch."""
    driver = Path("/proc/driver/nvidia/version").exists() or Path("/dev/dxg").exists()  # the latter on WSL 2
    return driver and variable("CUDA_VISIBLE_DEVICES") != ""


def hardware() -> dict[str, Any]:
    """Processor, cores, memory and GPU of this machine."""
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    found: dict[str, Any] = {
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(pages * size / 2**30, 1),
        "gpu": None,
    }
    if has_cuda():
        import torch

        found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return found
