"""One chat template for both modes: a server has one for all adapters, and clients choose by `enable_thinking`.

The two templates stand in the branches of one `if`, untouched, so neither sees what the other sets or defines.
Without the switch it is the instruct template, which opens no trace: then the weights alone decide.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from thinkswitch_plugin.engine_args import ModeArguments
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.merging.vocabulary import require_same_names

NO_ARGUMENTS = ModeArguments()  # type: ignore[call-arg]
SWITCH = "enable_thinking"  # the name that Qwen3's templates, vLLM and its parsers have for it
PROBES: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "x"}],
    [{"role": "system", "content": "s"}, {"role": "user", "content": "x"}],
    [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "<think>\ny\n</think>\n\nz"},
        {"role": "user", "content": "x"},
    ],
)


def combine(instruct: str, thinking: str, arguments: ModeArguments = NO_ARGUMENTS) -> str:
    """One template that renders as `thinking` where `enable_thinking` is true, as `instruct` where it is not.

    Each has its own arguments set, so that clients need this one switch alone, whatever a hybrid calls its own.

    Chat templates are compiled with `trim_blocks` and `lstrip_blocks`: the line feed after each tag of ours goes,
    and the plus keeps the white space before it. A template's own last line feed would have gone too.
    """
    first, second = (
        "".join(f"{{% set {name} = {value!r} %}}\n" for name, value in given.items()) + text.removesuffix("\n")
        for text, given in ((thinking, arguments.thinking), (instruct, arguments.instruct))
    )
    return f"{{% if {SWITCH} is defined and {SWITCH} %}}\n{first}{{%+ else %}}\n{second}{{%+ endif %}}\n"


def combined_template(instruct: Path, thinking: Path, arguments: ModeArguments = NO_ARGUMENTS) -> str:
    """The combined template of two checkpoints, tried on conversations against the two it is made of.

    Raises `ThinkSwitchError` if a checkpoint has no single chat template, the two do not fit into one, or the two
    checkpoints name tokens differently.
    """
    from transformers import AutoTokenizer

    require_same_names(instruct, thinking)
    tokenizers = {folder: AutoTokenizer.from_pretrained(folder) for folder in (instruct, thinking)}
    texts = {folder: chat_template(tokenizer, folder) for folder, tokenizer in tokenizers.items()}
    both = combine(texts[instruct], texts[thinking], arguments)
    for folder, mode, switches in (
        (instruct, "instruct", ({SWITCH: False}, {})),
        (thinking, "thinking", ({SWITCH: True},)),
    ):
        for probe in PROBES:
            for switch in switches:
                own = _render(tokenizers[folder], probe, texts[folder], switch | getattr(arguments, mode))
                if own is not None and _render(tokenizers[folder], probe, both, switch) != own:
                    raise ThinkSwitchError(
                        f"The chat templates of {instruct} and {thinking} cannot be combined: the combined template renders "
                        "differently. Serve the two checkpoints one by one."
                    )
    return both


def chat_template(tokenizer: Any, folder: Path) -> str:
    """A tokenizer's chat template. Raises `ThinkSwitchError` if it has none, or several by name."""
    if not isinstance(tokenizer.chat_template, str):
        raise ThinkSwitchError(f"{folder} has no single chat template; give it a `chat_template.jinja`.")
    return str(tokenizer.chat_template)


def _render(tokenizer: Any, conversation: list[dict[str, str]], template: str, switch: dict[str, bool]) -> str | None:
    """A generation prompt; None where the template refuses the conversation."""
    from jinja2 import TemplateError

    try:
        return str(
            tokenizer.apply_chat_template(
                conversation, chat_template=template, add_generation_prompt=True, tokenize=False, **switch
            )
        )
    except TemplateError:
        return None
