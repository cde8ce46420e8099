"""ThinkSwitch: move part of a reasoning model's trace into its weights (arXiv 2606.01080).

Importing this package is cheap: it needs neither axolotl nor torch. The axolotl
plugin is resolved on first use, so that ``plugins: [thinkswitch_plugin.ThinkSwitchPlugin]``
works in a recipe while the lm-eval tasks can import the package on its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["ThinkSwitchPlugin", "__version__"]

if TYPE_CHECKING:
    from thinkswitch_plugin.plugin import ThinkSwitchPlugin


def __getattr__(name: str) -> Any:
    if name == "ThinkSwitchPlugin":
        from thinkswitch_plugin.plugin import ThinkSwitchPlugin

        return ThinkSwitchPlugin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
