"""The perception module: what it reads, where its prompts go, and that no step loses it."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.prompt_embeds import write_plain_view
from experiments.soft_prompts import replaced_prompts, soft_prompts
from tests.conftest import BIN, ROOT, Command
from thinkswitch_plugin import files
from thinkswitch_plugin.args import PerceptionKeys
from thinkswitch_plugin.demo import task
from thinkswitch_plugin.demo.pair import PairSettings, new_model, save_checkpoint
from thinkswitch_plugin.demo.tokenizer import build_tokenizer
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.perception import features
from thinkswitch_plugin.perception.markers import Markers, find_markers, find_spans
from thinkswitch_plugin.perception.model import attach, load, prompt_embeds
from thinkswitch_plugin.perception.module import Perception
from thinkswitch_plugin.perception.student import make_student
from thinkswitch_plugin.run import checkpoint

TOKENS = 3
QUESTIONS = ["7*3+4*2", "1+2", "9*0-4"]


def keys(**changes: Any) -> PerceptionKeys:
    return PerceptionKeys.model_validate({"tokens": TOKENS, **changes})


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 with random weights, whose chat template has room for a soft prompt."""
    folder = tmp_path_factory.mktemp("perception")
    torch.manual_seed(0)
    tokenizer = build_tokenizer("instruct")
    save_checkpoint(new_model(PairSettings(layers=2), tokenizer), tokenizer, folder / "base")
    make_student(folder / "base", folder / "student", soft_tokens=TOKENS)
    return folder / "student"


def fresh(student: Path, **changes: Any) -> tuple[Any, Any]:
    tokenizer = AutoTokenizer.from_pretrained(student, padding_side="left")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(student)
    attach(model, keys(**changes), tokenizer)
    return model.eval(), tokenizer


def rendered(tokenizer: Any, questions: Sequence[str], **options: Any) -> Any:
    turns = [[{"role": "user", "content": question}] for question in questions]
    return tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True, **options
    )


# --- the module ---


@pytest.mark.parametrize("hidden", [32, 512])
@pytest.mark.parametrize(
    "changes", [{}, {"static": True}, {"cross_attention": False}, {"features": []}, {"tokens": 1, "queries": 2}]
)
def test_prompts_have_their_shape_and_the_scale_of_the_embedding_table(hidden: int, changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    chosen = keys(**changes)
    module = Perception(hidden, chosen, scale=0.05)
    mask = torch.arange(9) < torch.tensor([[9], [4], [1], [7]])
    found = module(0.05 * torch.randn(4, 9, hidden), mask, torch.rand(4, len(chosen.features)))
    assert found.shape == (4, chosen.tokens, hidden) and found.dtype == torch.float32
    assert found.std().item() == pytest.approx(0.05, rel=0.3)
    assert bool((found[0] == found[1]).all()) == chosen.static


def test_what_lies_behind_the_mask_is_not_read() -> None:
    module = Perception(32, keys())
    embeddings, mask = torch.randn(1, 6, 32), torch.tensor([[True] * 4 + [False] * 2])
    padded = embeddings.clone()
    padded[:, 4:] = 1e3
    values = torch.ones(1, 1)
    torch.testing.assert_close(module(embeddings, mask, values), module(padded, mask, values))
    torch.testing.assert_close(module(embeddings, mask, values), module(embeddings[:, :4], mask[:, :4], values))


def test_the_order_of_a_question_counts() -> None:
    module = Perception(32, keys())
    embeddings, mask, values = torch.randn(1, 6, 32), torch.ones(1, 6, dtype=torch.bool), torch.ones(1, 1)
    assert not torch.allclose(module(embeddings, mask, values), module(embeddings.flip(1), mask, values), atol=1e-4)


def test_it_stays_in_float32_when_the_model_is_cast_or_runs_under_autocast() -> None:
    module = torch.nn.ModuleDict({"perception": Perception(32, keys())})
    before = copy.deepcopy(module.state_dict())
    module.to(torch.bfloat16)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    inputs = torch.randn(2, 5, 32), torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 1)
    plain = module["perception"](*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(module["perception"](*inputs), plain, rtol=0, atol=0)


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ThinkSwitchError, match=r"`thinkswitch\.perception\.heads: 5` does not divide"):
        Perception(32, keys(heads=5))


