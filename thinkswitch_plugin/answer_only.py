"""The axolotl dataset type `thinkswitch_plugin.answer_only`: traces removed.

In a recipe:

    datasets:
      - path: runs/arithmetic/iter-1/pairs.jsonl     # or .../generations.jsonl
        ds_type: json
        type: thinkswitch_plugin.answer_only
"""

from functools import partial

from thinkswitch_plugin.training.strategy import strategy

load = partial(strategy, form=None)
