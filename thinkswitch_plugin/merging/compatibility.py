"""Can checkpoints be merged tensor by tensor? Decided from configs and safetensors headers alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from thinkswitch_plugin import console, files
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.merging.settings import SIZES, config_difference, is_tied, resolve
from thinkswitch_plugin.merging.tensors import TensorInfo, list_tensors, require_unquantised, split_name
from thinkswitch_plugin.merging.vocabulary import describe_renamed, vocabulary_difference
from thinkswitch_plugin.run.checkpoint import require_plain

if TYPE_CHECKING:
    from thinkswitch_plugin.merging.layout import Aligned, Stored

HEAD = "lm_head.weight"
ONE_BASE = "both must come from one base"


@dataclass(frozen=True)
class Allowances:
    """Differences between checkpoints that a merge config copes with.

    Attributes:
        architecture: other architectures, depths and widths, and tensors that only one has
            (`--allow-crimes`, slices of unlike models).
        vocabulary: other vocabularies (mergekit aligns the tokenizers, or cuts the embeddings).
        dtype: other dtypes (the config casts all inputs to one).
        may_differ: settings of config.json that the user lets differ.
    """

    architecture: bool = False
    vocabulary: bool = False
    dtype: bool = False
    may_differ: tuple[str, ...] = ()


def list_weights(checkpoint: Path) -> dict[str, TensorInfo]:
    """`list_tensors` without a head that is the embedding again: some savers store it, others leave it out."""
    found = list_tensors(checkpoint)
    return {name: info for name, info in found.items() if name != HEAD or not is_tied(checkpoint)}


def tensor_difference(
    left: Mapping[str, Stored | TensorInfo], right: Mapping[str, Stored | TensorInfo], allowed: Allowances
) -> str | None:
    """The first tensor that keeps two lists of tensors from being interpolated, and how it differs."""
    for name, info in left.items():
        other = right.get(name)
        if other is None:
            continue
        other_vocabulary = allowed.vocabulary and not split_name(name)[1] and info.shape[1:] == other.shape[1:]
        if info.shape != other.shape and not other_vocabulary:
            return f"{name} has shape {list(info.shape)} and {list(other.shape)}"
        if info.dtype != other.dtype and not allowed.dtype:
            return f"{name} is stored as {info.dtype} and {other.dtype}"
    return None


def require_compatible(first: Path, second: Path, allowed: Allowances | None = None) -> None:
    """`align_compatible` of two checkpoints, for those who need its errors only; prints the tokens that they name differently."""
    align_compatible([first, second], allowed)
    if message := describe_renamed(first, second):
        console.say(f"  {message}.")


def align_compatible(checkpoints: Sequence[Path], allowed: Allowances | None = None) -> Aligned | None:
    """Check that checkpoint folders can be interpolated tensor by tensor, and bring them into one layout.

    Returns:
        None if their architectures may differ, so that there is no common layout.

    Raises:
        ThinkSwitchError: naming the first difference to the first checkpoint: quantised weights, a setting,
            a tensor that only one has, a shape, a dtype, or the vocabulary.
    """
    from thinkswitch_plugin.merging.layout import align

    allowed = allowed or Allowances()
    for folder in checkpoints:
        require_plain(folder)
        require_unquantised(folder)
    first, *others = checkpoints
    for other in others:
        _require_same_settings(first, other, allowed)
    held = {folder: list_weights(folder) for folder in checkpoints}
    aligned = None
    if not allowed.architecture:
        try:
            aligned = align(held)
        except ThinkSwitchError as error:
            raise _refusal(checkpoints, f"{error}; {ONE_BASE}") from None
    tensors: Mapping[Path, Mapping[str, Stored | TensorInfo]] = aligned.checkpoints if aligned else held
    for other in others:
        if found := tensor_difference(tensors[first], tensors[other], allowed):
            raise _refusal([first, other], f"{found}; {ONE_BASE}")
        if not allowed.vocabulary and (found := vocabulary_difference(first, other)):
            raise _refusal([first, other], f"their tokenizers' vocabularies differ: {found}")
    return aligned


def _require_same_settings(first: Path, other: Path, allowed: Allowances) -> None:
    a, b = files.read_json(first / "config.json"), files.read_json(other / "config.json")
    if allowed.architecture:
        sizes = a.get("vocab_size"), b.get("vocab_size")
        if not allowed.vocabulary and sizes[0] != sizes[1]:
            raise _refusal([first, other], f"`vocab_size` is {sizes[0]} and {sizes[1]}; {ONE_BASE}")
        return
    if resolve(a) is None:
        console.say(
            f"  transformers does not know `model_type` {a.get('model_type')}: config.json is compared as written."
        )
    difference = config_difference(a, b, vocabulary=allowed.vocabulary, may_differ=allowed.may_differ)
    if difference:
        # Checkpoints of different sizes or classes cannot be merged, whatever the user allows to differ.
        fixed = difference.split("`")[1] in SIZES
        way_out = "" if fixed else ", or `may_differ` name the setting and whose value counts (docs/models.md)"
        raise _refusal([first, other], f"{difference}; {ONE_BASE}{way_out}")


def _refusal(checkpoints: Iterable[Path], why: str) -> ThinkSwitchError:
    return ThinkSwitchError(f"{' and '.join(map(str, checkpoints))} are not a compatible pair: {why}.")
