"""Two `config.json` compared as transformers resolves them: defaults filled in, nested configs entered.

Everything counts except what is listed here as free to differ, so a setting that nobody thought of is a
difference, not a silent merge. Code that comes with a checkpoint is never run: if transformers does not know the
`model_type`, the files are compared as they are written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from thinkswitch_plugin import files
from thinkswitch_plugin.errors import ThinkSwitchError

# Names, versions, token ids, caches, what only training or generation reads, and heads that transformers leaves out.
FREE = """
transformers_version name_or_path auto_map dtype torch_dtype use_cache cache_implementation id2label label2id
problem_type finetuning_task task_specific_params tokenizer_class tokenizer return_dict output_attentions
output_hidden_states output_router_logits router_aux_loss_coef router_z_loss_coef router_jitter_noise aux_loss_alpha
seq_aux initializer_range initializer_factor pretraining_tp num_nextn_predict_layers mtp_num_hidden_layers
mtp_use_dedicated_embeddings unsloth_fixed unsloth_version model_name model_max_length max_length max_new_tokens
min_length do_sample num_beams temperature top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
early_stopping suppress_tokens begin_suppress_tokens
"""
FREE_ENDINGS = ("_token_id", "_token_ids", "_token_index", "dropout", "_pdrop")
# What makes another model altogether; named first, since other settings follow from it.
SIZES = (
    *("model_type", "architectures", "num_hidden_layers", "hidden_size", "vocab_size"),
    *("num_attention_heads", "num_key_value_heads"),
)
# `layer_types` and `sliding_window` say what transformers makes of these two.
RESOLVED_INTO_LAYER_TYPES = ("max_window_layers", "use_sliding_window")
# Kinds of rotary embedding whose frequencies do not depend on the longest context.
LENGTH_FREE_ROPE = ("default", "linear", "llama3", "proportional")
YARN_DEFAULTS = {"beta_fast": 32, "beta_slow": 1}


def resolve(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """A `config.json` with everything that transformers fills in; None if it does not know the `model_type`.

    Raises `ThinkSwitchError` if transformers refuses a value.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        return None
    try:
        return dict(AutoConfig.for_model(**config).to_dict())
    except Exception as error:  # each config class has checks and error types of its own
        raise ThinkSwitchError(
            f"transformers refuses a value in a config.json of `model_type` {kind}: {' '.join(str(error).split())[:200]}; "
            "download the file again."
        ) from None


def require_known(checkpoint: Path) -> None:
    """Raise `ThinkSwitchError` if transformers does not know a checkpoint's `model_type`, so that mergekit cannot read it."""
    import transformers

    config = files.read_json(checkpoint / "config.json")
    if resolve(config) is None:
        raise ThinkSwitchError(
            f"transformers {transformers.__version__} does not know the `model_type` {config.get('model_type')} of "
            f"{checkpoint}, and code that comes with a model is not run; use a model that transformers has."
        )


