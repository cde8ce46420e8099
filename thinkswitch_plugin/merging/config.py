"""Merge configs: insert a pair and λ, and refuse what mergekit would ignore.

A config of `merge_configs/` is an ordinary mergekit YAML whose models are called
`./instruct` and `./thinking` (so it runs as it stands in a folder that holds both). The loop
puts the real folders in their places and sets λ. One key is ours and not mergekit's:

    may_differ:
      rope_parameters: ./instruct     # this setting may differ; the result has the value of ./instruct
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thinkswitch_plugin import files, places
from thinkswitch_plugin.args import RebuildKeys
from thinkswitch_plugin.errors import ThinkSwitchError

NAME = "thinkswitch"  # the mergekit method of `method.py`
MAY_DIFFER = "may_differ"
MODEL_KEYS = ("model", "base_model", "source")
PARAMETERS = ("lambda", "lambda_attention", "lambda_ffn", "lambda_rest", "path")


def place_models(config: Any, roles: Mapping[str, str]) -> Any:
    """A merge config with names such as `./instruct` replaced by the folders of `roles`."""
    if isinstance(config, list):
        return [place_models(item, roles) for item in config]
    if not isinstance(config, dict):
        return config
    placed: dict[str, Any] = {}
    for key, value in config.items():
        if key in MODEL_KEYS and isinstance(value, str):
            placed[key] = roles.get(role(value), value)
        elif key == MAY_DIFFER:
            placed[key] = {setting: roles.get(role(model), model) for setting, model in value.items()}
        else:
            placed[key] = place_models(value, roles)
    return placed


def named_models(config: Any) -> set[str]:
    """Every model that a merge config names, `./` left off."""
    if isinstance(config, dict):
        own = {role(value) for key, value in config.items() if key in MODEL_KEYS and isinstance(value, str)}
        return own.union(*map(named_models, config.values()))
    return set().union(*map(named_models, config)) if isinstance(config, list) else set()


def allow(config: dict[str, Any], may_differ: Mapping[str, str]) -> dict[str, Any]:
    """A merge config with settings that may differ put in: setting -> `instruct` or `thinking`, whose value counts.

    An entry in the config itself takes precedence.
    """
    allowed = {setting: f"./{mode}" for setting, mode in may_differ.items()} | (config.get(MAY_DIFFER) or {})
    return {**config, MAY_DIFFER: allowed} if allowed else config


def of_recipe(keys: RebuildKeys) -> tuple[dict[str, Any], Path]:
    """The merge config that a recipe names, checked, with what the recipe lets differ put in; and its file."""
    path = places.find(keys.config)
    return allow(read_config(path), keys.may_differ), path


def without_ours(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Path]]:
    """A merge config as mergekit reads it, and what it says under `may_differ`: setting -> checkpoint folder."""
    own = {key: value for key, value in config.items() if key != MAY_DIFFER}
    return own, {setting: Path(folder) for setting, folder in (config.get(MAY_DIFFER) or {}).items()}


def fit_layers(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """A config's `layer_range`s, scaled where they were written for a model of another depth.

    Thirds of 36 layers become thirds (to the nearest layer) of `layers`; a slice that is
    left without a layer is dropped. A config without slices is returned as it is.
    """
    slices = config.get("slices")
    if not slices:
        return config
    depth = max(source["layer_range"][1] for piece in slices for source in piece["sources"])
    if depth == layers:
        return config

    def scale(source: dict[str, Any]) -> dict[str, Any]:
        return {**source, "layer_range": [round(edge * layers / depth) for edge in source["layer_range"]]}

    scaled = [{**piece, "sources": [scale(source) for source in piece["sources"]]} for piece in slices]
    kept = [p for p in scaled if p["sources"][0]["layer_range"][0] < p["sources"][0]["layer_range"][1]]
    return {**config, "slices": kept}


def role(model: Any) -> str:
    """`thinking` of `./thinking`; mergekit takes a name without a slash for a hub id."""
    return str(model).removeprefix("./")


def set_lambda(config: dict[str, Any], weight: float, where: Path) -> dict[str, Any]:
    """A merge config with λ, the weight of the thinking checkpoint, put in.

    The one place where λ becomes mergekit's own numbers: slerp's `t` is the share of
    the *other* model, so with the thinking checkpoint as base it is 1 − λ.
    Raises `ThinkSwitchError` for a method whose λ cannot be set so.
    """
    method = config.get("merge_method")
    parameters = dict(config.get("parameters") or {})
    if method == "linear":
        named = [role(entry.get("model")) for entry in config.get("models") or [] if isinstance(entry, dict)]
        if sorted(named) != ["instruct", "thinking"]:
            raise ThinkSwitchError(f"{where}: `models` must be ./instruct and ./thinking, found {named}.")
        weights = {"thinking": weight, "instruct": round(1.0 - weight, 12)}
        models = [
            {**entry, "parameters": {**(entry.get("parameters") or {}), "weight": weights[role(entry["model"])]}}
            for entry in config["models"]
        ]
        return {**config, "models": models}
    if method not in ("slerp", NAME):
        raise ThinkSwitchError(
            f"{where}: λ cannot be set for merge_method {method!r}; use slerp, thinkswitch or linear."
        )
    if role(config.get("base_model")) != "thinking":
        raise ThinkSwitchError(f"{where}: `base_model` must be `./thinking`, whose weight λ is.")
    if method == "slerp":
        if not isinstance(parameters.get("t", 0.0), int | float) or "slices" in config:
            raise ThinkSwitchError(f"{where}: `t` must be one number for the loop to set λ; see docs/how-it-works.md.")
        return {**config, "parameters": {**parameters, "t": round(1.0 - weight, 12)}}
    return {**config, "parameters": {**parameters, "lambda": weight}}


def read_config(path: Path) -> dict[str, Any]:
    """Read a merge config; refuse another shape than mergekit's, and parameters that it would ignore or find wrong half-way.

    Raises `ThinkSwitchError` naming file and field, before any tensor is read.
    """
    config = files.read_yaml(path)
    if fault := _fault(config):
        raise ThinkSwitchError(f"{path}: {fault}.")
    if config.get("merge_method") != NAME:
        return config
    blocks = [config, *(config.get("slices") or [])]
    for block in blocks:
        for key, value in (block.get("parameters") or {}).items():
            if key not in PARAMETERS:
                raise ThinkSwitchError(
                    f"{path}: `{key}` is not a parameter of {NAME}; known are {', '.join(PARAMETERS)}."
                )
            _check_value(path, key, value)
    if not any("lambda" in (block.get("parameters") or {}) for block in blocks):
        raise ThinkSwitchError(f"{path}: `parameters.lambda` is missing (the weight of the thinking checkpoint).")
    return config


def _check_value(path: Path, key: str, value: Any) -> None:
    # A list is mergekit's gradient over layers, a mapping one of its filters.
    for item in value if isinstance(value, list) else [value]:
        scalar = item.get("value") if isinstance(item, dict) else item
        if key == "path":
            if scalar not in ("spherical", "linear"):
                raise ThinkSwitchError(f"{path}: `path` is {scalar!r}; use spherical or linear.")
        elif isinstance(scalar, list):
            _check_value(path, key, scalar)
        elif isinstance(scalar, bool) or not isinstance(scalar, int | float) or not math.isfinite(scalar):
            raise ThinkSwitchError(f"{path}: `{key}` is {scalar!r}; use a finite number.")


def _fault(config: dict[str, Any]) -> str | None:
    if not isinstance(config.get("merge_method"), str):
        return "`merge_method` is missing or not text"
    allowed = config.get(MAY_DIFFER) or {}
    if not isinstance(allowed, dict) or not all(isinstance(word, str) for pair in allowed.items() for word in pair):
        return f"`{MAY_DIFFER}` must map settings of config.json to models, such as `rope_parameters: ./thinking`"
    if unknown := sorted(model for model in allowed.values() if role(model) not in named_models(config)):
        return f"`{MAY_DIFFER}` names {unknown[0]}, which is not a model of this config"
    blocks: list[tuple[str, Any]] = [("", config)]
    for name in ("models", "slices"):
        if not isinstance(config.get(name), list | None):
            return f"`{name}` must be a list, found {type(config[name]).__name__}"
        blocks += [(f"{name}[{place}].", block) for place, block in enumerate(config.get(name) or [])]
    for where, block in blocks:
        if not isinstance(block, dict):
            return f"`{where.rstrip('.')}` must be a mapping, found {type(block).__name__}"
        if not isinstance(block.get("parameters"), dict | None):
            return f"`{where}parameters` must be a mapping, found {type(block['parameters']).__name__}"
        if where.startswith("models") and not block.get("model"):
            return f"`{where}model` is missing"
    return None
