"""A merge carried out in memory: mergekit plans and computes, a loaded model takes the tensors.

mergekit writes every tensor of a plan through one object, its `TensorWriter`. With a model in that object's place the
same plan fills the model's parameters instead of a folder, so a point of a sweep costs no checkpoint on disk and equals
`mergekit-yaml`'s result (bit by bit at the same number of torch threads).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from transformers import AutoConfig, PreTrainedModel, set_seed

from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.merging.architecture import architecture, shortened
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
                    "have the candidates written to disk instead: `thinkswitch.evaluation.backend: server` in an overlay."
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
    """Carry out a merge config (as `thinkswitch merge` reads it) in place, in `model`.

    The inputs are mapped from disk and stay open between calls, so a second merge of the
    same checkpoints reads them from the page cache.

    Args:
        seed: for methods that draw at random (DARE, DELLA); mergekit-yaml's `--random-seed`.

    Raises:
        ThinkSwitchError: the checkpoints do not match, mergekit refuses the config, or the merged tensors do not fit
            the model or are not finite.
    """
    register()
    try:
        own, chosen = without_ours(config)
        _carry_out(MergeConfiguration.model_validate(own), model, seed, tuple(chosen))
    except ThinkSwitchError:
        raise
    except Exception as error:
        raise ThinkSwitchError(f"mergekit stopped: {sentence(error)}") from error


def _carry_out(config: MergeConfiguration, model: PreTrainedModel, seed: int, may_differ: tuple[str, ...]) -> None:
    device = str(model.device)
    options = MergeOptions(quiet=True, random_seed=seed, device=device)
    set_seed(seed)
    LoaderCache().setup(options=options)
    allowed = Allowances(dtype=config.dtype is not None, may_differ=may_differ)
    folders = local_checkpoints(config)
    aligned = align_compatible(folders, allowed)
    assert aligned is not None
    use_layout(config, aligned)
    planner = MergePlanner(
        config, architecture(config, options, aligned), options=options, out_model_config=model.config
    )
    try:
        compute(planner, device, lambda names: ModelWriter(model, names))
    except NonFiniteOutputError as error:
        raise ThinkSwitchError(blame(error.name, folders, f"{config.merge_method} in memory")) from None
