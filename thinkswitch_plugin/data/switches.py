"""The switch of a hybrid checkpoint: arguments of its chat template that turn its trace on and off.

{{- '<think>\\n\\n</think>\\n\\n' if enable_thinking is false }}      Qwen3, GLM-4.5, SmolLM3 and most
{%- if thinking %}…                                                   Granite, DeepSeek-V3.1
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from thinkswitch_plugin.args import PairKeys
from thinkswitch_plugin.data import traces
from thinkswitch_plugin.engine_args import MODES, TEMPLATE_KEY

# The known switches, with their values by mode.
SWITCHES: dict[str, dict[str, Any]] = {
    "enable_thinking": {"instruct": False, "thinking": True},
    "thinking": {"instruct": False, "thinking": True},
    "reasoning": {"instruct": False, "thinking": True},  # Command A Reasoning
    "thinking_budget": {"instruct": 0, "thinking": -1},  # Seed-OSS
}


def switch_of(tokenizer: Any) -> str | None:
    """The known switch under which a chat template renders another prompt in each mode, None if it has none."""
    for name, values in SWITCHES.items():
        if _reads(tokenizer, name):
            off, on = (traces.generation_prompt(tokenizer, {name: value}) for value in values.values())
            if off != on:
                return name
    return None


def fault(keys: PairKeys, tokenizers: dict[str, Any]) -> str | None:
    """What is wrong with the template arguments of a pair, and which lines help; None if nothing is.

    Args:
        tokenizers: of the two checkpoints, by mode.
    """
    for mode, tokenizer in tokenizers.items():
        for name in keys.arguments(mode):
            if not _reads(tokenizer, name):
                switch = switch_of(tokenizer)
                advice = f"its switch is `{switch}`" if switch else "it has no known switch: remove the argument"
                return (
                    f"`thinkswitch.pair.{TEMPLATE_KEY}.{mode}` has `{name}`, which the chat template of "
                    f"{getattr(keys, mode)} ignores; {advice}"
                )
    asked = {mode: traces.generation_prompt(each, keys.arguments(mode)) for mode, each in tokenizers.items()}
    if keys.hybrid:
        if asked["instruct"] != asked["thinking"]:
            return None
        switch = switch_of(tokenizers["instruct"])
        advice = _lines(switch, MODES) if switch else "it has no known switch: name two checkpoints"
        return f"the chat template of {keys.instruct} gives the same prompt in both modes; {advice}"
    for mode, other in (MODES, MODES[::-1]):
        switch = None if keys.arguments(mode) else switch_of(tokenizers[mode])
        if switch and asked[mode] == traces.generation_prompt(tokenizers[mode], {switch: SWITCHES[switch][other]}):
            return (
                f"{getattr(keys, mode)} is a hybrid, whose chat template would ask it in {other} mode; "
                f"{_lines(switch, (mode,))}"
            )
    return None


def _lines(switch: str, modes: Sequence[str]) -> str:
    given = ", ".join(f"{mode}: {{{switch}: {json.dumps(SWITCHES[switch][mode])}}}" for mode in modes)
    return f"write `{TEMPLATE_KEY}: {{{given}}}` under `thinkswitch.pair`"


def _reads(tokenizer: Any, name: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", str(tokenizer.chat_template)) is not None
