"""Where the files lie that users name and this package does not hold: recipes, merge configs, lm-eval tasks.

A file of the current folder comes first, so that users' own count; then the one of the checkout this package lies in.
"""

from __future__ import annotations

from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
RECIPES, TASKS, MERGE_CONFIGS = "recipes", "lm_eval_tasks", "merge_configs"
CPU_OVERLAY = f"{RECIPES}/cpu.overlay.yaml"
VLLM_PYTHON = ".venv-vllm/bin/python"  # made by `make setup-vllm`; vLLM cannot share axolotl's environment


def find(path: str | Path) -> Path:
    """A file or folder as it is named; the checkout's where only that one exists."""
    here, there = Path(path), CHECKOUT / path
    return there if there.exists() and not here.exists() else here


def names(folder: str, ending: str) -> list[str]:
    """The names, without their ending, of a folder's files, also of those in the checkout; sorted."""
    found = (path.name for place in (Path(folder), CHECKOUT / folder) for path in place.glob(f"*{ending}"))
    return sorted({name.removesuffix(ending) for name in found})
