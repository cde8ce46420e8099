"""The axolotl plugin that watches a training for the GPU check; `gpu_qlora` fills in what it needs."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from gpu_probe import Probe, limit_memory
from gpu_shape import Setting

setting: Setting | None = None
probe: Probe | None = None
limited = False


class ProbePlugin(BasePlugin):  # type: ignore[misc]
    """`plugins: [gpu_axolotl.ProbePlugin]`."""

    def pre_model_load(self, cfg: Any) -> None:
        """Limit the memory before anything is on the GPU."""
        limit_memory(setting, limited)

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Probe | None]:
        """Watch every step."""
        return [probe]
