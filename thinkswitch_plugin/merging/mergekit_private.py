"""Every part of mergekit that it does not document and that is used here, seen in version 0.1.5.

| part | why it is used |
| --- | --- |
| the name `TensorWriter` in `mergekit.io.tasks` | there is no option for a writer: to check what is written, or to fill a model |
| `TensorWriter._write_futures`, `_executor` | `--async-write` queues shards without a limit, and leaves its thread running when a merge fails |
| the name `get_architecture_info` in `mergekit.merge` | `run_merge` takes no architecture |
| `LoaderCache.loaders` | it takes no reader of one's own, and a class attribute keeps the files of past merges open |
| `MergePlanner.plan_to_disk`, `Executor`, `SaveTensor` | `plan_in_memory` fails with pydantic 2.12: a field is annotated with an abstract generic |
| `slerp_merge_method.implementation` | a registered method cannot be replaced; ours computes the same in less time |
| `plan_extraction` and its tasks | `mergekit-extract-lora` has no way to print what it would take apart |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mergekit.merge
import torch
from mergekit.architecture import ModelArchitecture, arch_info_for_config
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.io import tasks
from mergekit.io.lazy_tensor_loader import LazyTensorLoader, ShardedTensorIndex
from mergekit.io.tensor_writer import TensorWriter
from mergekit.merge_methods.base import TensorBatch
from mergekit.merge_methods.slerp import slerp_merge_method
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner

from thinkswitch_plugin.merging.kernel import all_finite, slerp
from thinkswitch_plugin.merging.layout import Aligned, Stored

mergekits_slerp = slerp_merge_method.implementation


def _slerp(batch: TensorBatch, t: torch.Tensor) -> torch.Tensor:
    """`kernel.slerp` for a tensor on the CPU, mergekit's own code for everything else that it accepts or refuses."""
    base, other = batch.tensors
    alone = base.device.type == "cpu" and len(base) == 1 and base.numel()
    if not (alone and base.is_floating_point() and batch.base_index == 0):
        return mergekits_slerp(batch, t)
    return slerp(t[0], base[0], other[0])[None]


def use_kernel() -> None:
    """Have mergekit compute `merge_method: slerp` with `kernel.slerp` in this process."""
    slerp_merge_method.implementation = _slerp


class NonFiniteOutputError(ValueError):
    """A tensor about to be written holds NaN or infinity; `name` is its name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} holds NaN or infinity")
        self.name = name


class CheckedWriter(TensorWriter):  # type: ignore[misc]
    """mergekit's writer, which refuses NaN and infinity, and lets at most one shard wait for the disk."""

    def __init__(self, *words: Any, carried: Mapping[str, Stored], **options: Any) -> None:
        super().__init__(*words, **options)
        self._carried = carried

    def save_tensor(self, name: str, tensor: torch.Tensor, clone: bool = False) -> None:
        """Add a tensor to the current shard. Raises `NonFiniteOutputError`."""
        if not all_finite(tensor):
            raise NonFiniteOutputError(name)
        while len(self._write_futures) > 1:
            self._write_futures.pop(0).result()
        super().save_tensor(name, tensor, clone)

    def finalize(self) -> None:
        """Write the carried tensors as they are, and whatever is left."""
        for name, stored in self._carried.items():
            self.save_tensor(name, stored.load())
        super().finalize()

    def stop(self) -> None:
        """Wait for the shard being written, and give up the one behind it."""
        if self.use_async:
            self._executor.shutdown(cancel_futures=True)


@contextmanager
def writing_to(make: Callable[..., Any]) -> Iterator[None]:
    """Have mergekit write through the object that `make` returns for the arguments of `TensorWriter`."""
    original = tasks.TensorWriter
    tasks.TensorWriter = make
    try:
        yield
    finally:
        tasks.TensorWriter = original


