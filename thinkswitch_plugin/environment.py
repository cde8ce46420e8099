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

from thinkswitch_plugin.errors import ThinkSwitchError

Variable = Literal[
    "CUDA_VISIBLE_DEVICES",
    "INSTALLED",
    "MAKELEVEL",
    "OPENAI_API_KEY",
    "HF_TOKEN",
    "PATH",
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


def visible_gpus() -> int:
    """How many CUDA devices a program may see, without importing torch; 1 if there is a driver that does not list them."""
    if not has_cuda():
        return 0
    visible, listed = variable("CUDA_VISIBLE_DEVICES"), Path("/proc/driver/nvidia/gpus")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() and name.strip() != "-1"])
    return len(list(listed.iterdir())) if listed.is_dir() else 1


def use_gpus(count: int) -> None:
    """Let this process and those that it starts see only the first `count` of the visible GPUs.

    Raises `ThinkSwitchError` if fewer are visible.
    """
    if count > (found := visible_gpus()):
        raise ThinkSwitchError(f"GPUS={count}, but {found} GPUs are visible here; leave GPUS= out to use all.")
    visible = variable("CUDA_VISIBLE_DEVICES")
    names = [str(n) for n in range(visible_gpus())] if visible is None else visible.split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[:count])


def for_other_machines() -> tuple[str, dict[str, str]]:
    """The current folder, and the settings of this project and of the libraries, for the same work on another machine.

    Not the devices, which its scheduler assigns, and no key.
    """
    names = (
        "THINKSWITCH_",
        "HF_",
        "TRANSFORMERS_",
        "OMP_",
        "VLLM_",
        "TOKENIZERS_",
        "AXOLOTL_",
        "USE_HUB_KERNELS",
        "LOCAL_KERNELS",
    )
    kept = {n: v for n, v in os.environ.items() if n.startswith(names) and n not in ("HF_TOKEN", "THINKSWITCH_OWNER")}
    return str(Path.cwd()), kept


def take_over(folder: str, variables: dict[str, str]) -> None:
    """Work in that folder with these settings, which `for_other_machines` gave on the machine of the command."""
    os.environ.update(variables)
    os.chdir(folder)


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
