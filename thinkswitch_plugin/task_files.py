"""The files that an lm-eval task of ours is made of, for the stamps of the stages that use it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from thinkswitch_plugin.sources import DATA_VARIABLE

TASKS = Path("lm_eval_tasks")


class _AnyTag(yaml.SafeLoader):
    """Reads task files, whose `!function` tags name Python functions, without calling anything."""


_AnyTag.add_multi_constructor("!", lambda loader, tag, node: {"function": str(getattr(node, "value", ""))})


def task_files(name: str) -> tuple[Path, ...]:
    """The files that an lm-eval task of ours is made of: YAML, what it includes, functions, local data."""
    found: dict[Path, None] = {}

    def visit(path: Path) -> None:
        if not path.is_file() or path in found:
            return
        found[path] = None
        for key, text in _texts(_read(path)):
            if key == "include":
                visit(path.parent / text)
            elif key == "function":
                visit(path.parent / f"{text.split('.')[0]}.py")
            elif Path(text).suffix in (".json", ".jsonl", ".csv", ".parquet"):
                visit(Path(text))

    visit(TASKS / f"{name}.yaml")
    if folder := os.environ.get(DATA_VARIABLE):
        found[Path(folder)] = None
    return tuple(found)


def repeats(name: str) -> int:
    """How many answers to each question a task of ours asks for."""
    return next((int(values["repeats"]) for values in _every(name) if "repeats" in values), 1)


def budget(name: str) -> int | None:
    """The tokens that a task of ours gives to an answer; None where it does not say, or is not ours."""
    settings = (values.get("generation_kwargs") or {} for values in _every(name))
    return next((int(found["max_gen_toks"]) for found in settings if "max_gen_toks" in found), None)


def _every(name: str) -> Iterator[dict[str, Any]]:
    """A task's YAML file, then what that includes."""
    yield from (values for path in task_files(name) if isinstance(values := _read(path), dict))


def _read(path: Path) -> Any:
    if path.suffix != ".yaml":
        return None
    try:
        return yaml.load(path.read_bytes(), Loader=_AnyTag)
    except (yaml.YAMLError, UnicodeDecodeError):
        return None  # lm-eval says what is wrong with it


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, key)
