"""What mergekit plans for (its own table of an architecture, or the checkpoints' names), and what it must write.

mergekit knows some architectures by name; the rest it infers, and tensors that its table or transformers' class
lacks (routed experts in a layout of their own, multi-token prediction heads) would be left out without a word. A
`ModuleArchitecture` is mergekit's public way to say what a model consists of; `AsStored` says what the checkpoints
hold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from mergekit.architecture import (
    ModelArchitecture,
    ModuleArchitecture,
    ModuleDefinition,
    WeightInfo,
    arch_info_for_config,
    get_architecture_info,
)
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from transformers import PretrainedConfig

from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.merging.compatibility import list_weights
from thinkswitch_plugin.merging.layout import Aligned, Stored
from thinkswitch_plugin.merging.settings import layers_of
from thinkswitch_plugin.merging.tensors import TensorInfo, split_name

# What a vision-language checkpoint needs beside weights and tokenizer.
PROCESSOR_FILES = ["preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"]


class AsStored(ModuleArchitecture):  # type: ignore[misc]
    """The tensors of aligned checkpoints, those of the language model's layers by layer."""

    def __init__(self, tensors: Mapping[str, Stored], config: PretrainedConfig) -> None:
        text = config.get_text_config()
        self._vocabulary = text.vocab_size
        self._key = "num_hidden_layers" if text is config else "text_config.num_hidden_layers"
        split = {name: split_name(name) for name in tensors}
        self._stack = main_stack({name: stored.elements for name, stored in tensors.items()})
        inside = {
            name: (int(index), rest)
            for name, (stack, index, rest) in split.items()
            if stack and stack == self._stack and int(index) < text.num_hidden_layers
        }
        self._templates = sorted({rest for _, rest in inside.values()})
        self._outside = {name: tensors[name].shape for name in tensors if name not in inside}

    def num_layers_config_key(self) -> str:
        """The config's key for the number of layers."""
        return self._key

    def pre_weights(self, config: PretrainedConfig) -> list[WeightInfo]:
        """Everything outside the layers."""
        return [
            # mergekit needs to know what has a row a token when it aligns tokenizers.
            WeightInfo(name=name, optional=True, vocabulary_axis=0 if shape[:1] == (self._vocabulary,) else None)
            for name, shape in sorted(self._outside.items())
        ]

    def post_weights(self, config: PretrainedConfig) -> list[WeightInfo]:
        """Nothing; see `pre_weights`."""
        return []

    def layer_weights(self, index: int, config: PretrainedConfig) -> list[WeightInfo]:
        """The same names for every layer; mergekit skips those that a layer does not have."""
        return [WeightInfo(name=f"{self._stack}{index}.{rest}", optional=True) for rest in self._templates]


def main_stack(elements: Mapping[str, int]) -> str:
    """What stands before the number of a layer in the largest stack of layers (`model.layers.`); empty without layers.

    Args:
        elements: tensor -> how many numbers it holds.
    """
    found: Counter[str] = Counter()
    for name, count in elements.items():
        found[split_name(name)[0]] += count
    del found[""]
    return max(found, key=lambda stack: found[stack], default="")


def architecture(config: MergeConfiguration, options: MergeOptions, aligned: Aligned | None) -> ModelArchitecture:
    """What mergekit is to plan for.

    Args:
        aligned: the checkpoints of the config; None leaves it to mergekit.
    """
    if aligned is None or config.modules:
        return get_architecture_info(config, options)
    model = (config.base_model or config.referenced_models()[0]).config(trust_remote_code=options.trust_remote_code)
    tensors = next(iter(aligned.checkpoints.values()))
    known = arch_info_for_config(model)
    if known is not None and tensors.keys() <= {weight.name for weight in known.all_weights(model)}:
        return known
    return ModelArchitecture(
        modules={"default": ModuleDefinition(architecture=AsStored(tensors, model))},
        architectures=list(model.architectures or []),
        model_type=model.model_type,
        tagalong_files=PROCESSOR_FILES,
        vocab_size_config_key="vocab_size" if model.get_text_config() is model else "text_config.vocab_size",
    )


def expected(config: MergeConfiguration, checkpoints: Sequence[Path], aligned: Aligned | None) -> dict[str, int]:
    """The tensors that the output must have -> their elements.

    Args:
        checkpoints: the local folders of the config.
        aligned: the same in one layout; None if layers are put together from unlike places.
    """
    if aligned is not None:
        tensors = next(iter(aligned.checkpoints.values())) | aligned.carried
        return {name: stored.elements for name, stored in tensors.items()}
    found: dict[str, int] = {}
    layer = 0
    for piece in config.slices or []:
        folder = Path(piece.sources[0].model.model.path)
        if folder not in checkpoints or not any(folder.glob("*.safetensors")):
            return {}  # on the hub, or not safetensors: not read by us
        held, layers = list_weights(folder), layers_of(folder)
        sizes = {name: info.elements for name, info in held.items()}
        stack = main_stack(sizes)
        start, end = piece.sources[0].layer_range
        for name, size in sizes.items():
            prefix, index, rest = split_name(name)
            if prefix != stack:
                found.setdefault(name, size)
            elif start <= int(index) < min(end, layers):
                found[f"{stack}{layer + int(index) - start}.{rest}"] = size
        layer += end - start
    return found


def require_planned(needed: Collection[str], planned: Collection[str], config_file: Path | str) -> None:
    """Raise `ThinkSwitchError` if a tensor that a merge must write is not among those that it writes."""
    missing = sorted(name for name in needed if name not in planned)
    if missing:
        raise ThinkSwitchError(
            f"{config_file}: mergekit would leave out {len(missing)} of {len(needed)} tensors ({shortened(missing)}); "
            "merge the whole model, with `models:` rather than `modules:` or `slices:`."
        )


def require_covered(needed: Mapping[str, int], written: Mapping[str, TensorInfo], config_file: Path | str) -> None:
    """Raise `ThinkSwitchError` if a tensor that a merge must write is not there or is smaller."""
    require_planned(needed, written, config_file)
    smaller = sorted(name for name, size in needed.items() if written[name].elements < size)
    if smaller:
        raise ThinkSwitchError(
            f"{config_file}: mergekit would keep only a part of {len(smaller)} tensors ({shortened(smaller)}); "
            "merge checkpoints of one shape."
        )


def shortened(names: Sequence[str]) -> str:
    """The first and the last of many tensors' names."""
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
