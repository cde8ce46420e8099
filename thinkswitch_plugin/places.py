"""Find the files that users name and that are not part of the package: recipes, merge configs, lm-eval tasks.

A file in the current folder takes precedence, so that users can replace one; otherwise the file of the checkout is used.
"""

from __future__ import annotations

from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
RECIPES, TASKS, MERGE_CONFIGS = "recipes", "lm_eval_tasks", "merge_configs"
CPU_OVERLAY = f"{RECIPES}/cpu.overlay.yaml"
VLLM_PYTHON = ".venv-vllm/bin/python"  # made by `make setup-vllm`; vLLM cannot share axolotl's environment


def find(path: str | Path) -> Path:
    """A file or folder by its name; the one of the checkout if only that exists."""
    here, there = Path(path), CHECKOUT / path
    return there if there.exists() and not here.exists() else here


def names(folder: str, ending: str) -> list[str]:
    """The names, without their ending, of a folder's files, also of those in the checkout; sorted."""
    found = (path.name for place in (Path(folder), CHECKOUT / folder) for path in place.glob(f"*{ending}"))
    return sorted({name.removesuffix(ending) for name in found})
