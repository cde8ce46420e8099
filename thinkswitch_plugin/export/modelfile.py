"""A Modelfile for Ollama that keeps a checkpoint's mode: its chat template as a Go template, and the recipe's sampling.

Ollama does not run the Jinja template in a GGUF. What a template puts around each turn is found by rendering short
conversations; the Go template built of these parts is used only if it gives the same text as the Jinja template:

    {{ range $i, $m := .Messages }}{{ if eq .Role "user" }}<|im_start|>user
    {{ .Content }}<|im_end|>
    …{{ end }}<|im_start|>assistant
    <think>
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from thinkswitch_plugin.args import ThinkSwitchKeys
from thinkswitch_plugin.engines.generate import room_for
from thinkswitch_plugin.errors import ThinkSwitchError

Turns = Sequence[tuple[str, str]]  # roles and texts
SYSTEM, USER, ASSISTANT = ("system", "sssss"), ("user", "uuuuu"), ("assistant", "aaaaa")
PROBES: tuple[Turns, ...] = (
    [USER],
    [SYSTEM, USER],
    [USER, ASSISTANT, ("user", "vvvvv")],
    [SYSTEM, USER, ASSISTANT, ("user", "vvvvv"), ("assistant", "bbbbb"), ("user", "wwwww")],
)


@dataclass(frozen=True)
class Parts:
    """What a chat template writes around texts: (before, after) of each role, a start without system turn, the prompt."""

    start: str
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    prompt: str

    @classmethod
    def of(cls, render: Any) -> Parts:
        """Find the parts by rendering. Raises `ValueError` if a text is not in the rendered conversation as it is.

        Args:
            render: turns -> text, with the generation prompt.
        """
        one = render([USER])
        first, after = _cut(one, USER[1])
        _, answered = _cut(render([USER, ASSISTANT, ("user", "vvvvv")]), USER[1])
        before_answer, rest = _cut(answered, ASSISTANT[1])
        between, end = _cut(rest, "vvvvv")
        closing = _common(before_answer, after)  # of a turn of the user
        before_user = _common(between[::-1], first[::-1])[::-1]
        with_system, _ = _cut(render([SYSTEM, USER]), USER[1])
        before_system, after_system = _cut(with_system, SYSTEM[1])
        if end != after:
            raise ValueError("the last turn is written in another way than the first")
        return cls(
            start=first.removesuffix(before_user),
            system=(before_system, after_system.removesuffix(before_user)),
            user=(before_user, closing),
            assistant=(before_answer.removeprefix(closing), between.removesuffix(before_user)),
            prompt=after.removeprefix(closing),
        )

    def render(self, turns: Turns) -> str:
        """A conversation, as the Go template writes it."""
        around: Mapping[str, tuple[str, str]] = {
            "system": self.system,
            "user": self.user,
            "assistant": self.assistant,
        }
        start = "" if turns[0][0] == "system" else self.start
        return start + "".join(f"{around[role][0]}{text}{around[role][1]}" for role, text in turns) + self.prompt

    def go(self) -> str:
        """The Go template."""

        def branch(role: str, around: tuple[str, str]) -> str:
            return f'{{{{ if eq $m.Role "{role}" }}}}{_literal(around[0])}{{{{ $m.Content }}}}{_literal(around[1])}{{{{ end }}}}'

        start = f"{{{{ if not .System }}}}{_literal(self.start)}{{{{ end }}}}" if self.start else ""
        turns = "".join(branch(role, getattr(self, role)) for role in ("system", "user", "assistant"))
        return f"{start}{{{{ range $i, $m := .Messages }}}}{turns}{{{{ end }}}}{_literal(self.prompt)}"


def _cut(text: str, at: str) -> tuple[str, str]:
    before, found, after = text.partition(at)
    if not found:
        raise ValueError("a turn's text is left out or changed")
    return before, after


def _common(one: str, other: str) -> str:
    """What two texts begin with."""
    return "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _literal(text: str) -> str:
    """Text in a Go template inside the three quotes of a Modelfile. Raises `ValueError` if it cannot stand there."""
    if '"""' in text:
        raise ValueError("it writes three quotes")
    return text.replace("{{", '{{ "{{" }}')


def modelfile(weights: str, folder: Path, mode: str, keys: ThinkSwitchKeys) -> str:
    """The Modelfile of a checkpoint whose GGUF is the file `weights` beside it.

    Raises `ThinkSwitchError` if its chat template cannot be written as a Go template.
    """
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)

    def render(turns: Turns) -> str:
        conversation = [{"role": role, "content": text} for role, text in turns]
        return str(
            tokenizer.apply_chat_template(
                conversation, add_generation_prompt=True, tokenize=False, **keys.pair.arguments(mode)
            )
        )

    try:
        parts = Parts.of(render)
        if any(parts.render(turns) != render(turns) for turns in PROBES):
            raise ValueError("it is not the same before every turn")
        template = parts.go()
    except (ValueError, TemplateError) as problem:
        raise ThinkSwitchError(
            f"The chat template of {folder} cannot be written for Ollama ({problem}); llama.cpp's own server reads it "
            "from the GGUF: llama-server --jinja."
        ) from None
    sampling = keys.sampling
    settings: dict[str, Any] = {"temperature": sampling.temperature}
    if sampling.temperature > 0:
        settings |= {"top_p": sampling.top_p, "top_k": sampling.top_k}
    settings["num_predict"] = sampling.max_tokens
    # Ollama's own limit would cut a trace.
    settings["num_ctx"] = room_for(str(folder), sampling.max_tokens)
    lines = [f"FROM ./{weights}", f'TEMPLATE """{template}"""']
    lines += [f'SYSTEM """{keys.prompts.system}"""'] if keys.prompts.system else []
    lines += [f"PARAMETER {name} {value}" for name, value in settings.items()]
    return "\n".join([*lines, f'PARAMETER stop "{tokenizer.eos_token}"', ""])
