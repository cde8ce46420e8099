"""A real Hugging Face tokenizer of 64 entries, with Qwen's special tokens and chat format."""

from __future__ import annotations

import string
from typing import Literal

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.decoders import Fuse
from transformers import PreTrainedTokenizerFast

Mode = Literal["instruct", "thinking", "hybrid"]
MODES: tuple[Mode, ...] = ("instruct", "thinking")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
THINK_TAGS = ["<think>", "</think>"]  # ordinary added tokens, so that decoding keeps them
WORDS = ["[UNK]", "\n\n", "\n", "user", "assistant", "system", " "]
SYMBOLS = list("0123456789+-*=?.") + list(string.ascii_lowercase)

_TURNS = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' + opening }}{%- endif %}"
)
# As with Qwen3-Thinking-2507, the thinking template itself opens the trace.
OPENINGS: dict[Mode, str] = {"instruct": "", "thinking": "<think>\\n"}
CHAT_TEMPLATES = {mode: f"{{%- set opening = '{opening}' %}}{_TURNS}" for mode, opening in OPENINGS.items()}
# As with Qwen3, a hybrid thinks unless it is told not to, which its template does by an empty trace.
EMPTY_TRACE = "<think>\n\n</think>\n\n"
CHAT_TEMPLATES["hybrid"] = (
    "{%- set opening = '' if enable_thinking | default(true) else '<think>\\n\\n</think>\\n\\n' %}"
    + _TURNS.replace(
        "+ message.content", "+ (opening if message.role == 'assistant' and loop.last else '') + message.content"
    )
)


def build_tokenizer(mode: Mode) -> PreTrainedTokenizerFast:
    """The shared vocabulary with the chat template of one mode."""
    vocabulary = {token: i for i, token in enumerate(SPECIAL + THINK_TAGS + WORDS + SYMBOLS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n\n|\n|user|assistant|system|[\s\S]"), behavior="isolated")
    backend.decoder = Fuse()  # no spaces between tokens
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in THINK_TAGS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="[UNK]",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        padding_side="left",
    )
    tokenizer.chat_template = CHAT_TEMPLATES[mode]
    return tokenizer
