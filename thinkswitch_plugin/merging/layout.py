"""Checkpoints in one layout: the same tensors may be stored per expert or fused, and under older names.

transformers has a table of how each architecture's files become its parameters
(`transformers.conversion_mapping`); a `Layout` asks that table about the tensors of one folder. Checkpoints that
store the same tensors need none of it and keep their layout. Only what is stored differently is compared, and
written, as transformers loads it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.initialization import no_init_weights

from thinkswitch_plugin import files
from thinkswitch_plugin.environment import without_gpu_kernels
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.merging.tensors import TensorInfo, reading


def model_class(checkpoint: Path) -> type[PreTrainedModel] | None:
    """The transformers class that a checkpoint's config.json names; None if transformers has no such class."""
    import transformers

    without_gpu_kernels()
    named = files.read_json(checkpoint / "config.json").get("architectures") or [""]
    found = getattr(transformers, str(named[0]), None)
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


def skeleton(checkpoint: Path) -> PreTrainedModel | None:
    """The model of a checkpoint with no weights in it (on torch's meta device); None if transformers has no class for it."""
    kind = model_class(checkpoint)
    if kind is None:
        return None
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    with torch.device("meta"), no_init_weights():
        return kind(config)


class Layout:
    """Which parameters of a model the tensors of a checkpoint's files become.

    Attributes:
        groups: first parameter of a conversion -> the stored tensors it is made of, in the order of their names.
        targets: parameter -> the first parameter of the conversion that makes it.
        ignored: stored tensors that the model class has no place for.
    """

    def __init__(self, model: PreTrainedModel, names: Iterable[str]) -> None:
        self.model = model
        self.state = model.state_dict()
        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._converters = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        self._patterns: dict[str, str | None] = {}
        self.groups: dict[str, list[str]] = {}
        self.targets: dict[str, str] = {}
        self.ignored: list[str] = []
        prefix = model.base_model_prefix
        for name in sorted(names, key=dot_natural_key):
            key, pattern = rename_source_key(name, renamings, converters, prefix, self.state)
            if key not in self.state and name in self.state:
                key, pattern = rename_source_key(name, [], [], prefix, self.state)
            if key not in self.state:
                self.ignored.append(name)
                continue
            self._patterns[name] = pattern
            self.groups.setdefault(key, []).append(name)
            patterns = self._converters[pattern].target_patterns if pattern else []
            self.targets |= {key.replace(patterns[0], target): key for target in patterns} or {key: key}

    def convert(self, key: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The parameters that one group of stored tensors becomes.

        Args:
            key: one of `groups`.
            tensors: all of its stored tensors by name.
        """
        names = self.groups[key]
        pattern = self._patterns[names[0]]
        made: Any = deepcopy(self._converters[pattern]) if pattern else WeightRenaming(names[0], key)
        for name in names:
            made.add_tensor(key, name, self._patterns[name] or name, tensors[name])
        found = made.convert(key, model=self.model, config=self.model.config)
        return {target: value[0] if isinstance(value, list) else value for target, value in found.items()}

    def stored(self, target: str, held: Mapping[str, TensorInfo]) -> Stored:
        """A parameter as what it is made of in a checkpoint's files."""
        key = self.targets[target]
        return Stored(target, tuple(self.state[target].shape), tuple(held[n] for n in self.groups[key]), self, key)


@dataclass(frozen=True)
class Stored:
    """One tensor of the common layout and what it is made of in one checkpoint's files.

    Attributes:
        parts: the stored tensors it is made of; one, if it is stored as it is.
        layout, key: how the parts become the tensor; None and empty, if it is stored as it is.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[TensorInfo, ...]
    layout: Layout | None = None
    key: str = ""

    @property
    def dtype(self) -> str:
        """The dtype of its parts, as safetensors names it."""
        return self.parts[0].dtype

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    def tensor(self, read: Callable[[TensorInfo], torch.Tensor]) -> torch.Tensor:
        """The tensor itself, converted if need be; `read` is that of `tensors.reading`."""
        if self.layout is None:
            return read(self.parts[0])
        return self.layout.convert(self.key, {part.name: read(part) for part in self.parts})[self.name]

    def load(self) -> torch.Tensor:
        """The tensor, its files opened for it alone."""
        with reading() as read:
            return self.tensor(read)


@dataclass(frozen=True)
class Aligned:
    """Several checkpoints in one layout.

    Attributes:
        checkpoints: folder -> its tensors by their names in the common layout; all have the same names.
        carried: tensors that the model class has no place for and that only some of the checkpoints hold.
    """

    checkpoints: dict[Path, dict[str, Stored]]
    carried: dict[str, Stored]


def align(held: Mapping[Path, Mapping[str, TensorInfo]]) -> Aligned:
    """Bring the tensors of several checkpoints of one architecture into one layout.

    Args:
        held: folder -> tensors in its files.

    Raises:
        ThinkSwitchError: a tensor that the model needs is in only some of them.
    """
    folders = list(held)
    names = [set(tensors) for tensors in held.values()]
    alike = set.intersection(*names)
    plain = {
        folder: {name: _stored(info) for name, info in held[folder].items() if name in alike} for folder in folders
    }
    if all(found == alike for found in names):
        return Aligned(plain, {})
    models = [skeleton(folder) for folder in folders]
    if None in models:
        raise ThinkSwitchError(_only(held, min(set.union(*names) - alike)))
    layouts = {
        folder: Layout(model, held[folder]) for folder, model in zip(folders, models, strict=True) if model is not None
    }
    carried: dict[str, Stored] = {}
    for folder, layout in layouts.items():
        carried |= {n: _stored(held[folder][n]) for n in layout.ignored if n not in alike and n not in carried}
    for target in sorted(set().union(*(layout.targets for layout in layouts.values()))):
        found = [layout.groups[layout.targets[target]] for layout in layouts.values() if target in layout.targets]
        if len(found) < len(layouts):
            raise ThinkSwitchError(_only(held, found[0][0]))
        if any(parts != found[0] for parts in found):
            for folder, layout in layouts.items():
                plain[folder][target] = layout.stored(target, held[folder])
    parts = {part.name for tensors in plain.values() for s in tensors.values() if s.layout for part in s.parts}
    return Aligned({f: {n: s for n, s in t.items() if s.layout or n not in parts} for f, t in plain.items()}, carried)


def _stored(info: TensorInfo) -> Stored:
    return Stored(info.name, info.shape, (info,))


def _only(held: Mapping[Path, Mapping[str, TensorInfo]], name: str) -> str:
    return f"only {next(folder for folder in held if name in held[folder])} holds the tensor {name}"
