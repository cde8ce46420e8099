"""The machine, and the environment variables of other programs: the only module besides the command line that reads any.

The variables are not settings of ThinkSwitch: CUDA defines which devices a program may see, OpenSSL and requests name the
trusted certificates, and a key must not travel in values that are printed or stored, so it is read where it is sent.
Make sets MAKELEVEL, and `thinkswitch iterate` INSTALLED for the Makefile.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any, Literal

Variable = Literal[
    "CUDA_VISIBLE_DEVICES",
    "INSTALLED",
    "MAKELEVEL",
    "OPENAI_API_KEY",
    "PYTHONPATH",
    "SSL_CERT_FILE",
    "REQUESTS_CA_BUNDLE",
    "SSL_CERT_DIR",
    "VLLM_PYTHON",
]


def variable(name: Variable) -> str | None:
    """The value of a variable; None if it is not set."""
    return os.environ.get(name)


def has_cuda() -> bool:
    """Whether a CUDA device is there, without importing torch."""
    driver = Path("/proc/driver/nvidia/version").exists() or Path("/dev/dxg").exists()  # the latter on WSL 2
    return driver and variable("CUDA_VISIBLE_DEVICES") != ""


def without_gpu_kernels() -> None:
    """Have transformers compute Qwen3-Next, Qwen3.5 and the like without the package `fla` on a machine with no GPU.

    transformers takes its kernels wherever it is installed, and they need a GPU. Call it before a model's class is imported.
    """
    import torch

    if not torch.cuda.is_available():
        sys.modules["fla"] = None  # type: ignore[assignment]


def hardware() -> dict[str, Any]:
    """Processor, cores, memory and GPU of this machine."""
    import psutil

    gpu = None
    if has_cuda():
        import torch

        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    memory = round(psutil.virtual_memory().total / 2**30, 1)
    return {"machine": platform.machine(), "cores": len(os.sched_getaffinity(0)), "memory_gb": memory, "gpu": gpu}