@contextmanager
def checked(aligned: Aligned | None) -> Iterator[None]:
    """Have mergekit write through `CheckedWriter`, with the tensors of `aligned.carried` beside the merged ones."""
    made: list[CheckedWriter] = []

    def make(*words: Any, **options: Any) -> CheckedWriter:
        made.append(CheckedWriter(*words, carried=aligned.carried if aligned else {}, **options))
        return made[0]

    try:
        with writing_to(make):
            yield
    finally:
        for writer in made:
            writer.stop()
        tasks.LoaderCache.loaders.clear()


class AlignedLoader(LazyTensorLoader):  # type: ignore[misc]
    """mergekit's reader of one checkpoint, which also has the tensors that are stored in another layout."""

    def __init__(self, folder: Path, tensors: Mapping[str, Stored]) -> None:
        super().__init__(ShardedTensorIndex.from_disk(str(folder)))
        self._converted = {name: stored for name, stored in tensors.items() if stored.layout}
        places = {name: stored.parts[0].file.name for name, stored in self._converted.items()}
        self.index.tensor_paths = {**self.index.tensor_paths, **places}

    def get_tensor(self, key: str, device: str = "cpu", **options: Any) -> Any:
        """A tensor by its name in the common layout."""
        if key in self._converted:
            return self._converted[key].load().to(device)
        return super().get_tensor(key, device=device, **options)


def use_layout(config: MergeConfiguration, aligned: Aligned | None) -> None:
    """Have mergekit read the checkpoints of a config in their common layout."""
    for model in config.referenced_models() if aligned else []:
        assert aligned is not None
        tensors = aligned.checkpoints.get(Path(model.model.path))
        if model.lora is None and tensors and any(stored.layout for stored in tensors.values()):
            tasks.LoaderCache().loaders[model] = AlignedLoader(Path(model.model.path), tensors)


@contextmanager
def planning_for(found: ModelArchitecture) -> Iterator[None]:
    """Have `mergekit.merge.run_merge` plan for this architecture."""
    original = mergekit.merge.get_architecture_info
    mergekit.merge.get_architecture_info = lambda *_: found
    try:
        yield
    finally:
        mergekit.merge.get_architecture_info = original


def compute(planner: MergePlanner, device: str, make: Callable[[set[str]], Any]) -> None:
    """Carry out a merge in memory.

    Args:
        make: returns the object that takes the tensors (`save_tensor`, `finalize`), from the names of all of them.
    """
    plan = planner.plan_to_disk("")
    writer = make({task.tensor_name for task in plan if isinstance(task, tasks.SaveTensor)})
    executor = Executor(plan, math_device=torch.device(device), storage_device=torch.device("cpu"))
    with writing_to(lambda *_, **__: writer):
        for _ in executor.run(quiet=True):
            pass


def extracted_tensors(base: Path, checkpoint: Path, exclude: str) -> set[str] | None:
    """The tensors that `mergekit-extract-lora` would take apart; nothing but configs is read.

    None if mergekit does not know the architecture; raises what mergekit raises if it cannot plan for it.
    """
    from mergekit.scripts.extract_lora import LoRAModuleSaveTask, TaskVectorTask, plan_extraction

    of_base, of_checkpoint = (ModelReference.model_validate(str(folder)) for folder in (base, checkpoint))
    if arch_info_for_config(of_checkpoint.config()) is None:
        return None
    plan = plan_extraction(
        of_base,
        of_checkpoint,
        modules_to_save=[],
        out_path=str(checkpoint.with_name("not-written")),
        options=MergeOptions(),
        max_rank=1,
        exclude_regexes=[exclude],
        skip_undecomposable=True,
    )
    saved = [task.tensor_task for task in plan.tasks if isinstance(task, tasks.SaveTensor)]
    biases = {task.model_tensor.tensor for task in saved if isinstance(task, TaskVectorTask)}
    return biases | {task.weight_info.name for task in plan.tasks if isinstance(task, LoRAModuleSaveTask)}