# --- features ---


def test_words_and_the_scale_of_features() -> None:
    assert features.words("7*3+4*2") == 4 and features.words("Isn't it so?") == 3 and features.words("") == 0
    assert features.read("a b c", ["words"]) == [pytest.approx(1.3863, abs=1e-4)]


@pytest.mark.parametrize(("name", "library"), [("readability", "textstat"), ("dependency_distance", "spacy")])
def test_a_feature_whose_library_is_missing_is_one_sentence(
    name: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, library, None)
    features._textstat.cache_clear()
    features._spacy.cache_clear()
    with pytest.raises(ThinkSwitchError, match=f"`{name}` needs .*`pip install {library}`"):
        features.read("How far is the moon?", [name])


def test_readability_needs_no_network() -> None:
    pytest.importorskip("textstat")
    easy, hard = (
        "The cat sat on the mat.",
        "Notwithstanding considerable methodological heterogeneity, conclusions hold.",
    )
    assert features.readability(easy) < features.readability(hard)


def test_dependency_distance_of_a_parse() -> None:
    tokens = pytest.importorskip("spacy.tokens")
    vocabulary = pytest.importorskip("spacy.vocab").Vocab()
    # "the cat sat": the -> cat, cat -> sat, sat is the root; "down" hangs two places behind it
    words = ["the", "cat", "sat", "right", "down"]
    parsed = tokens.Doc(vocabulary, words=words, heads=[1, 2, 2, 4, 2], deps=["dep"] * len(words))
    assert features.mean_distance(parsed) == pytest.approx((1 + 1 + 1 + 2) / 4)


# --- where the questions are ---

S, E = 90, 91  # placeholder and end of turn


@pytest.mark.parametrize(
    ("rows", "spans"),
    [
        ([[1, S, S, S, 5, 6, E, 2]], [[0, 1, 6]]),
        ([[0, 0, 1, S, S, S, 5, E], [1, S, S, S, 5, 6, E, 0]], [[0, 3, 7], [1, 1, 6]]),  # left- and right-padded
        ([[E, S, S, S, 5, E, 3, E, S, S, S, 6, 7, E, 4, E]], [[0, 1, 5], [0, 8, 13]]),  # two sequences packed
        ([[S, S, S, E]], [[0, 0, 3]]),  # an empty question
        ([[1, 5, E, 2]], []),
    ],
)
def test_questions_are_found_in_the_ids_alone(rows: list[list[int]], spans: list[list[int]]) -> None:
    assert find_spans(torch.tensor(rows), Markers(S, E), TOKENS).tolist() == spans


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1, S, S, 5, 6, E, 2, 2], "groups that are not of 3"),
        ([1, S, S, S, S, 5, E, 2], "groups that are not of 3"),
        ([1, 5, 5, 5, 5, 5, S, S], "groups that are not of 3"),
        ([1, E, S, S, S, 5, 6, 7], "has no end of turn"),
    ],
)
def test_a_broken_group_and_a_cut_question_are_refused(row: list[int], message: str) -> None:
    with pytest.raises(ThinkSwitchError, match=message):
        find_spans(torch.tensor([row]), Markers(S, E), TOKENS)


