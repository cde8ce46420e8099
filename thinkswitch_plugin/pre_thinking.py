"""The axolotl dataset type `thinkswitch_plugin.pre_thinking`: the trace first, then the answer.

In a recipe:

    datasets:
      - path: rationales.jsonl          # or generations.jsonl, requests.jsonl beside it
        ds_type: json
        type: thinkswitch_plugin.pre_thinking

`data/formats.py` says how a completion is written. An adaptive model trains on two such entries, one of each format.
"""

from functools import partial

from thinkswitch_plugin.data.formats import PRE
from thinkswitch_plugin.training.strategy import strategy

load = partial(strategy, form=PRE)
