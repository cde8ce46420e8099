"""A recipe: one axolotl YAML a domain, with the keys of the loop under `thinkswitch:`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from thinkswitch_plugin import files, places
from thinkswitch_plugin.args import ThinkSwitchKeys, keys_of
from thinkswitch_plugin.engine_args import TEMPLATE_KEY
from thinkswitch_plugin.environment import has_cuda
from thinkswitch_plugin.errors import ThinkSwitchError

PREPARED = "prepared"  # axolotl's tokenized data, beside the adapter


@dataclass(frozen=True)
class Recipe:
    """A checked recipe with its overlays: `axolotl` holds every key but ours, `keys` ours."""

    path: Path
    axolotl: dict[str, Any]
    keys: ThinkSwitchKeys
    overlays: tuple[Path, ...] = ()


def require_domain_name(domain: str) -> None:
    """Raise `ThinkSwitchError` if a domain cannot have this name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", domain):
        raise ThinkSwitchError(f"DOMAIN={domain!r} is not a domain name; use letters, digits, `-` and `_`.")


def recipe_path(domain: str) -> Path:
    """Where the recipe of a domain lies. Raises `ThinkSwitchError` if there is none."""
    require_domain_name(domain)
    path = places.find(f"{places.RECIPES}/{domain}.yaml")
    if path.is_dir():
        raise ThinkSwitchError(f"{path} is a folder; a file is expected there.")
    if not path.is_file():
        known = [name for name in places.names(places.RECIPES, ".yaml") if not name.endswith(".overlay")]
        close = difflib.get_close_matches(domain, known, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ThinkSwitchError(
            f"There is no recipe {path} for DOMAIN={domain}; recipes here: {', '.join(known) or 'none'}.{hint}"
        )
    return path


def overlay_path(name: str) -> Path:
    """The file of `OVERLAY=name`: `recipes/name.overlay.yaml`, or a YAML file given by its path."""
    path = places.find(name if name.endswith((".yaml", ".yml")) else f"{places.RECIPES}/{name}.overlay.yaml")
    if not path.is_file():
        known = ", ".join(places.names(places.RECIPES, ".overlay.yaml"))
        raise ThinkSwitchError(f"OVERLAY={name}: {path} does not exist; overlays here: {known}.")
    return path


def recipe_of(domain: str, overlays: Sequence[str] = ()) -> Recipe:
    """The recipe of a domain with overlays, both by name; see `load_recipe`."""
    return load_recipe(recipe_path(domain), tuple(overlay_path(name) for name in overlays))


def load_recipe(path: Path, overlays: tuple[Path, ...] = ()) -> Recipe:
    """Read and check a recipe with its overlays applied. Raises `ThinkSwitchError` naming file and field."""
    values = files.read_yaml(path)
    for extra in overlays:
        values = overlay(values, files.read_yaml(extra))
    for key, value in values.items():
        if not isinstance(key, str):
            raise ThinkSwitchError(f"{path}: the key {str(key)[:50]!r} is not text; put it in quotes.")
        if trusts := trusted_code(value, key):
            raise ThinkSwitchError(
                f"{path}: `{escaped(trusts)}` would run code that comes with a model, which ThinkSwitch never does; "
                "remove it, and use a model that transformers supports without extra code."
            )
    if "thinkswitch" not in values:
        raise ThinkSwitchError(f"{path} has no `thinkswitch:` section; see docs/adding-a-domain.md.")
    try:
        keys = ThinkSwitchKeys.model_validate(values["thinkswitch"])
    except ValidationError as error:
        where = " + ".join(str(p) for p in (path, *overlays))
        raise ThinkSwitchError(f"{where}: {explain(error)}") from None
    axolotl = {key: value for key, value in values.items() if key != "thinkswitch"}
    asked = keys.pair.arguments("instruct")
    if axolotl.get(TEMPLATE_KEY, asked) != asked:
        raise ThinkSwitchError(
            f"{path}: `{TEMPLATE_KEY}` would train behind another prompt than is asked; give the same arguments as "
            f"`thinkswitch.pair.{TEMPLATE_KEY}.instruct`, or leave the key out at the top level."
        )
    return Recipe(path, {**axolotl, TEMPLATE_KEY: asked} if asked else axolotl, keys, overlays)


def trusted_code(value: Any, name: str) -> str | None:
    """Where a value of a recipe switches on code from a model's repository, None if nowhere."""
    if re.search(r"(?:^|\.)trust_remote_code[^.]*$", name) and str(value).lower() not in ("false", "none", "0", ""):
        return name
    if isinstance(value, dict):
        inside = [trusted_code(item, f"{name}.{key}") for key, item in value.items()]
    elif isinstance(value, list):
        inside = [trusted_code(item, f"{name}[{place}]") for place, item in enumerate(value)]
    else:
        text = str(value).replace("-", "_").lower()
        # vLLM's and accelerate's parsers take the beginning of an option for the whole.
        shortened = text.startswith("__tr") and "__trust_remote_code".startswith(text.partition("=")[0])
        inside = [name if isinstance(value, str) and (shortened or "trust_remote_code" in text) else None]
    return next((found for found in inside if found), None)


def explain(error: ValidationError) -> str:
    """The first problem of a pydantic error as one sentence."""
    first = error.errors()[0]
    field = ".".join(escaped(part) for part in ("thinkswitch", *first["loc"]))
    if first["type"] == "extra_forbidden":
        return f"unknown key `{field}`{_did_you_mean(first['loc'])}."
    if first["type"] == "missing":
        return f"`{field}` is missing."
    if first["type"] == "renamed":
        return f"`{field}`: {first['msg']}."
    return f"`{field}`: {first['msg'].removeprefix('Value error, ')} (found {shown(first['input'])})."


def escaped(name: object) -> str:
    """A key for use in a sentence, escaped if it would break the line."""
    text = str(name)
    return text if text.isprintable() else repr(text)


def shown(value: object) -> str:
    """A value for use in a sentence: on one line, truncated if it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _did_you_mean(location: tuple[int | str, ...]) -> str:
    model: Any = ThinkSwitchKeys
    for part in location[:-1]:
        model = keys_of(model.model_fields[str(part)])
    names = [field.alias or name for name, field in model.model_fields.items()]
    return _nearest(str(location[-1]), names) or f"; known keys: {', '.join(names)}"


def _nearest(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean `{close[0]}`" if close else ""


def check_axolotl_keys(recipe: Recipe) -> None:
    """Refuse top-level keys that axolotl's schema does not know (it would ignore them).

    Takes seconds, since axolotl's schema imports torch.
    """
    from axolotl.utils.schemas.config import AxolotlInputConfig

    known = set(AxolotlInputConfig.model_fields)
    for field in AxolotlInputConfig.model_fields.values():
        known.update(a for a in (field.alias, field.validation_alias) if isinstance(a, str))
    for key in recipe.axolotl:
        if key not in known:
            raise ThinkSwitchError(f"{recipe.path}: axolotl knows no key `{key}`{_nearest(key, known)}.")
    for key in ("base_model", "datasets", "output_dir", "adapter"):
        if not recipe.axolotl.get(key):
            raise ThinkSwitchError(f"{recipe.path}: `{key}` is missing; recipes/template.yaml has one.")


def iteration_config(recipe: Recipe, *, pairs: Path, **others: Any) -> dict[str, Any]:
    """The complete axolotl config of one iteration, which plain `axolotl train` runs as it is.

    Args:
        others: the other arguments of `training_config`.
    """
    datasets = [dict(entry) for entry in recipe.axolotl.get("datasets") or [{}]]
    datasets[0] |= {"path": str(pairs), "ds_type": "json", "type": "thinkswitch_plugin.answer_only"}
    keys = recipe.keys.model_dump(by_alias=True, exclude_defaults=True)
    config = training_config(recipe.axolotl, datasets=datasets, **others) | {"thinkswitch": keys}
    if recipe.keys.loss == "distribution":
        config |= recipe.keys.distribution.axolotl(config.get("plugins"))
    return config


def training_config(
    values: dict[str, Any], *, base_model: str, datasets: list[dict[str, Any]], here: Path, seed: int
) -> dict[str, Any]:
    """A recipe's axolotl keys for one training, without those under `thinkswitch:`; on a CPU with the published overlay.

    Args:
        base_model: the checkpoint that learns.
        here: gets `adapter/`, and axolotl's tokenized data. It must differ between iterations: axolotl's cache key
            holds neither the file's content nor plugin keys.
    """
    if not has_cuda():
        values = overlay(values, files.read_yaml(places.find(places.CPU_OVERLAY)))
    return {
        **values,
        "base_model": base_model,
        "datasets": datasets,
        "dataset_prepared_path": str(here / PREPARED),
        "output_dir": str(here / "adapter"),
        "seed": seed,
        "merge_method": "legacy",  # for `axolotl merge-lora` by hand: its default rounds every matrix through NF4
        "auto_resume_from_checkpoints": True,  # a killed training goes on from its last whole checkpoint
    }


def overlay(values: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """`values` with the keys of `extra` on top, with mappings merged; a key that is set to null is removed."""
    merged = dict(values)
    for key, value in extra.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = overlay(merged[key], value)
        else:
            merged[key] = value
    return merged
