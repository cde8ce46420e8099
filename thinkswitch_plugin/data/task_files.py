"""lm-eval's tasks: loaded by lm-eval, and of ours the files they consist of and what their YAML says."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from thinkswitch_plugin import places
from thinkswitch_plugin.answer_kinds import KINDS
from thinkswitch_plugin.errors import ThinkSwitchError, reason

MODULE = "thinkswitch_tasks"  # holds the functions that our task files name
AGREEMENT = "agreement"  # what a task without gold answers reports; its functions are called agreement_KIND


class _AnyTag(yaml.SafeLoader):
    """Reads task files, whose `!function` tags name Python functions, without calling anything."""


class _Tagged(yaml.SafeDumper):
    """Writes what `_AnyTag` has read, and a text of several lines as a block."""


def _dict(dumper: yaml.SafeDumper, value: dict[str, Any]) -> yaml.Node:
    if set(value) == {"function"}:
        return dumper.represent_scalar("!function", value["function"])
    return dumper.represent_dict(value.items())


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_AnyTag.add_multi_constructor("!", lambda loader, tag, node: {"function": str(getattr(node, "value", ""))})
_Tagged.add_representer(dict, _dict)
_Tagged.add_representer(str, _text)


def dumps(values: dict[str, Any]) -> str:
    """The YAML of a task or a recipe; a function is a mapping `{"function": "module.name"}`."""
    return str(yaml.dump(values, Dumper=_Tagged, sort_keys=False, allow_unicode=True, width=100))


def installed() -> Path | None:
    """The folder of our tasks that lm-eval finds without an option (a checkout links its own), None if there is none."""
    spec = find_spec("lm_eval")
    roots = [Path(root) for root in (spec and spec.submodule_search_locations) or ()]
    modules = [root / "tasks" / "thinkswitch" / f"{MODULE}.py" for root in roots]
    return next((module.resolve().parent for module in modules if module.is_file()), None)


def place(name: str) -> Path:
    """The YAML file of a task in `lm_eval_tasks/`: the user's own, that of the checkout, or that of an installed wheel."""
    path = places.find(f"{places.TASKS}/{name}.yaml")
    shipped = None if path.is_file() else installed()
    return shipped / path.name if shipped and (shipped / path.name).is_file() else path


def kind_of_task(name: str, folder: Path | None = None) -> str | None:
    """A key of `KINDS` if it is one of our tasks and grades with one, otherwise None."""
    kind = _grades_by(name, folder).removeprefix("grade_").removeprefix(f"{AGREEMENT}_")
    return kind if kind in KINDS else None


def measures_agreement(name: str) -> bool:
    """Whether one of our tasks has no gold answers, and compares with the majority of the thinking checkpoint's."""
    return _grades_by(name).startswith(f"{AGREEMENT}_")


def reference_files(name: str) -> tuple[Path, Path]:
    """The questions of a task without gold answers, and the file with the reference answers to them.

    Raises `ThinkSwitchError` if the task does not name both.
    """
    for values in _every(name):
        data = (values.get("dataset_kwargs") or {}).get("data_files") or {}
        questions = (values.get("metadata") or {}).get("questions")
        if questions and data.get("test"):
            return places.find(questions), Path(data["test"])
    raise ThinkSwitchError(
        f"{place(name)} must name its questions as `metadata.questions` and the reference answers as "
        "`dataset_kwargs.data_files.test`; `thinkswitch init` writes such a task."
    )


def _grades_by(name: str, folder: Path | None = None) -> str:
    """The name of the function that grades in one of our tasks; empty if there is none."""
    functions = (values.get("process_results") for values in _every(name, folder))
    function = next((str(value["function"]) for value in functions if isinstance(value, dict)), "")
    return function.rpartition(".")[2]


def task_files(name: str, folder: Path | None = None, data: str = "") -> tuple[Path, ...]:
    """The files that an lm-eval task of ours is made of: YAML, what it includes, functions, local data.

    Args:
        folder: where its YAML lies, where that is not the folder of our tasks.
        data: a folder that evaluation sets are read from.
    """
    found: dict[Path, None] = {}

    def visit(path: Path) -> None:
        if not path.is_file() or path in found:
            return
        found[path] = None
        for key, text in _texts(read(path)):
            if key == "include":
                visit(path.parent / text)
            elif key == "function":
                visit(path.parent / f"{text.split('.')[0]}.py")
            elif Path(text).suffix in (".json", ".jsonl", ".csv", ".parquet"):
                visit(places.find(text))

    visit(folder / f"{name}.yaml" if folder else place(name))
    if data:
        found[Path(data)] = None
    return tuple(found)


def load(name: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """A task as lm-eval loads it, `changes` put into its YAML; tasks of a group, if the name is a group's.

    Raises `ThinkSwitchError` if lm-eval does not know or cannot load the task.
    """
    from lm_eval.tasks import TaskManager, get_task_dict

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=str(place(name).parent), include_defaults=not is_ours(name))
    if name not in manager.all_tasks:
        raise ThinkSwitchError(
            f"lm-eval knows no task {name!r}; put its YAML into lm_eval_tasks/, or name one that `lm_eval ls tasks` lists."
        )
    try:
        return dict(get_task_dict([{"task": name, **changes} if changes else name], manager))
    except ThinkSwitchError:
        raise
    except Exception as error:  # whatever a task file and the libraries that load its data raise
        raise ThinkSwitchError(f"The questions of lm-eval's task {name} cannot be loaded: {reason(error)}.") from None


def is_ours(name: str) -> bool:
    """Whether a task lies in the folder of our tasks."""
    return place(name).is_file()


def repeats(name: str) -> int:
    """The number of answers per question in one of our tasks."""
    return next((int(values["repeats"]) for values in _every(name) if "repeats" in values), 1)


def budget(name: str) -> int | None:
    """The token budget of an answer in one of our tasks; None if it sets none, or is another task."""
    settings = (values.get("generation_kwargs") or {} for values in _every(name))
    return next((int(found["max_gen_toks"]) for found in settings if "max_gen_toks" in found), None)


def evaluation_set(name: str) -> tuple[str, str]:
    """The hub id and the name of a task's questions, by `dataset` and `dataset_name` of its metadata; else the task's."""
    about = next((found for values in _every(name) if "dataset" in (found := values.get("metadata") or {})), {})
    dataset = str(about.get("dataset", name))
    return dataset, str(about.get("dataset_name", dataset))


def _every(name: str, folder: Path | None = None) -> Iterator[dict[str, Any]]:
    """A task's YAML file, then what that includes."""
    yield from (values for path in task_files(name, folder) if isinstance(values := read(path), dict))


def read(path: Path) -> Any:
    """The values of a task file, functions as in `dumps`; None if it is not YAML."""
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
