"""What watches a training: time and peak memory at each sequence length, for axolotl and for a plain trainer."""

from __future__ import annotations

import gc
import statistics
import time
from typing import Any

import torch
from gpu_shape import Record, Setting, peak, synchronize
from transformers import TrainerCallback


class Probe(TrainerCallback):
    """Records one row for each sequence length: the rows of the data set come in that order, `steps` steps of each."""

    def __init__(self, setting: Setting, accumulation: int, record: Record) -> None:
        self.setting, self.accumulation, self.record = setting, accumulation, record
        self.times: list[float] = []
        self.most: dict[str, float] = {}
        self.step = 0

    @property
    def length(self) -> int:
        """Tokens a row, in the step at work."""
        return self.setting.lengths[min(self.step // self.setting.steps, len(self.setting.lengths) - 1)]

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock; at a new length, forget the peak of the one before."""
        self.step = state.global_step
        if self.step == 0:
            self.record("model and adapter loaded", **peak(self.setting))
        if self.step % self.setting.steps == 0:
            self.times, self.most = [], {}
            gc.collect()
            if self.setting.on_gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
        synchronize(self.setting)
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the clock; after the last step of a length, record the median without the first, which warms up."""
        synchronize(self.setting)
        self.times.append(time.perf_counter() - self.began)
        # step by step, since axolotl resets torch's peak whenever it logs
        self.most = {key: max(value, self.most.get(key, 0.0)) for key, value in peak(self.setting).items()}
        if len(self.times) < self.setting.steps:
            return
        seconds = statistics.median(self.times[1:])
        note = f"first step {self.times[0]:.1f} s"
        if self.setting.on_gpu:
            free, total = torch.cuda.mem_get_info()
            note += f"; {(total - free) / 1e9:.2f} GB of the card in use, CUDA itself included"
        self.record(
            f"{self.length} tokens, a step",
            seconds=seconds,
            rate=self.length * self.accumulation / seconds,
            unit="tokens/s",
            note=note,
            **self.most,
        )


def limit_memory(setting: Setting, limited: bool) -> None:
    """Hold torch's memory to the setting's limit."""
    if setting.on_gpu and limited:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(setting.limit / total)
