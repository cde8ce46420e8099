"""A merge carried out in memory: mergekit plans and computes, a loaded model takes the tensors.

mergekit writes every tensor of a plan through one object, its `TensorWriter`. Put a model in
that object's place and the same plan fills the model's parameters instead of a folder, so
a point of a sweep costs no checkpoint on disk and equals `mergekit-yaml`'s result (bit by bit at the same number of torch threads).
(mergekit's own `plan_in_memory` fails with pydantic 2.12: `ReturnTensor.tensor_task` is
annotated with an abstract generic.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mergekit.architecture import get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.io import tasks as mergekit_tasks
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from transformers import PreTrainedModel, set_seed

from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.merging.kernel import all_finite
from thinkswitch_plugin.merging.method import register
from thinkswitch_plugin.merging.run import blame, sentence
from thinkswitch_plugin.merging.writer import NonFiniteOutputError


class ModelWriter:
    """Takes merged tensors by name and copies each into the model's parameter of that name."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.parameters: Mapping[str, torch.nn.Parameter] = dict(model.named_parameters())
        self.written: set[str] = set()

    def save_tensor(self, name: str, tensor: torch.Tensor, clone: bool = False) -> None:
        """Called by mergekit for every tensor.

        Raises:
            ThinkSwitchError: the model has no parameter of that name and shape.
            NonFiniteOutputError: the tensor holds NaN or infinity.
        """
        parameter = self.parameters.get(name)
        if parameter is None or parameter.shape != tensor.shape:
            raise ThinkSwitchError(
                f"The merged tensor {name} {list(tensor.shape)} has no place in the loaded model; "
                "have the candidates written to disk instead: `thinkswitch.evaluation.backend: server` in an overlay."
            )
        if not all_finite(tensor):
            raise NonFiniteOutputError(name)
        with torch.no_grad():
            parameter.copy_(tensor)
        self.written.add(name)

    def finalize(self) -> None:
        """Called by mergekit at the end. Raises `ThinkSwitchError` if a parameter was left as it was."""
        if missing := sorted(self.parameters.keys() - self.written):
            raise ThinkSwitchError(f"The merge config gives no value for {missing[0]}; merge the whole model.")


@contextmanager
def writing_to(writer: Any) -> Iterator[None]:
    """Have mergekit write to `writer` instead of a folder."""
    original = mergekit_tasks.TensorWriter
    mergekit_tasks.TensorWriter = lambda *_args, **_options: writer
    try:
        yield
    finally:
        mergekit_tasks.TensorWriter = original


def merge_into(model: PreTrainedModel, config: dict[str, Any], *, seed: int = 0) -> None:
    """Carry out a merge config (as `mergekit-yaml` reads it) in place, in `model`.

    The inputs are mapped from disk and stay open between calls, so a second merge of the
    same checkpoints reads them from the page cache.

    Args:
        seed: for methods that draw at random (DARE, DELLA); mergekit-yaml's `--random-seed`.

    Raises:
        ThinkSwitchError: mergekit refuses the config, or the merged tensors do not fit the model or are not finite.
    """
    register()
    try:
        _carry_out(MergeConfiguration.model_validate(config), model, seed)
    except ThinkSwitchError:
        raise
    except Exception as error:
        raise ThinkSwitchError(f"mergekit stopped: {sentence(error)}") from error


def _carry_out(config: MergeConfiguration, model: PreTrainedModel, seed: int) -> None:
    device = str(model.device)
    options = MergeOptions(quiet=True, random_seed=seed, device=device)
    set_seed(seed)
    LoaderCache().setup(options=options)
    architecture = get_architecture_info(config, options)
    plan = MergePlanner(config, architecture, options=options, out_model_config=model.config).plan_to_disk("")
    executor = Executor(plan, math_device=torch.device(device), storage_device=torch.device("cpu"))
    try:
        with writing_to(ModelWriter(model)):
            for _ in executor.run(quiet=True):
                pass
    except NonFiniteOutputError as error:
        folders = [Path(m.model.path) for m in config.referenced_models()]
        raise ThinkSwitchError(blame(error.name, folders, f"{config.merge_method} in memory")) from None


def transformer_layers(checkpoint: Path) -> int:
    """How many layers a checkpoint folder's model has. Raises `ThinkSwitchError` if its config does not say."""
    from thinkswitch_plugin import files

    count = files.read_json(checkpoint / "config.json").get("num_hidden_layers")
    if not isinstance(count, int):
        raise ThinkSwitchError(
            f"{checkpoint / 'config.json'}: `num_hidden_layers` is missing; copy or download the file again."
        )
    return count
