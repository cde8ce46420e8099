"""What a rehearsal needs: a random pair of the recipe's shape, and what the hub does not give."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from experiments import random_pair
from thinkswitch_plugin import console, files
from thinkswitch_plugin.args import PairKeys, is_local
from thinkswitch_plugin.data import task_files
from thinkswitch_plugin.data.prompts import prompts_of_iteration
from thinkswitch_plugin.demo import words
from thinkswitch_plugin.demo.tokenizer import CHAT_TEMPLATES, SPECIAL, THINK_TAGS
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.loop.check import described
from thinkswitch_plugin.recipe import Recipe
from thinkswitch_plugin.run import MODES
from thinkswitch_plugin.run.stamp import folder_once

# For when the hub cannot be reached, by instruct checkpoint.
SHAPES: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-4B-Instruct-2507": random_pair.QWEN3_4B,
    "Qwen/Qwen3-30B-A3B-Instruct-2507": {
        **random_pair.QWEN3_4B,
        **{"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "tie_word_embeddings": False},
        **{"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_key_value_heads": 4},
        **{"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True},
        "rope_theta": 10_000_000,
    },
    "meta-llama/Llama-3.1-8B-Instruct": {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "dtype": "bfloat16"},
        **{"intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
        **{"vocab_size": 128_256, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "rope_theta": 500_000},
        "tie_word_embeddings": False,
    },
}
VOCABULARY = 8192  # entries of a tokenizer that is made here, at most
# The files that the tasks of AIME and PubMedQA read in THINKSWITCH_DATA.
DATA_FILES = ("aime_2026", "aime25", "pubmedqa")


@dataclass(frozen=True)
class Shape:
    """A config.json, and where the tokenizers of both modes are; None if they are to be made."""

    config: Mapping[str, Any]
    tokenizers: Mapping[str, Path] | None

    @property
    def bytes(self) -> int:
        """The size of one checkpoint in bfloat16."""
        return 2 * sum(map(math.prod, random_pair.shapes(self.config).values()))


@dataclass(frozen=True)
class Material:
    """What a rehearsal runs on.

    Attributes:
        pair: the folders by mode; see `make_pair`.
        prompts, axolotl: keys of the recipe that change because the hub did not give prompts or tokenizer.
        data: for THINKSWITCH_DATA; None if the questions can be loaded.
        vllm: a folder for what runs inside vLLM.
    """

    pair: Mapping[str, str]
    prompts: dict[str, Any]
    axolotl: dict[str, Any]
    data: Path | None
    vllm: Path

    def make_pair(self, shape: Shape) -> None:
        """Make the checkpoints, once: their weights may be deleted afterwards."""
        folders = {Path(name).name: Path(name) for name in self.pair.values()}

        def build(building: Path) -> None:
            console.say(f"  making {len(folders)} random checkpoints of {shape.bytes / 1e9:.1f} GB")
            for mode in folders:
                tokenizer = _tokenizer(shape, mode)
                noise = random_pair.NOISE if mode == "thinking" else 0.0
                random_pair.write_checkpoint(building / mode, _with_ids(shape, tokenizer), noise)
                tokenizer.save_pretrained(building / mode)
                ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
                files.write_json(building / mode / "generation_config.json", ends)

        key = {"config": dict(shape.config), "modes": list(folders)}
        folder_once(next(iter(folders.values())).parent, "made.json", key, build)


def shape_of(keys: PairKeys, seed: int) -> Shape:
    """The shape of a recipe's pair: of a folder or the hub, else one that is held here.

    Raises `ThinkSwitchError` if there is none.
    """
    names = {"instruct": (keys.instruct, keys.revision_instruct), "thinking": (keys.thinking, keys.revision_thinking)}
    try:
        folders = {mode: described(name, revision, seed) for mode, (name, revision) in names.items()}
        config = files.read_json(folders["instruct"] / "config.json")
    except ThinkSwitchError:
        if keys.instruct not in SHAPES or is_local(keys.instruct):
            raise
        console.say(f"  {keys.instruct} cannot be reached; its shape is known here, and a tokenizer is made")
        return Shape(SHAPES[keys.instruct], None)
    whole = all((folder / "tokenizer_config.json").is_file() for folder in folders.values())
    return Shape({**config, "dtype": "bfloat16"}, folders if whole else None)


def prepare(recipe: Recipe, shape: Shape, folder: Path, seed: int, prompts: int) -> Material:
    """What is needed besides the pair's weights, in a folder."""
    keys = recipe.keys
    changed: dict[str, Any] = {}
    if keys.prompts.hub and not _loads(lambda: prompts_of_iteration(keys.prompts, seed, 1)):
        path = folder / "prompts.jsonl"
        files.write_jsonl(path, rows(f"prompts-{seed}", 3 * max(8, prompts)))
        gone = ("hub", "config", "revision", "outside", "split")
        changed = {**dict.fromkeys(gone), "path": str(path), "id": "id"}
    data = None
    if not _loads(lambda: task_files.load(keys.evaluation.task)):
        data = folder / "data"
        for name in DATA_FILES:
            files.write_jsonl(data / f"{name}.jsonl", rows("questions", 30, novel=True))
        console.say("  the questions cannot be loaded; others take their place")
    pair = {mode: str(folder / "pair" / ("hybrid" if keys.pair.hybrid else mode)) for mode in MODES}
    axolotl = {} if shape.tokenizers else dict.fromkeys(("eot_tokens", "special_tokens"))
    return Material(pair, changed, axolotl, data, folder / "vllm")


def _loads(load: Any) -> bool:
    try:
        load()
    except ThinkSwitchError:
        return False
    return True


def rows(name: str, count: int, *, novel: bool = False) -> Iterator[dict[str, Any]]:
    """Questions in words, with the columns of all the datasets that the shipped recipes and tasks read.

    Args:
        novel: made of other words, so that they are nobody's training prompts.
    """
    for number in range(count):
        several = [found.prompt for found in words.questions(f"{name}-{number}", 4, novel=novel)]
        yield {
            **{"id": f"r{number}", "pubid": f"{name}-{number}", "context": {"contexts": several[1:]}},
            **dict.fromkeys(("prompt", "problem"), " ".join(several)),
            **{"question": several[0], "answer": number, "final_decision": ("yes", "no", "maybe")[number % 3]},
        }


def _with_ids(shape: Shape, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The config.json with the special tokens of a tokenizer that was made here."""
    if shape.tokenizers:
        return dict(shape.config)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    return {**shape.config, **ids}


def _tokenizer(shape: Shape, mode: str) -> PreTrainedTokenizerBase:
    if shape.tokenizers:
        return AutoTokenizer.from_pretrained(shape.tokenizers["instruct" if mode == "hybrid" else mode])
    tokenizer = trained(min(VOCABULARY, shape.config["vocab_size"]))
    tokenizer.chat_template = CHAT_TEMPLATES[mode]  # type: ignore[index]
    return tokenizer


def trained(size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE as Qwen's, with single digits and at most so many entries, trained on the questions themselves."""
    backend = Tokenizer(models.BPE())
    digits, pieces = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pieces])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(  # type: ignore[no-untyped-call]
        vocab_size=size - len(THINK_TAGS),
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((json.dumps(row) for row in rows("tokenizer", 300)), trainer)
    backend.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in THINK_TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
    )
