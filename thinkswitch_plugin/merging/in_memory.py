"""A merge carried out in memory: mergekit plans and computes; a loaded model, or a running vLLM, takes the tensors.

mergekit writes every tensor of a plan through one object, its `TensorWriter`. With another object in its place the same
plan fills a model's parameters, or is sent to vLLM, so a point of a sweep costs no checkpoint on disk and equals
`mergekit-yaml`'s result (bit by bit at the same number of torch threads).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, set_seed

from thinkswitch_plugin.engines.live import EngineGoneError
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.merging.architecture import architecture, expected, require_planned, shortened
from thinkswitch_plugin.merging.compatibility import Allowances, align_compatible
from thinkswitch_plugin.merging.config import without_ours
from thinkswitch_plugin.merging.kernel import all_finite
from thinkswitch_plugin.merging.layout import Layout, model_class
from thinkswitch_plugin.merging.mergekit_private import NonFiniteOutputError, compute, use_layout
from thinkswitch_plugin.merging.method import register
from thinkswitch_plugin.merging.run import blame, local_checkpoints, sentence
from thinkswitch_plugin.merging.settings import require_known, with_values
from thinkswitch_plugin.merging.tensors import require_unquantised


class ModelWriter:
    """Takes merged tensors by the names that checkpoints store them under and puts each into its place in a model.

    Args:
        names: everything that will be written.
    """

    def __init__(self, model: PreTrainedModel, names: Iterable[str]) -> None:
        self.layout = Layout(model, names)
        self._waiting: dict[str, dict[str, torch.Tensor]] = {}
        self._group = {name: key for key, stored in self.layout.groups.items() for name in stored}
        self._written: set[int] = set()

    def save_tensor(self, name: str, tensor: torch.Tensor, clone: bool = False) -> None:
        """Called by mergekit for every tensor.

        Raises:
            ThinkSwitchError: the model has another shape there.
            NonFiniteOutputError: the tensor holds NaN or infinity.
        """
        if not all_finite(tensor):
            raise NonFiniteOutputError(name)
        key = self._group.get(name)
        if key is None:
            return  # a multi-token prediction head and the like: the model does not compute with it
        waiting = self._waiting.setdefault(key, {})
        waiting[name] = tensor
        if len(waiting) < len(self.layout.groups[key]):
            return
        for target, value in self.layout.convert(key, self._waiting.pop(key)).items():
            place = self.layout.state.get(target)
            if place is None or place.shape != value.shape:
                raise ThinkSwitchError(
                    f"The merged tensor {target} {list(value.shape)} has no place in the loaded model; "
                    "have vLLM answer instead: `thinkswitch.evaluation.backend: server` in an overlay."
                )
            with torch.no_grad():
                place.copy_(value)
            self._written.add(place.data_ptr())

    def finalize(self) -> None:
        """Called by mergekit at the end. Raises `ThinkSwitchError` if a tensor of the model was left as it was."""
        # A tied head has the place of the embedding.
        places = self.layout.state.items()
        missing = sorted(n for n, place in places if place.numel() and place.data_ptr() not in self._written)
        if missing:
            raise ThinkSwitchError(
                f"The merge config gives no value for {len(missing)} tensors of the model ({shortened(missing)}); "
                "merge the whole model."
            )


def load(skeleton: Path, chosen: Mapping[str, Path], *, device: str) -> PreTrainedModel:
    """The model that candidates are merged into, of the class that its config.json names.

    Args:
        skeleton: a checkpoint folder of the architecture.
        chosen: setting -> the checkpoint folder whose value the candidates have, as in `settings.adopt`.

    Raises `ThinkSwitchError` if transformers has no class for it.
    """
    require_unquantised(skeleton)
    require_known(skeleton)
    kind = model_class(skeleton)
    if kind is None:
        raise ThinkSwitchError(
            f"transformers has no class for the architecture of {skeleton}; have the candidates served by an engine that "
            "has one: `thinkswitch.evaluation.backend: server` in an overlay."
        )
    config = with_values(AutoConfig.from_pretrained(skeleton, trust_remote_code=False), chosen)
    return kind.from_pretrained(skeleton, config=config, dtype="auto").to(device).eval()


def merge_into(model: PreTrainedModel, config: dict[str, Any], *, seed: int = 0) -> None:
    """Carry out a merge config (as `thinkswitch merge` reads it) in place, in `model`; see `carry_out`."""
    carry_out(config, lambda names: ModelWriter(model, names), model.config, device=str(model.device), seed=seed)


class StreamWriter:
    """Takes merged tensors and passes each on at once, in checkpoint layout.

    Args:
        send: called with the name and the tensor.
    """

    def __init__(self, send: Callable[[str, torch.Tensor], None]) -> None:
        self.send = send

    def save_tensor(self, name: str, tensor: torch.Tensor, clone: bool = False) -> None:
        """Called by mergekit for every tensor. Raises `NonFiniteOutputError`."""
        if not all_finite(tensor):
            raise NonFiniteOutputError(name)
        self.send(name, tensor)

    def finalize(self) -> None:
        """Called by mergekit at the end."""


def carry_out(
    config: dict[str, Any],
    make: Callable[[set[str]], ModelWriter | StreamWriter],
    model_config: PretrainedConfig,
    *,
    device: str = "cpu",
    seed: int = 0,
) -> None:
    """Carry out a merge config (as `thinkswitch merge` reads it), its tensors written to an object instead of to files.

    The inputs are mapped from disk and stay open between calls, so a second merge of the
    same checkpoints reads them from the page cache.

    Args:
        make: returns that object, from the names of all tensors that it will get.
        model_config: of the model that is made.
        seed: for methods that draw at random (DARE, DELLA); mergekit-yaml's `--random-seed`.

    Raises:
        ThinkSwitchError: the checkpoints do not match, mergekit refuses the config or would leave a tensor out, or the
            merged tensors do not fit the model or are not finite.
    """
    register()
    try:
        own, chosen = without_ours(config)
        options = MergeOptions(quiet=True, random_seed=seed, device=device)
        _carry_out(MergeConfiguration.model_validate(own), make, model_config, options, tuple(chosen))
    except (ThinkSwitchError, EngineGoneError):
        raise
    except Exception as error:
        raise ThinkSwitchError(f"mergekit stopped: {sentence(error)}") from error


def _carry_out(
    config: MergeConfiguration,
    make: Callable[[set[str]], ModelWriter | StreamWriter],
    model_config: PretrainedConfig,
    options: MergeOptions,
    may_differ: tuple[str, ...],
) -> None:
    set_seed(options.random_seed)
    LoaderCache().setup(options=options)
    allowed = Allowances(dtype=config.dtype is not None, may_differ=may_differ)
    folders = local_checkpoints(config)
    aligned = align_compatible(folders, allowed)
    assert aligned is not None
    use_layout(config, aligned)
    needed = expected(config, folders, aligned)  # mergekit changes the config while it plans
    planner = MergePlanner(
        config, architecture(config, options, aligned), options=options, out_model_config=model_config
    )
    writers: list[ModelWriter | StreamWriter] = []

    def covering(names: set[str]) -> ModelWriter | StreamWriter:
        require_planned(needed, names | aligned.carried.keys(), f"{config.merge_method} in memory")
        writers.append(make(names))
        return writers[0]

    try:
        compute(planner, options.device, covering)
        for name, stored in aligned.carried.items():
            writers[0].save_tensor(name, stored.load())
    except NonFiniteOutputError as error:
        raise ThinkSwitchError(blame(error.name, folders, f"{config.merge_method} in memory")) from None
