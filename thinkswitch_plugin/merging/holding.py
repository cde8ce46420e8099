"""One engine that answers as many merges of a pair, one after the other: what sweeps, ablations and rebuild trials share.

Where transformers answers, one model is loaded once and each merge is written into it. Where vLLM answers, one server
runs and gets the weights of each merge in place. Neither needs a checkpoint on disk.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mergekit.config import MergeConfiguration
from transformers import AutoConfig

from thinkswitch_plugin import files
from thinkswitch_plugin.args import EngineKeys
from thinkswitch_plugin.engines.ask import Asker
from thinkswitch_plugin.engines.embedded import EmbeddedEngine
from thinkswitch_plugin.engines.live import LiveVllm, Send
from thinkswitch_plugin.environment import has_cuda
from thinkswitch_plugin.merging.command import write_merge
from thinkswitch_plugin.merging.config import without_ours
from thinkswitch_plugin.merging.in_memory import StreamWriter, carry_out, load, merge_into
from thinkswitch_plugin.merging.run import is_tensor_by_tensor, local_checkpoints
from thinkswitch_plugin.merging.settings import adopt, config_difference, require_known
from thinkswitch_plugin.merging.tensors import require_unquantised
from thinkswitch_plugin.run import checkpoint

SERVED = ".candidate"  # what vLLM is started on, in the folder of a job


@dataclass(frozen=True)
class MergeJob:
    """What all merges of one job have in common.

    Args:
        skeleton: a checkpoint of the architecture.
        template: the checkpoint whose tokenizer, chat template and generation config all merges get.
        work: a folder for what has to be on disk while the engine runs.
        log: of vLLM.
        batch: how many requests are answered together in process.
        budget: tokens of the longest completion, where the requests do not say so.
        seed: for merge methods that draw at random.
    """

    skeleton: Path
    template: Path
    keys: EngineKeys
    work: Path
    log: Path
    batch: int
    budget: int = 0
    seed: int = 0


class Holder(Protocol):
    """An engine that can be given the weights of a merge."""

    def hold(self, config: dict[str, Any]) -> Asker:
        """Have the next answers come from this merge config, which names real folders.

        Raises `ThinkSwitchError`, now or when it is asked, if the merge fails; see `in_memory.carry_out`.
        """

    def close(self) -> None:
        """Free the memory that it holds."""


@contextmanager
def holding(engine: str, job: MergeJob) -> Iterator[Holder]:
    """Such an engine for the length of the block.

    Args:
        engine: `vllm`, or `embedded` for transformers in this process.
    """
    holder: Holder = Live(job) if engine == "vllm" else InProcess(job)
    try:
        yield holder
    finally:
        holder.close()


class InProcess:
    """One model in this process, merged into in place."""

    def __init__(self, job: MergeJob) -> None:
        self.job = job
        self.settings: dict[str, Path] | None = None
        self.engine: EmbeddedEngine | None = None

    def hold(self, config: dict[str, Any]) -> EmbeddedEngine:
        """As `Holder.hold`; the model is loaded again only if its settings change."""
        settings = without_ours(config)[1]
        if self.engine is None or settings != self.settings:
            model = load(self.job.skeleton, settings, device="cuda" if has_cuda() else "cpu")
            self.engine, self.settings = EmbeddedEngine(self.job.template, model, self.job.batch), settings
        merge_into(self.engine.model, config, seed=self.job.seed)
        return self.engine

    def close(self) -> None:
        """As `Holder.close`."""
        if self.engine is not None:
            self.engine.close()
        self.engine = None


class Live:
    """One vLLM, started on the skeleton, whose weights are changed in place.

    Raises `ThinkSwitchError` for a skeleton that is quantised, or that transformers does not know.
    """

    def __init__(self, job: MergeJob) -> None:
        require_unquantised(job.skeleton)
        require_known(job.skeleton)
        self.job = job
        self.shown = sys.stdout, sys.stderr
        self.settings: dict[str, Path] | None = None
        self.engine: LiveVllm | None = None
        self.served = job.work / SERVED
        self.written = job.work / ".written"  # a merge that cannot be sent tensor by tensor

    def hold(self, config: dict[str, Any]) -> LiveVllm:
        """As `Holder.hold`; another server is started only if a merge has other settings or another architecture."""
        settings = without_ours(config)[1]
        if not self._streams(config):
            return self._hold_written(config)
        if self.engine is None or settings != self.settings:
            self.close()
            self._link(settings)
            self.engine, self.settings = self._server(self.served), settings
        self.engine.hold(sending(config, self.served, self.job.seed))
        return self.engine

    def close(self) -> None:
        """As `Holder.close`."""
        if self.engine is not None:
            self.engine.close()
        self.engine, self.settings = None, None
        files.remove(self.served)
        files.remove(self.written)

    def _server(self, folder: Path) -> LiveVllm:
        return LiveVllm(folder, self.job.keys, self.job.log, self.job.budget, self.shown)

    def _link(self, settings: dict[str, Path]) -> None:
        """A checkpoint with the settings and the mode of all merges, its weights those of the skeleton."""
        skeleton = self.job.skeleton.absolute()
        files.remove(self.served)
        self.served.mkdir(parents=True)
        for path in skeleton.iterdir():
            if path.name.endswith((".safetensors", ".json")) and path.name != "config.json":
                (self.served / path.name).symlink_to(path)
        (self.served / "config.json").write_bytes((skeleton / "config.json").read_bytes())
        adopt(self.served, settings)
        checkpoint.adopt_mode(self.job.template, self.served)

    def _streams(self, config: dict[str, Any]) -> bool:
        """Whether a merge makes the skeleton's tensors in its dtype, so that a running server can take them one by one."""
        parsed = MergeConfiguration.model_validate(without_ours(config)[0])
        checkpoints = local_checkpoints(parsed)
        dtype = parsed.out_dtype or parsed.dtype
        return (
            is_tensor_by_tensor(parsed, checkpoints)
            and len(checkpoints) == len(parsed.referenced_models())
            and (dtype is None or dtype == _dtype(self.job.skeleton))
        )

    def _hold_written(self, config: dict[str, Any]) -> LiveVllm:
        """Write a merge as a checkpoint and load that; a server is started on it where it is another kind of model."""
        files.remove(self.written)
        source = self.job.work / "logs" / "merge.yaml"
        files.write_yaml(source, config)
        write_merge(source, self.written, self.job.log.with_name("merge.log"))
        checkpoint.adopt_mode(self.job.template, self.written)
        here = self.engine.folder if self.engine else None
        if self.engine is None or here is None or not same_model(here, self.written):
            self.engine = self._restarted()
        else:
            self.engine.hold(self.written)
        return self.engine

    def _restarted(self) -> LiveVllm:
        if self.engine is not None:
            self.engine.close()
        self.settings = None  # a merge that is sent needs the skeleton again
        return self._server(self.written)


def sending(config: dict[str, Any], folder: Path, seed: int) -> Callable[[Send], None]:
    """What carries out a merge config and sends its tensors to a server that was started on `folder`."""
    shape = AutoConfig.from_pretrained(folder)
    return lambda send: carry_out(config, lambda _: StreamWriter(send), shape, seed=seed)


def _dtype(folder: Path) -> str:
    """The dtype that a config.json names, as mergekit names it: `bfloat16`."""
    return str(AutoConfig.from_pretrained(folder).dtype).removeprefix("torch.")


def same_model(first: Path, second: Path) -> bool:
    """Whether one server can hold either checkpoint."""
    configs = [files.read_json(folder / "config.json") for folder in (first, second)]
    return config_difference(*configs) is None and _dtype(first) == _dtype(second)
