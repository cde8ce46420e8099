"""The axolotl dataset type `thinkswitch_plugin.post_thinking`: the answer first, then the trace.

In a recipe as `thinkswitch_plugin.pre_thinking`.
"""

from functools import partial

from thinkswitch_plugin.data.formats import POST
from thinkswitch_plugin.training.strategy import strategy

load = partial(strategy, form=POST)
