"""Has a merge config the shape that mergekit reads? Asked before anything looks into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from thinkswitch_plugin import files
from thinkswitch_plugin.errors import ThinkSwitchError


def check_shape(path: Path) -> None:
    """Raise `ThinkSwitchError` naming file and field where a merge config has another type than mergekit's."""
    if fault := _fault(files.read_yaml(path)):
        raise ThinkSwitchError(f"{path}: {fault}.")


def _fault(config: dict[str, Any]) -> str | None:
    if not isinstance(config.get("merge_method"), str):
        return "`merge_method` is missing or not text"
    for name in ("models", "slices"):
        if not isinstance(config.get(name), list | None):
            return f"`{name}` must be a list, found {type(config[name]).__name__}"
    blocks: list[tuple[str, Any]] = [("", config)]
    for name in ("models", "slices"):
        blocks += [(f"{name}[{place}].", block) for place, block in enumerate(config.get(name) or [])]
    for where, block in blocks:
        if not isinstance(block, dict):
            return f"`{where.rstrip('.')}` must be a mapping, found {type(block).__name__}"
        if not isinstance(block.get("parameters"), dict | None):
            return f"`{where}parameters` must be a mapping, found {type(block['parameters']).__name__}"
    for place, block in enumerate(config.get("models") or []):
        if not block.get("model"):
            return f"`models[{place}].model` is missing"
    return None
