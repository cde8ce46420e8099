"""How reasoning models write their traces: one table, as data.

    <think>a</think>b                                    think
    <|channel>thought\\na<channel|>b                      gemma4
    Here is my thought process: a Here is my response: b  granite

An entry that holds a tag is looked for anywhere in a completion, in upper or lower case, with white space, full-width
or HTML-escaped brackets; `…` stands for up to 80 characters of the line. Any other entry is a phrase, looked for as it is
written (`#` stands for a heading of any level); a phrase, and every entry of an `anchored` convention, opens a trace
only at the very start of a completion.
Sources: vLLM's reasoning parsers, the chat templates of the families named, and outputs of theirs.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Convention:
    """One way to write a trace: what opens it, and what ends it. The first of each is the usual one."""

    name: str
    families: str
    opens: tuple[str, ...]
    closes: tuple[str, ...]
    anchored: bool = False  # counts only at the start of a completion
    channels: bool = False  # each opening ends the part before it, so that nothing is nested


def _tags(name: str, families: str, *more: str) -> Convention:
    """`<name>…</name>`, and further names that the same families use for the same tag."""
    names = (name, *more)
    return Convention(name, families, tuple(f"<{n}>" for n in names), tuple(f"</{n}>" for n in names))


CONVENTIONS = (
    _tags("think", "Qwen3, QwQ, DeepSeek-R1, GLM, Phi-4-reasoning, Nemotron, OLMo 3, SmolLM3, Magistral 2506 and most others"),
    _tags("thinking", "Claude prompts, Amazon Nova, Reflection, RL recipes"),
    _tags("thought", "EXAONE Deep, Marco-o1", "thoughts"),
    _tags("reasoning", "Reka Flash 3, LLaVA-CoT, GRPO recipes", "reason", "reasoning_process", "thinking_process"),
    _tags("analysis", "prompted models"),
    _tags("reflection", "Reflection 70B"),
    _tags("scratchpad", "prompted models", "scratch_pad", "antthinking"),
    _tags("internal_monologue", "prompted models", "inner_monologue", "inner_thoughts", "internal_thoughts", "monologue"),
    _tags("cot", "prompted models", "chain_of_thought", "chain-of-thought", "rationale"),
    _tags("seed:think", "Seed-OSS"),
    _tags("mm:think", "MiniMax-M3"),
    _tags("longcat_think", "LongCat-Flash-Thinking"),
    Convention(
        "k2",
        "K2 Horizon",
        ("<ifm|think>", "<ifm|think_fast>", "<ifm|think_faster>"),
        ("</ifm|think>", "</ifm|think_fast>", "</ifm|think_faster>"),
    ),
    Convention("mistral", "Magistral, Mistral Small 4", ("[THINK]",), ("[/THINK]",)),
    Convention("thought-tokens", "Sky-T1, OpenThinker, Bespoke-Stratos", ("<|begin_of_thought|>",), ("<|end_of_thought|>",)),
    Convention("quiet-star", "Quiet-STaR", ("<|startofthought|>",), ("<|endofthought|>",)),
    Convention("kimi", "Kimi-VL-Thinking, Kimi k1.5", ("◁think▷",), ("◁/think▷",)),
    Convention("kimi-k3", "Kimi K3", ("<|open|>think<|sep|>",), ("<|close|>think<|sep|>",)),
    Convention("cohere", "Command A Reasoning", ("<|START_THINKING|>",), ("<|END_THINKING|>",)),
    Convention("gemma4", "Gemma 4", ("<|channel>thought", "<|channel>"), ("<channel|>",)),
    Convention("medgemma", "MedGemma 1.5", ("<unused94>thought", "<unused94>"), ("<unused95>",)),
    Convention(
        "harmony",
        "gpt-oss",
        (
            "<|channel|>analysis<|message|>", "<|channel|>analysis…<|message|>", "<|channel|>commentary…<|message|>",
            "analysis", "commentary",  # its special tokens skipped
        ),
        ("<|end|><|start|>assistant<|channel|>final<|message|>", "<|channel|>final<|message|>", "<|channel|>final…<|message|>", "assistantfinal"),
    channels=True,
    ),
    Convention("muse", "Muse Glimmer", ("to=self<|message|>",), ("<|eom|>to=user<|message|>", "to=user<|message|>"), channels=True),
    Convention("inkling", "Inkling", ("<|content_thinking|>",), ("<|end_message|><|content_text|>", "<|end_message|><|message_model|><|content_text|>", "<|content_text|>"), channels=True),
    Convention("plamo", "PLaMo 3", ("<|plamo:begin_think:plamo|>",), ("<|plamo:end_think:plamo|>",)),
    Convention("apertus", "Apertus", ("<|inner_prefix|>",), ("<|inner_suffix|>",)),
    Convention(
        "think-tokens",
        "Solar Open",
        ("<|think|>", "<|thinking|>"),
        ("<|end|><|begin|>assistant<|content|>", "<|content|>", "<|/think|>", "<|/thinking|>", "<|end_think|>"),
    ),
    Convention("s1", "s1", ("<|im_start|>think",), ("<|im_start|>answer",)),
    Convention("hyperclova", "HyperCLOVA X SEED Think", ("/think\n",), ("<|im_end|>\n<|im_start|>assistant",), anchored=True),
    Convention("apriel", "Apriel Thinker", ("Here are my reasoning steps:",), ("[BEGIN FINAL RESPONSE]",)),
    Convention(
        "granite",
        "Granite 3.2",
        ("Here is my thought process:", "Here's my thought process:", "Here’s my thought process:"),
        ("Here is my response:", "Here's my response:", "Here’s my response:"),
        anchored=True,
    ),
    Convention("huatuo", "HuatuoGPT-o1", ("# Thinking\n",), ("# Final Response\n",), anchored=True),
    Convention("ollama", "Ollama's command line", ("Thinking...\n",), ("...done thinking.\n",), anchored=True),
    Convention("details", "Open WebUI", ("<details…>",), ("</details>",), anchored=True),
    Convention("thought-text", "Gemma 4, MedGemma, their special tokens skipped", ("thought\n",), (), anchored=True),
    Convention("process-text", "Qwen3.5, its tags lost", ("Thinking Process:", "**Thinking Process:**", "# Thinking Process\n"), (), anchored=True),
)  # fmt: skip
NONE = Convention("none", "a checkpoint that answers directly", (), ())

# What encloses a whole answer.
WRAPPERS = (
    *((f"<{name}>", f"</{name}>") for name in (
        "answer", "response", "output", "solution", "conclusion", "final", "final_answer", "final_response", "result",
    )),
    ("<|begin_of_solution|>", "<|end_of_solution|>"),
    ("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    ("<|START_TEXT|>", "<|END_TEXT|>"),
    ("<|begin_of_box|>", "<|end_of_box|>"),
    ("<|open|>response<|sep|>", "<|close|>response<|sep|>"),
    ("[ANSWER]", "[/ANSWER]"),
)  # fmt: skip

# What ends a turn where an engine leaves it in the text.
ENDS = (
    "</s>", "<eos>", "<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eot|>", "<|eom|>", "<|eom_id|>",
    "<|end|>", "<|return|>", "<|call|>", "<|user|>", "<|flush|>", "<end_of_turn>", "<turn|>", "[|endofturn|]", "[EOS]", "[eos]",
    "<｜end▁of▁sentence｜>", "<|end▁of▁sentence|>", "<|END_OF_TURN_TOKEN|>", "<|end_of_msg|>", "<|end_message|>", "<|hy_eos|>",
    "<|content_model_end_sampling|>", "<|plamo:tag|>", "<|close|>message<|sep|>", "<seed:eos>", "<|assistant_end|>",
    "<|role_end|>", "<|message_sep|>", "[END FINAL RESPONSE]", "[e~[", "<|eos|>", "<SPECIAL_12>", "<|end_of_role|>", "<sep>", "[EOT]", "<|ipynb|>",
)  # fmt: skip

# Neither trace nor answer: calls of tools, and pieces of a frame that is broken.
LEFTOVERS = (
    "<tool_call>", "</tool_call>", "<tool_calls>", "</tool_calls>", "[TOOL_CALLS]", "<function_calls>", "</function_calls>",
    "<|channel|>", "<|message|>", "<minimax:tool_call>", "<seed:tool_call>", "<longcat_tool_call>", "<tool_response>", "<ifm|tool_calls>",
    "<tool_use>", "<function_call>", "<plan>", "<planning>", "<draft>", "<brainstorm>",
)  # fmt: skip

# What the name of a tag of a trace holds, in the languages that models are trained to think in.
TRACE_WORDS = (
    "think", "thought", "reasoning", "scratchpad", "monolog", "reflect", "chainof", "思考", "思维", "思維", "推理", "생각", "추론",
    "размышлени", "рассуждени", "réflexion", "raisonnement", "denken", "denkprozess", "überlegung", "pensamiento",
    "razonamiento", "pensamento", "raciocínio", "pensiero", "ragionamento",
)  # fmt: skip

_BY_NAME = {each.name: each for each in (*CONVENTIONS, NONE)}


def fault(value: object, where: str) -> str | None:
    """What keeps a value from naming how a trace is written, None if nothing does."""
    if isinstance(value, str):
        if value == "auto" or value in _BY_NAME:
            return None
        (near,) = difflib.get_close_matches(value, _BY_NAME, 1, 0.0) or ("think",)
        return (
            f"{where} is {value[:60]!r}, and the nearest convention is {near!r}; use auto, none, {{open: …, close: …}}, "
            f"or one of {', '.join(each.name for each in CONVENTIONS)}"
        )
    if not isinstance(value, dict) or value.keys() != {"open", "close"}:
        return f"{where} is neither the name of a convention nor {{open: …, close: …}}"
    for name, text in value.items():
        if not isinstance(text, str) or not text.strip():
            return f"`{name}` of {where} is not a text; write what {name}s the trace"
    if value["open"].strip() == value["close"].strip():
        return f"{where} has the same text for `open` and `close`; a trace then has no end that can be known"
    return None


def from_key(value: str | dict[str, str]) -> Convention | None:
    """The convention that a value without `fault` names, as `thinkswitch.trace` of a recipe; None for `auto`."""
    if isinstance(value, dict):
        return Convention("custom", "the user's own", (value["open"],), (value["close"],))
    return None if value == "auto" else _BY_NAME[value]


def as_metadata(convention: Convention | None) -> dict[str, Any]:
    """A convention as the metadata of a request holds it: nothing for any convention of the table."""
    if convention is None or convention is NONE:
        return {}
    if convention.name == "custom":
        return {"convention": {"open": convention.opens[0], "close": convention.closes[0]}}
    return {"convention": convention.name}