def settings_of(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A checkpoint's config (resolved if transformers knows it), and the part of it that describes the language model."""
    config = files.read_json(checkpoint / "config.json")
    whole = resolve(config) or config
    nested = whole.get("text_config")
    return whole, nested if isinstance(nested, dict) else whole


def layers_of(checkpoint: Path) -> int:
    """How many layers a checkpoint's language model has. Raises `ThinkSwitchError` if its config does not say."""
    count = settings_of(checkpoint)[1].get("num_hidden_layers")
    if not isinstance(count, int):
        raise ThinkSwitchError(
            f"{checkpoint / 'config.json'}: `num_hidden_layers` is missing; copy or download the file again."
        )
    return count


def is_tied(checkpoint: Path) -> bool:
    """Whether the output head of a checkpoint is its embedding, spelled out or by its class's default."""
    whole, text = settings_of(checkpoint)
    return bool(whole.get("tie_word_embeddings", text.get("tie_word_embeddings")))


def differences(first: Mapping[str, Any], second: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every setting that counts and differs, as (`text_config.hidden_act`, value, other value).

    Args:
        first, second: what `resolve` returns for both, or both as written.
        above: the section they stand in.
    """
    sizes = [key for key in SIZES if key in first or key in second]
    for key in dict.fromkeys([*sizes, *sorted(first.keys() | second.keys())]):
        a, b = _plain(key, first.get(key)), _plain(key, second.get(key))
        if a == b or _is_free(key, first, second, nested=bool(above)):
            continue
        if key.endswith("_config") and isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f"{above}{key}.")
        else:
            yield f"{above}{key}", a, b


def config_difference(
    first: dict[str, Any], second: dict[str, Any], *, vocabulary: bool = False, may_differ: Iterable[str] = ()
) -> str | None:
    """The first setting of two `config.json` that keeps their checkpoints from being interpolated, in words.

    Args:
        vocabulary: whether the vocabularies may differ.
        may_differ: settings that the user lets differ.
    """
    resolved = [resolve(first), resolve(second)]
    a, b = resolved if None not in resolved else (first, second)
    assert a is not None and b is not None
    for setting, one, other in differences(a, b):
        allowed = any(setting == name or setting.startswith(f"{name}.") for name in may_differ)
        if not (allowed or (vocabulary and setting.endswith("vocab_size"))):
            return f"`{setting}` is {_shown(one, other)} and {_shown(other, one)}"
    return None


def adopt(target: Path, chosen: Mapping[str, Path]) -> None:
    """Write `with_values` into the config.json of a merged checkpoint."""
    from transformers import AutoConfig

    if chosen:
        with_values(AutoConfig.from_pretrained(target), chosen).save_pretrained(target)


def with_values(config: Any, chosen: Mapping[str, Path]) -> Any:
    """A transformers config with the values that other checkpoints have for some settings.

    Args:
        chosen: setting (`rope_parameters`, `text_config.hidden_act`) -> the checkpoint folder whose value it takes.

    Raises:
        ThinkSwitchError: the checkpoint has no such setting.
    """
    from transformers import AutoConfig

    for setting, folder in chosen.items():
        into, other = config, AutoConfig.from_pretrained(folder, trust_remote_code=False)
        *above, name = setting.split(".")
        for part in above:
            into, other = getattr(into, part, None), getattr(other, part, None)
        if not hasattr(other, name):
            raise ThinkSwitchError(
                f"{folder / 'config.json'} has no setting `{setting}`; correct its name in `may_differ`."
            )
        setattr(into, name, getattr(other, name))
    return config


def _is_free(key: str, first: Mapping[str, Any], second: Mapping[str, Any], *, nested: bool) -> bool:
    if key in FREE.split() or key.startswith("_") or key.endswith(FREE_ENDINGS) or (nested and key == "architectures"):
        return True
    if key in RESOLVED_INTO_LAYER_TYPES:
        return bool(first.get("layer_types") and second.get("layer_types"))
    if key == "max_position_embeddings":
        return all(kind in LENGTH_FREE_ROPE for config in (first, second) for kind in _rope_kinds(config))
    return False


def _rope_kinds(config: Mapping[str, Any]) -> list[str]:
    rope = config.get("rope_parameters") or {}
    places = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return [str(place["rope_type"]) for place in places if "rope_type" in place]


def _plain(key: str, value: Any) -> Any:
    """A value without what spells out a default: one rotary embedding can be written in several ways."""
    if not key.startswith("rope_") or not isinstance(value, dict):
        return value
    found = {name: _plain(key, item) if isinstance(item, dict) else item for name, item in value.items()}
    if found.get("rope_type") == "yarn":
        found = YARN_DEFAULTS | {name: item for name, item in found.items() if item is not None}
    unread = ("type",) if found.get("rope_type") != "default" else ("type", "factor")
    return {name: item for name, item in found.items() if item is not None and name not in unread}


def _shown(value: Any, other: Any) -> str:
    """A value in a sentence: of a mapping or a list only what differs from the other one."""
    if isinstance(value, dict) and isinstance(other, dict):
        value = {name: item for name, item in value.items() if item != other.get(name)} or "without them"
    elif isinstance(value, list) and isinstance(other, list) and len(value) == len(other):
        place = next(i for i, pair in enumerate(zip(value, other, strict=True)) if pair[0] != pair[1])
        value = f"{value[place]} in layer {place}"
    text = str(value)
    return text if len(text) <= 120 else f"{text[:119]}…"
