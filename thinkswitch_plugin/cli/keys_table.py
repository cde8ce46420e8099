"""Every key under `thinkswitch:` as rows of docs/recipes.md."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from thinkswitch_plugin.args import ThinkSwitchKeys, keys_of


def keys_table(model: type[BaseModel] = ThinkSwitchKeys, above: str = "") -> Iterator[list[str]]:
    """Key, type, default and meaning of every key, as rows of docs/recipes.md."""
    for name, field in sorted(model.model_fields.items(), key=lambda item: item[0] not in model.__annotations__):
        key = f"{above}{field.alias or name}"
        if section := keys_of(field):
            yield from keys_table(section, f"{key}.")
        else:
            yield [f"`{key}`", _kind(field.annotation), _default(field), field.description or ""]


def _kind(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) is dict:
        return f"setting: {_kind(get_args(annotation)[1])}"
    if get_origin(annotation) is list:
        (inner,) = get_args(annotation)
        return f"list of {_kind(inner)}" + ("s" if get_origin(inner) is None else "")
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)] or [annotation]
    names = {str: "text", int: "whole number", float: "number", bool: "true, false", Any: "value"}
    return " or ".join("mapping" if get_origin(kind) is dict else names.get(kind, str(kind)) for kind in kinds)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return "" if field.default is None else f"`{json.dumps(field.default)}`"
