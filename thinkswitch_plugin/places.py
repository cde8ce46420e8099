"""Find the files that users name and that are not Python: recipes, merge configs, lm-eval tasks.

A file in the current folder takes precedence, so that users can replace one; otherwise the file of the checkout is
used, or, if the package was installed without one, the file that the wheel holds.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
SHIPPED = PACKAGE / "shipped"  # in an installed wheel only; pyproject.toml says what it holds
HOME = SHIPPED if SHIPPED.is_dir() else PACKAGE.parent
RECIPES, TASKS, MERGE_CONFIGS = "recipes", "lm_eval_tasks", "merge_configs"
OURS = "package:"
CPU_OVERLAY = f"{RECIPES}/cpu.overlay.yaml"
VLLM_PYTHON = ".venv-vllm/bin/python"  # made by `make setup-vllm`; vLLM cannot share axolotl's environment


def find(path: str | Path) -> Path:
    """A file or folder by its name; ours if only that exists."""
    here, there = Path(path), HOME / path
    return there if there.exists() and not here.exists() else here


def named(path: Path) -> str:
    """A name for `opened`: of a file of ours, wherever the package is installed; of others, their path."""
    return f"{OURS}{path.relative_to(HOME)}" if path.is_relative_to(HOME) else str(path)


def opened(name: str) -> Path:
    """The file that `named` names; a file of the same name in the current folder is not taken for ours."""
    return HOME / name.removeprefix(OURS) if name.startswith(OURS) else Path(name)


def names(folder: str, ending: str) -> list[str]:
    """The names, without their ending, of a folder's files, ours among them; sorted."""
    found = (path.name for place in (Path(folder), HOME / folder) for path in place.glob(f"*{ending}"))
    return sorted({name.removesuffix(ending) for name in found})
