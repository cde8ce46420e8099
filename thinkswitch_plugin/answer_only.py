"""The axolotl dataset type `thinkswitch_plugin.answer_only`: traces removed.

In a recipe:

    datasets:
      - path: runs/arithmetic/iter-1/pairs.jsonl     # or .../generations.jsonl
        ds_type: json
        type: thinkswitch_plugin.answer_only
"""

from __future__ import annotations

from typing import Any

from thinkswitch_plugin.training.strategy import Completions, strategy


def load(tokenizer: Any, cfg: Any, ds_cfg: Any = None) -> Completions:
    """axolotl's entry: the strategy that turns the rows of one dataset into token ids and labels."""
    return strategy(tokenizer, cfg, ds_cfg, None)
