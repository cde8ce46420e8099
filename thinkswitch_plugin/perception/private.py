"""What the perception module uses of torch and transformers beyond their documented interfaces.

Seen in torch 2.13 and transformers 5.16. All of it keeps the module in float32 and with the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from thinkswitch_plugin.run.checkpoint import MODULE


class KeepsType(nn.Module):
    """A module that moves to other devices but keeps its type.

    `Module._apply` is what `.to()` and `.half()` go through; a merge casts the whole model at once by them.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep, recurse)  # type: ignore[no-untyped-call]


class KeepsModuleInFloat32:
    """A model whose perception module `from_pretrained` loads in float32, whatever `dtype` it is given."""

    _keep_in_fp32_modules_strict = [MODULE]  # noqa: RUF012 - transformers reads a list


def change_class(model: Any, model_class: type[Any], config_class: type[Any]) -> None:
    """Make a loaded model one of another class, in place: axolotl's `post_model_build` cannot hand back another model.

    Every part of the model shares the config, so it changes its class and stays the same object.
    """
    model.config.__class__ = config_class
    model.config.model_type = config_class.model_type
    model.__class__ = model_class
