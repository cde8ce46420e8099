"""What mergekit plans for: its own table of an architecture where that has every tensor, else the checkpoints' names.

mergekit knows some architectures by name; the rest it infers, and tensors that its table or transformers' class
lacks (routed experts in a layout of their own, multi-token prediction heads) would be left out without a word. A
`ModuleArchitecture` is mergekit's public way to say what a model consists of; `AsStored` says what the checkpoints
hold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mergekit.architecture import (
    ModelArchitecture,
    ModuleArchitecture,
    ModuleDefinition,
    WeightInfo,
    arch_info_for_config,
    get_architecture_info,
)
from mergekit.config import MergeConfiguration
from mergekit.io.lazy_tensor_loader import LazyTensorLoader, ShardedTensorIndex
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from transformers import PretrainedConfig

from thinkswitch_plugin.merging.layout import Aligned, Stored

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
        """Where the config has the number of layers."""
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


def split_name(name: str) -> tuple[str, str, str]:
    """`model.layers.3.mlp.up_proj.weight` -> (`model.layers.`, `3`, `mlp.up_proj.weight`); empty without a number."""
    parts = name.split(".")
    place = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    if not place:
        return "", "", name
    return ".".join(parts[:place]) + ".", parts[place], ".".join(parts[place + 1 :])


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


class AlignedLoader(LazyTensorLoader):  # type: ignore[misc]
    """mergekit's reader of one checkpoint, which also has the tensors that are stored in another layout."""

    def __init__(self, folder: Path, tensors: Mapping[str, Stored]) -> None:
        super().__init__(ShardedTensorIndex.from_disk(str(folder)))
        self._converted = {name: stored for name, stored in tensors.items() if stored.layout}
        places = {name: stored.parts[0][1].file.name for name, stored in self._converted.items()}
        self.index.tensor_paths = {**self.index.tensor_paths, **places}

    def get_tensor(self, key: str, device: str = "cpu", **options: Any) -> Any:
        """A tensor by its name in the common layout."""
        if key in self._converted:
            return self._converted[key].read().to(device)
        return super().get_tensor(key, device=device, **options)


def use_layout(config: MergeConfiguration, aligned: Aligned | None) -> None:
    """Have mergekit read the checkpoints of a config in their common layout."""
    for model in config.referenced_models() if aligned else []:
        assert aligned is not None
        tensors = aligned.checkpoints.get(Path(model.model.path))
        if model.lora is None and tensors and any(stored.layout for stored in tensors.values()):
            LoaderCache().loaders[model] = AlignedLoader(Path(model.model.path), tensors)


@contextmanager
def planning_for(found: ModelArchitecture) -> Iterator[None]:
    """Have `mergekit.merge.run_merge` plan for this architecture; it has no option for one."""
    import mergekit.merge

    original = mergekit.merge.get_architecture_info
    mergekit.merge.get_architecture_info = lambda *_: found
    try:
        yield
    finally:
        mergekit.merge.get_architecture_info = original
