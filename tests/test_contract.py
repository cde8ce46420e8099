"""Which tokens the chat templates of different families train, in real axolotl: the prompt and the end of the turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from axolotl.utils.dict import DictDefault
from datasets import load_dataset
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests import checkpoints
from thinkswitch_plugin.answer_only import load
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.recipe import load_recipe, recipe_path
from thinkswitch_plugin.training import distil

Write = Callable[[str, Sequence[object]], Path]

# The forms that the families' published templates have, without tools and dates.
CHATML = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
GEMMA = (
    "{{ bos_token }}{%- for m in messages %}{%- set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{%- endif %}"
)
LLAMA3 = (
    "{{- bos_token }}{%- for m in messages %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}"
    "{{- m.content | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
COMMAND = (
    "{{ bos_token }}{%- for m in messages %}"
    "{{- '<|START_OF_TURN_TOKEN|>' + ('<|CHATBOT_TOKEN|>' if m.role == 'assistant' else '<|USER_TOKEN|>') }}"
    "{{- m.content + '<|END_OF_TURN_TOKEN|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{%- endif %}"
)
MISTRAL = (
    "{{ bos_token }}{%- for m in messages %}{%- if m.role == 'user' %}{{- '[INST]' + m.content + '[/INST]' }}"
    "{%- else %}{{- m.content + eos_token }}{%- endif %}{%- endfor %}"
)
QWEN3_HYBRID = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}"
    "{%- if m.role == 'assistant' and loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{{- m.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
OPENS_TRACE = CHATML.replace("assistant\\n' }}{%- endif", "assistant\\n<think>\\n' }}{%- endif")
NO_END = "{%- for m in messages %}{{- '<|' + m.role + '|>\\n' + m.content }}{%- endfor %}" + (
    "{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"
)
SIGNED = CHATML.replace("'<|im_end|>\\n' }}{%- endfor", "' (end)<|im_end|>\\n' }}{%- endfor")
CASES = {
    "chatml": (CHATML, "<|im_end|>"),
    "chatml, eos of the base": (CHATML, "<|endoftext|>"),
    "gemma": (GEMMA, "<eos>"),
    "llama3": (LLAMA3, "<|eot_id|>"),
    "llama3, eos of the base": (LLAMA3, "<|end_of_text|>"),
    "phi3": (PHI3, "<|endoftext|>"),
    "command": (COMMAND, "<|END_RESPONSE|>"),
    "mistral": (MISTRAL, "</s>"),
    "qwen3 hybrid": (QWEN3_HYBRID, "<|im_end|>"),
    "opens the trace": (OPENS_TRACE, "<|im_end|>"),
    "no end": (NO_END, "<|endoftext|>"),
    "signed": (SIGNED, "<|im_end|>"),
}
SPECIAL = sorted(
    {"<bos>", "<|endoftext|>", "<eos>", "<|end_of_text|>", "</s>", "<|END_RESPONSE|>", "[INST]", "[/INST]"}
    | {"<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|end|>", "<|user|>", "<|assistant|>"}
    | {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"}
    | {"<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|USER_TOKEN|>"}
)


def tokenizer_of(template: str, eos: str) -> PreTrainedTokenizerFast:
    """One character a token, but for the special ones."""
    characters = ["[UNK]", *map(chr, range(32, 127)), "\n"]
    vocabulary = {token: i for i, token in enumerate(SPECIAL + characters)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in ("<think>", "</think>")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token=eos,
        unk_token="[UNK]",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


def trained(case: str, path: Path, **keys: Any) -> tuple[str, str]:
    """The context and the text with a loss of the one row, by real axolotl."""
    tokenizer = tokenizer_of(*CASES[case])
    cfg = DictDefault({"sequence_len": 256, "train_on_inputs": False, "chat_template": "tokenizer_default", **keys})
    dataset = load_dataset("json", data_files=str(path), split="train")
    strategy = load(tokenizer, cfg, DictDefault({"path": str(path), "type": "thinkswitch_plugin.answer_only"}))
    (row,) = strategy.wrap_dataset(dataset, process_count=1)
    labels = list(row["labels"])
    before = next(place for place, label in enumerate(labels) if label != -100)
    return tokenizer.decode(row["input_ids"][:before]), tokenizer.decode([label for label in labels if label != -100])


@pytest.fixture
def pair(write_jsonl: Write) -> Path:
    turns = [{"role": "user", "content": "What is 2+3?"}, {"role": "assistant", "content": "It is \\boxed{5}."}]
    return write_jsonl("pairs.jsonl", [{"messages": turns}])


@pytest.mark.parametrize(
    ("case", "keys", "context", "end"),
    [
        ("chatml", {}, "<|im_start|>assistant\n", "<|im_end|>"),
        ("chatml, eos of the base", {"eot_tokens": ["<|im_end|>"]}, "<|im_start|>assistant\n", "<|im_end|>"),
        ("gemma", {"eot_tokens": ["<end_of_turn>"]}, "<start_of_turn>model\n", "<end_of_turn>"),
        ("llama3", {}, "assistant<|end_header_id|>\n\n", "<|eot_id|>"),
        ("llama3, eos of the base", {"eot_tokens": ["<|eot_id|>"]}, "assistant<|end_header_id|>\n\n", "<|eot_id|>"),
        ("phi3", {"eot_tokens": ["<|end|>"]}, "<|assistant|>\n", "<|end|><|endoftext|>"),
        ("command", {"eot_tokens": ["<|END_OF_TURN_TOKEN|>"]}, "<|CHATBOT_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
        ("mistral", {}, "[/INST]", "</s>"),
        (
            "qwen3 hybrid",
            {"chat_template_kwargs": {"enable_thinking": False}},
            "<|im_start|>assistant\n<think>\n\n</think>\n\n",
            "<|im_end|>",
        ),
    ],
)
def test_the_answer_is_trained_behind_the_prompt_and_with_its_end(
    case: str, keys: dict[str, Any], context: str, end: str, pair: Path
) -> None:
    before, text = trained(case, pair, **keys)
    assert before.endswith(context) and text == "It is \\boxed{5}." + end
    tokenizer = tokenizer_of(*CASES[case])
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 2+3?"}],
        add_generation_prompt=True,
        tokenize=False,
        **keys.get("chat_template_kwargs", {}),
    )
    assert before == asked


def test_every_answer_of_a_conversation_is_trained(write_jsonl: Write) -> None:
    turns = [("system", "s"), ("user", "2+3?"), ("assistant", "5"), ("user", "4+4?"), ("assistant", "8")]
    path = write_jsonl("pairs.jsonl", [{"messages": [{"role": role, "content": text} for role, text in turns]}])
    for case, keys in (("chatml", {}), ("phi3", {"eot_tokens": ["<|end|>"]})):
        _, text = trained(case, path, **keys)
        end = keys["eot_tokens"][0] if keys else "<|im_end|>"
        assert text.startswith(f"5{end}8{end}")
    with pytest.raises(ThinkSwitchError, match="the answer would be trained behind"):
        trained("qwen3 hybrid", path)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("chatml, eos of the base", r"<\|im_end\|> ends the turn, but would not be trained; set `eot_tokens: \['<\|im"),
        ("gemma", r"set `eot_tokens: \['<end_of_turn>'\]` in the recipe\.$"),
        ("llama3, eos of the base", r"set `eot_tokens: \['<\|eot_id\|>'\]`"),
        ("phi3", r"set `eot_tokens: \['<\|end\|>'\]`"),
        ("command", r"set `eot_tokens: \['<\|END_OF_TURN_TOKEN\|>'\]`"),
        (
            "qwen3 hybrid",
            r"trained behind '.*</think>\\n\\n', but asked for behind '.*assistant\\n'; "
            r"set `chat_template_kwargs: \{enable_thinking: false\}` in the recipe \(for the loop as `thinkswitch.pair.chat_template_kwargs.instruct`\)",
        ),
        ("opens the trace", r"use the template of an instruct checkpoint, which opens no trace"),
        ("no end", "nothing ends the assistant's turn"),
        ("signed", r"'\(end\)' is between the answer and the end of the turn"),
    ],
)
def test_a_template_that_would_train_something_else_is_refused(case: str, message: str, pair: Path) -> None:
    with pytest.raises(ThinkSwitchError, match=f"With the chat template of .*{message}"):
        trained(case, pair)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("chatml", None),
        ("gemma", r"set `eot_tokens: \['<end_of_turn>'\]`"),
        ("qwen3 hybrid", "set `chat_template_kwargs: {enable_thinking: false}`"),
    ],
)
def test_a_recipe_is_held_against_the_template_before_there_are_pairs(
    case: str, message: str | None, tmp_path: Path
) -> None:
    folder = checkpoints.write(tmp_path / "instruct", checkpoints.qwen3(0))
    tokenizer_of(*CASES[case]).save_pretrained(folder)
    loaded = load_recipe(recipe_path("aime"))
    if message is None:
        distil.require_trainable(loaded, str(folder))
        return
    with pytest.raises(ThinkSwitchError, match=message):
        distil.require_trainable(loaded, str(folder))


def test_a_checkpoint_without_config_or_template_is_one_sentence(tmp_path: Path) -> None:
    loaded = load_recipe(recipe_path("aime"))
    with pytest.raises(ThinkSwitchError, match=r"The config or the tokenizer of .* cannot be loaded"):
        distil.require_trainable(loaded, str(tmp_path))
    folder = checkpoints.write(tmp_path / "instruct", checkpoints.qwen3(0))
    tokenizer = tokenizer_of(*CASES["chatml"])
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(ThinkSwitchError, match="has no chat template"):
        distil.require_trainable(loaded, str(folder))
