"""The axolotl dataset type `thinkswitch_plugin.pre_thinking`: the trace first, then the answer.

In a recipe:

    datasets:
      - path: rationales.jsonl          # or generations.jsonl, requests.jsonl beside it
        ds_type: json
        type: thinkswitch_plugin.pre_thinking

`data/formats.py` says how a completion is written. An adaptive model trains on two such entries, one of
each format.
"""

from __future__ import annotations

from typing import Any

from thinkswitch_plugin.data.formats import PRE
from thinkswitch_plugin.training.strategy import Completions, strategy


def load(tokenizer: Any, cfg: Any, ds_cfg: Any = None) -> Completions:
    """axolotl's entry: the strategy that turns the rows of one dataset into token ids and labels."""
    return strategy(tokenizer, cfg, ds_cfg, PRE)