def test_the_template_says_how_a_turn_ends_and_must_agree_with_the_recipe(student: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(student)
    assert tokenizer.convert_ids_to_tokens([find_markers(tokenizer, TOKENS).end]) == ["<|im_end|>"]
    with pytest.raises(ThinkSwitchError, match=rf"puts {TOKENS} <\|soft\|> before a question where .* is 5"):
        find_markers(tokenizer, 5)
    with pytest.raises(ThinkSwitchError, match=r"has no token <\|soft\|>"):
        find_markers(build_tokenizer("instruct"), TOKENS)
    tokenizer.chat_template = "{% for m in messages %}" + "<|soft|>" * TOKENS + "{{ m.content }}.\n{% endfor %}"
    with pytest.raises(ThinkSwitchError, match="ends a user turn by ordinary text"):
        find_markers(tokenizer, TOKENS)


# --- the hook ---


def test_padding_and_packing_give_every_question_its_own_prompt(student: Path) -> None:
    model, tokenizer = fresh(student)
    table = model.get_input_embeddings().weight
    alone = torch.cat([soft_prompts(model, rendered(tokenizer, [q])["input_ids"]) for q in QUESTIONS])
    assert not torch.allclose(alone[0], alone[1], atol=1e-3)
    left, right = rendered(tokenizer, QUESTIONS), rendered(tokenizer, QUESTIONS, padding_side="right")
    packed = torch.cat([rendered(tokenizer, [q])["input_ids"] for q in QUESTIONS], dim=1)
    for ids in (left["input_ids"], right["input_ids"], packed):
        torch.testing.assert_close(soft_prompts(model, ids), alone)
        embedded = model.get_input_embeddings()(ids)
        soft = ids == find_markers(tokenizer, TOKENS).placeholder
        torch.testing.assert_close(embedded[soft].view_as(alone), alone)
        torch.testing.assert_close(embedded[~soft], table[ids[~soft]])  # nothing else is touched


def test_a_static_prompt_ignores_the_question_and_the_features_alone_see_its_length(student: Path) -> None:
    same_length = ["1+2", "9*8"]
    for changes, differs in (({"static": True}, False), ({"cross_attention": False}, False), ({"features": []}, True)):
        model, tokenizer = fresh(student, **changes)
        first, second = soft_prompts(model, rendered(tokenizer, same_length)["input_ids"])
        assert torch.allclose(first, second) != differs
    model, tokenizer = fresh(student, cross_attention=False)
    short, long = soft_prompts(model, rendered(tokenizer, ["1+2", "1+2+3"])["input_ids"])
    assert not torch.allclose(short, long)


def test_another_questions_prompt_changes_the_output_and_is_put_back_afterwards(student: Path) -> None:
    model, tokenizer = fresh(student)
    batch = rendered(tokenizer, QUESTIONS)
    with torch.no_grad():
        own = model(**batch).logits[:, -1]
        with replaced_prompts(model, lambda prompts: prompts.roll(1, 0)):
            swapped = model(**batch).logits[:, -1]
        assert not torch.allclose(own, swapped, atol=1e-3)
        torch.testing.assert_close(model(**batch).logits[:, -1], own)


def test_the_loss_reaches_every_weight_of_the_module(student: Path) -> None:
    model, tokenizer = fresh(student)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    batch = rendered(tokenizer, QUESTIONS)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    for name, weight in model.perception.named_parameters():
        assert weight.grad is not None and weight.grad.abs().sum() > 0, name


def test_generation_with_and_without_the_cache_and_from_embeddings_is_the_same(student: Path) -> None:
    model, tokenizer = fresh(student)
    batch = rendered(tokenizer, QUESTIONS)
    options = {"max_new_tokens": 6, "do_sample": False}
    cached = model.generate(**batch, **options)
    assert torch.equal(cached, model.generate(**batch, **options, use_cache=False))
    for row, ids in zip(cached, batch["input_ids"], strict=True):
        prompt = [int(i) for i in ids if i != tokenizer.pad_token_id]
        embedded = prompt_embeds(model, prompt)
        assert embedded.shape == (len(prompt), model.config.hidden_size)
        written = model.generate(inputs_embeds=embedded[None], **options)[0]
        assert written.tolist() == row[len(ids) : len(ids) + len(written)].tolist()


@pytest.mark.parametrize("trained", ["lora", "modules_to_save", "trainable_tokens", "frozen"])
def test_the_hook_finds_what_peft_puts_in_the_places_of_module_and_embeddings(student: Path, trained: str) -> None:
    from peft import LoraConfig, get_peft_model

    model, tokenizer = fresh(student)
    targets, saved, options = ["q_proj"], ["perception"], {}
    if trained == "lora":
        targets.append("embed_tokens")
    elif trained == "modules_to_save":
        saved.append("embed_tokens")
    elif trained == "trainable_tokens":
        options["trainable_token_indices"] = {"embed_tokens": [tokenizer.convert_tokens_to_ids("<answer>")]}
    wrapped = get_peft_model(model, LoraConfig(target_modules=targets, modules_to_save=saved, **options))
    batch = rendered(tokenizer, QUESTIONS)
    with torch.no_grad():
        before = wrapped(**batch).logits
        wrapped.base_model.model.perception.modules_to_save["default"].prompt += 1.0
        after = wrapped(**batch).logits
        assert not torch.allclose(before, after, atol=1e-3)
        torch.testing.assert_close(wrapped.merge_and_unload()(**batch).logits, after, rtol=1e-4, atol=1e-4)


# --- saved and loaded ---


@pytest.fixture(scope="module")
def saved(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a perception module, in two shards."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    model, tokenizer = fresh(student)
    model.save_pretrained(folder, max_shard_size="1MB")
    tokenizer.save_pretrained(folder)
    return folder


def test_a_saved_checkpoint_gives_the_same_logits(student: Path, saved: Path) -> None:
    model, tokenizer = fresh(student)
    batch = rendered(tokenizer, QUESTIONS)
    again = load(saved)
    assert again.config.model_type == "thinkswitch_qwen3"
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, model(**batch).logits, rtol=0, atol=0)


def test_a_checkpoint_in_half_precision_keeps_the_module_in_float32(student: Path, tmp_path: Path) -> None:
    model, tokenizer = fresh(student)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.dtype == torch.bfloat16
    assert {weight.dtype for weight in again.perception.parameters()} == {torch.float32}
    for name, weight in again.perception.named_parameters():
        assert torch.equal(weight, model.perception.get_parameter(name))
    again(**rendered(tokenizer, QUESTIONS))


LOAD = "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1]{})"


@pytest.mark.slow
def test_without_the_package_a_checkpoint_is_refused_in_one_sentence(
    saved: Path, command: Command, tmp_path: Path
) -> None:
    done = command(BIN / "python", "-c", LOAD.format(""), saved)
    assert done.returncode != 0
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("ValueError: ")]
    assert said.startswith(
        f"ValueError: The repository {saved} contains custom code which must be executed to correctly"
    )
    assert done.stderr.strip().endswith("pass the argument `trust_remote_code=True` to allow custom code to be run.")
    trusted = LOAD.format(", trust_remote_code=True") + ".perception"
    done = command(BIN / "python", "-c", trusted, saved, HF_HOME=str(tmp_path), PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr


def test_a_checkpoint_without_the_modules_weights_is_refused(saved: Path, student: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    write_plain_view(saved, broken)
    (broken / "config.json").write_bytes((saved / "config.json").read_bytes())
    with pytest.raises(ThinkSwitchError, match=r"lacks the weights of its perception module: .*`merge_method: legacy`"):
        load(broken)
    with pytest.raises(ThinkSwitchError, match="has no perception module"):
        load(student)


def test_the_plain_view_is_the_language_model_alone(saved: Path, tmp_path: Path) -> None:
    view = tmp_path / "view"
    write_plain_view(saved, view)
    model, info = AutoModelForCausalLM.from_pretrained(view, output_loading_info=True)
    assert type(model).__name__ == "Qwen3ForCausalLM" and model.config.architectures == ["Qwen3ForCausalLM"]
    assert not info["missing_keys"] and not info["unexpected_keys"]
    whole = load(saved)
    ours = {name: value for name, value in whole.state_dict().items() if not name.startswith("perception.")}
    assert all(torch.equal(ours[name], value) for name, value in model.state_dict().items())
    assert not list(view.glob("*.py")) and "perception" not in (view / "config.json").read_text()
    with pytest.raises(ThinkSwitchError, match="has no perception module"):
        write_plain_view(view, tmp_path / "twice")


def test_our_commands_refuse_what_they_would_leave_out(saved: Path, student: Path, tmp_path: Path) -> None:
    from thinkswitch_plugin.merging.compatibility import require_compatible

    with pytest.raises(ThinkSwitchError, match="has a perception module, which this command would leave out"):
        checkpoint.resolve(str(saved), None, "evaluated")
    with pytest.raises(ThinkSwitchError, match="would leave out"):
        require_compatible(saved, saved)
    with pytest.raises(
        ThinkSwitchError, match=r"in its chat template but no perception module; .*`merge_method: legacy`"
    ):
        checkpoint.resolve(str(student), None, "evaluated")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", ["eval-model --domain arithmetic --model", "serve --domain arithmetic --model", "merge"]
)
def test_real_commands_refuse_it_in_one_sentence(words: str, saved: Path, tmp_path: Path, forked: Command) -> None:
    last: list[str | Path] = [saved]
    if words == "merge":
        config = {"merge_method": "linear", "dtype": "float32"}
        config["models"] = [{"model": str(saved), "parameters": {"weight": 0.5}}] * 2  # type: ignore[assignment]
        files.write_yaml(tmp_path / "merge.yaml", config)
        last = [tmp_path / "merge.yaml", tmp_path / "out"]
    done = forked(BIN / "thinkswitch", *words.split(), *last)
    assert done.returncode == 1 and "has a perception module, which this command would leave out" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_lm_eval_runs_it_as_an_object(saved: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = load(saved), AutoTokenizer.from_pretrained(saved, padding_side="left")
    judge = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3)
    texts = [judge.apply_chat_template([{"role": "user", "content": q}]) for q in QUESTIONS]
    asked = [
        Instance("generate_until", {}, (text, {"until": ["<|im_end|>"], "max_gen_toks": 6}), i)
        for i, text in enumerate(texts)
    ]
    found = judge.generate_until(asked, disable_tqdm=True)
    ids = model.generate(**rendered(tokenizer, QUESTIONS), max_new_tokens=6, do_sample=False)[:, -6:]
    expected = [tokenizer.decode(row, skip_special_tokens=False).partition("<|im_end|>")[0] for row in ids]
    assert found == expected


# --- through real axolotl ---


@pytest.fixture(scope="module")
def recipe(student: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A plain axolotl recipe: NF4 QLoRA on a mixture of both formats, packed, with gradient checkpointing."""
    folder, rng = tmp_path_factory.mktemp("axolotl"), random.Random(0)
    for form in ("pre", "post"):
        with files.atomic_file(folder / f"{form}.jsonl") as handle:
            for number, question in enumerate(task.draw(rng, 3) for _ in range(96)):
                turns = [{"role": "user", "content": question}, {"role": "assistant", "content": task.answer(question)}]
                row = {"messages": turns, "trace": "\n".join(task.steps(question)), "custom_id": f"{form}{number}-s0"}
                handle.write(files.dumps_line({**row, "prompt_id": f"{form}{number}"}))
    plain = files.read_yaml(ROOT / "recipes" / "arithmetic.yaml")
    return {
        **plain,
        "base_model": str(student),
        "datasets": [
            {"path": str(folder / f"{form}.jsonl"), "ds_type": "json", "type": f"thinkswitch_plugin.{form}_thinking"}
            for form in ("pre", "post")
        ],
        "output_dir": str(folder / "adapter"),
        "dataset_prepared_path": str(folder / "prepared"),
        "sample_packing": True,
        "gradient_checkpointing": True,
        "micro_batch_size": 4,
        "num_epochs": 2,
        "lora_modules_to_save": ["perception"],
        "lr_groups": [{"name": "perception", "modules": ["perception"], "lr": 0.003}],
        "logging_steps": 1,
        "seed": 0,
        "thinkswitch": {"perception": {"tokens": TOKENS}},
    }


def write(recipe: dict[str, Any], folder: Path, **changes: Any) -> Path:
    path = folder / "recipe.yaml"
    files.write_yaml(path, {key: value for key, value in {**recipe, **changes}.items() if value is not None})
    return path


@pytest.fixture(scope="module")
def trained(recipe: dict[str, Any], forked: Command) -> Path:
    """The adapter that `axolotl train` leaves."""
    path = write(recipe, Path(recipe["output_dir"]).parent)
    done = forked(BIN / "axolotl", "train", path, "--launcher", "python")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return Path(recipe["output_dir"])


@pytest.fixture(scope="module")
def merged(recipe: dict[str, Any], trained: Path, forked: Command) -> Path:
    """What `axolotl merge-lora` makes of it."""
    done = forked(BIN / "axolotl", "merge-lora", trained.parent / "recipe.yaml")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return trained / "merged"


@pytest.mark.slow
def test_axolotl_trains_the_module_and_saves_it_with_the_adapter(student: Path, trained: Path) -> None:
    held = load_file(str(trained / "adapter_model.safetensors"))
    ours = {name.partition("perception.")[2]: value for name, value in held.items() if "perception." in name}
    module = Perception(PairSettings().hidden, keys())
    assert {name: value.shape for name, value in ours.items()} == {
        name: value.shape for name, value in module.state_dict().items()
    }
    assert {value.dtype for value in ours.values()} == {torch.float32}
    assert not any(".lora_" in name for name in ours)  # `lora_target_linear` leaves it alone
    assert ours["inner_bias"].abs().max() > 1e-3  # it started at zero


@pytest.mark.slow
def test_the_legacy_merge_keeps_the_module_and_the_logits(student: Path, trained: Path, merged: Path) -> None:
    from peft import PeftModel

    model, tokenizer = fresh(student)
    adapted = PeftModel.from_pretrained(model, str(trained)).eval()
    batch = rendered(tokenizer, QUESTIONS)
    with torch.no_grad():
        expected = adapted(**batch).logits
        torch.testing.assert_close(load(merged)(**batch).logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(load(student, trained)(**batch).logits, expected, rtol=1e-4, atol=1e-4)
        with replaced_prompts(adapted, torch.zeros_like):
            assert not torch.allclose(adapted(**batch).logits, expected, atol=1e-2)


@pytest.mark.slow
def test_axolotls_default_merge_is_refused_before_and_its_checkpoint_after(
    recipe: dict[str, Any], trained: Path, forked: Command, tmp_path: Path
) -> None:
    path = write(recipe, tmp_path, merge_method=None)
    done = forked(BIN / "axolotl", "merge-lora", path)
    assert done.returncode != 0 and "`thinkswitch.perception` needs `merge_method: legacy`" in done.stderr
    # Without our plugin nobody stops it.
    path = write(recipe, tmp_path, merge_method=None, plugins=None, thinkswitch=None, lora_model_dir=str(trained))
    done = forked(BIN / "axolotl", "merge-lora", path, "--output-dir", tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for refused in (load, lambda folder: checkpoint.resolve(str(folder), None, "evaluated")):
        with pytest.raises(ThinkSwitchError, match=r"no perception module.*`merge_method: legacy`"):
            refused(tmp_path / "merged")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_modules_to_save": None}, "needs `lora_modules_to_save: [perception]`"),
        ({"merge_method": "memory_efficient"}, "needs `merge_method: legacy`"),
        ({"thinkswitch": {"perception": {"tokens": 7}}}, f"puts {TOKENS} <|soft|> before a question"),
    ],
)
def test_a_recipe_that_would_lose_the_module_is_refused(
    recipe: dict[str, Any], changes: dict[str, Any], message: str, forked: Command, tmp_path: Path
) -> None:
    path = write(recipe, tmp_path, **changes, output_dir=str(tmp_path / "out"))
    done = forked(BIN / "axolotl", "train", path, "--launcher", "python")
    assert done.returncode != 0 and message in done.stderr, done.stderr[-3000:]
