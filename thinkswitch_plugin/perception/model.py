"""A language model with a perception module: attached, trained in an adapter, saved, loaded.

The chat template puts placeholder tokens at the start of the last user turn, and a forward
hook on the input embeddings overwrites theirs with the soft prompt of the question that
follows. Everything is read from the token ids, so labels, masks, positions, KV cache, padding
and packing stay as they are, and decoding steps, which hold no placeholder, are left alone.

Importing this module makes transformers' Auto classes know the checkpoints. Without it they
refuse them: a checkpoint names its own model type, and code (`modeling_thinkswitch.py`) that
imports this module where the caller trusts it to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from thinkswitch_plugin import files
from thinkswitch_plugin.args import PerceptionKeys
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.perception import features
from thinkswitch_plugin.perception.module import Perception
from thinkswitch_plugin.run.checkpoint import MODEL_TYPE, MODULE, PLACEHOLDER, perception_of, require_weights

ARCHITECTURES = ("llama", "qwen2", "qwen3")
CODE_FILE = "modeling_thinkswitch.py"
DROPPED = "axolotl's default merge leaves it out, so merge the adapter again with `merge_method: legacy`"

Prompts = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Markers:
    """The ids that bound a question: the placeholder's, and that of the token that ends a turn."""

    placeholder: int
    end: int


def find_markers(tokenizer: Any, tokens: int) -> Markers:
    """The markers of a tokenizer whose chat template renders `tokens` placeholders before a question.

    Raises `ThinkSwitchError` where there is no placeholder token, the chat template renders
    another number of them, or ends a user turn by no token of its own.
    """
    placeholder = tokenizer.get_added_vocab().get(PLACEHOLDER)
    if placeholder is None:
        raise ThinkSwitchError(
            f"The tokenizer has no token {PLACEHOLDER} for the soft prompt; train a student that "
            f"`thinkswitch_plugin.perception.student.make_student` made with `soft_tokens={tokens}`."
        )
    question = "1"
    rendered: str = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False)
    found = rendered.count(PLACEHOLDER)
    before, _, tail = rendered.partition(PLACEHOLDER * tokens + question)
    if found != tokens or PLACEHOLDER in before:
        raise ThinkSwitchError(
            f"The chat template puts {found} {PLACEHOLDER} before a question where `thinkswitch.perception.tokens` is "
            f"{tokens}; make them equal."
        )
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
    if not ids or ids[0] not in {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids}:
        raise ThinkSwitchError(
            "The chat template ends a user turn by ordinary text, so that a question's end cannot be seen; use one that "
            "ends turns by a special token, as chatml does."
        )
    return Markers(placeholder, ids[0])


def find_spans(ids: Tensor, markers: Markers, tokens: int) -> Tensor:
    """Where the questions of a batch are, packed rows included.

    Args:
        ids: (rows, length), padded on either side.
        markers: the ids that bound a question.
        tokens: placeholders a question.

    Returns:
        (questions, 3): row, first placeholder, and the token that ends the turn. The question
        lies between the last placeholder and that token.

    Raises:
        ThinkSwitchError: a group of placeholders has another length, or its turn does not end.
    """
    soft = ids == markers.placeholder
    first = soft.clone()
    first[:, 1:] &= ~soft[:, :-1]
    row, start = first.nonzero(as_tuple=True)
    last = start + tokens - 1
    length = ids.shape[1]
    group = start[:, None] + torch.arange(tokens, device=ids.device)
    whole = bool((last < length).all()) and bool(soft[row[:, None], group.clamp(max=length - 1)].all())
    if not whole or int(soft.sum()) != len(row) * tokens:
        raise ThinkSwitchError(
            f"A text holds {PLACEHOLDER} in groups that are not of {tokens}; render it by the checkpoint's own chat "
            "template, and keep the token out of questions."
        )
    places = torch.arange(length, device=ids.device).expand_as(ids)
    # For every place the nearest end of a turn from there on.
    ends = torch.where(ids == markers.end, places, length).flip(1).cummin(1).values.flip(1)
    end = ends[row, last]
    if bool((end == length).any()):
        raise ThinkSwitchError(
            f"A question after {PLACEHOLDER} has no end of turn, so that it was cut; give it whole, in one piece."
        )
    return torch.stack((row, start, end), dim=1)


class SoftPrompt:
    """The forward hook: it overwrites the embeddings of placeholders with the prompt of their question."""

    def __init__(self, model: PreTrainedModel, keys: PerceptionKeys, markers: Markers, tokenizer: Any = None) -> None:
        self.model, self.keys, self.markers, self.tokenizer = model, keys, markers, tokenizer
        self.replace: Prompts | None = None
        self._hooked: WeakSet[nn.Module] = WeakSet()
        self._features = lru_cache(maxsize=2**16)(self._read_features)

    def put(self, *_: Any) -> None:
        """Hook the input embeddings as they are now.

        Where they are trained, peft puts a layer in their place that may not call them at all. Both may be hooked:
        the second time gives the same prompts, which depend on the question alone.
        """
        embeddings: Any = self.model.get_input_embeddings()
        if embeddings not in self._hooked:
            embeddings.register_forward_hook(self)
            self._hooked.add(embeddings)

    def __deepcopy__(self, memo: dict[int, Any]) -> SoftPrompt:
        """With its model, or not at all: peft copies the embeddings, and the hook on them, where they are trained."""
        model = memo.get(id(self.model))
        return self if model is None else SoftPrompt(model, self.keys, self.markers, self.tokenizer)

    def __call__(self, _module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """`output`, (rows, length, hidden), with soft prompts; `arguments` holds the ids, (rows, length)."""
        ids = arguments[0]
        if ids.shape[-1] <= self.keys.tokens or not bool((ids == self.markers.placeholder).any()):
            return output
        rows, embeddings = ids.reshape(-1, ids.shape[-1]), output.reshape(-1, *output.shape[-2:])
        spans = find_spans(rows, self.markers, self.keys.tokens)
        prompts = self.prompts(rows, embeddings, spans)
        if self.replace is not None:
            prompts = self.replace(prompts)
        places = spans[:, 1:2] + torch.arange(self.keys.tokens, device=ids.device)
        # Out of place: the output may be a leaf that gradient checkpointing made differentiable.
        return embeddings.index_put((spans[:, :1], places), prompts.to(output)).view_as(output)

    def prompts(self, ids: Tensor, embeddings: Tensor, spans: Tensor) -> Tensor:
        """The soft prompts of the questions at `spans`, (questions, tokens, hidden)."""
        row, start, end = spans.unbind(1)
        begin = start + self.keys.tokens
        # The end of turn is read too, so that an empty question is not an empty sequence.
        places = begin[:, None] + torch.arange(int((end - begin).max()) + 1, device=ids.device)
        mask = places <= end[:, None]
        questions = embeddings[row[:, None], places.clamp(max=ids.shape[1] - 1)]
        values: list[list[float]] = [[] for _ in range(len(spans))]
        if self.keys.features and not self.keys.static:
            held, tokens = ids.tolist(), self.keys.tokens
            values = [self._features(tuple(held[r][s + tokens : e])) for r, s, e in spans.tolist()]
        # At call time: peft puts a wrapper with the trained copy in the module's place.
        module = getattr(self.model, MODULE)
        prompts: Tensor = module(questions, mask, torch.tensor(values, device=embeddings.device))
        return prompts

    def _read_features(self, question: tuple[int, ...]) -> list[float]:
        if self.tokenizer is None:
            self.tokenizer = AutoTokenizer.from_pretrained(self.model.config._name_or_path)
        return features.read(self.tokenizer.decode(question), self.keys.features)


class PerceptionModel(PreTrainedModel):  # type: ignore[misc]
    """What a causal language model gains by a perception module; the classes below join it with theirs."""

    _keep_in_fp32_modules_strict = [MODULE]  # noqa: RUF012 - transformers reads a list

    def __init__(self, config: Any, *arguments: Any, **options: Any) -> None:
        if config.perception is None:
            raise ThinkSwitchError(f"A config of type {config.model_type} needs `perception`; `attach` writes it.")
        super().__init__(config, *arguments, **options)
        keys, markers = _settings(config.perception)
        setattr(self, MODULE, Perception(config.hidden_size, keys))
        _put_hook(self, keys, markers, None)
        self.post_init()

    @classmethod
    def from_pretrained(cls, name: Any, *arguments: Any, **options: Any) -> Any:
        """As transformers', but a checkpoint that lacks the module's weights is refused."""
        wants_info = options.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(name, *arguments, output_loading_info=True, **options)
        model, info = loaded
        if any(str(key).startswith(f"{MODULE}.") for key in info["missing_keys"]):
            raise ThinkSwitchError(f"{name} lacks the weights of its perception module: {DROPPED}.")
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: Any, *arguments: Any, **options: Any) -> None:
        """As transformers', with the file that says what code the checkpoint needs."""
        super().save_pretrained(save_directory, *arguments, **options)
        names = ", ".join(sorted((type(self).__name__, type(self.config).__name__)))
        with files.atomic_file(Path(save_directory) / CODE_FILE) as handle:
            handle.write(
                '"""This checkpoint has a perception module; the package thinkswitch loads it."""\n\n'
                f"from {__name__} import {names}\n".encode()
            )


def _join(architecture: str) -> tuple[type[Any], type[PerceptionModel]]:
    """The config and model classes of one architecture, made known to the Auto classes."""
    config_base: type[Any] = CONFIG_MAPPING[architecture]
    model_base: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config_base]
    prefix, stem = "ThinkSwitch", model_base.__name__.removesuffix("ForCausalLM")
    names = f"{prefix}{stem}Config", f"{prefix}{stem}ForCausalLM"
    code = Path(CODE_FILE).stem
    config_class: type[Any] = type(
        names[0],
        (config_base,),
        {
            "__module__": __name__,
            "__doc__": f"{config_base.__name__} with `perception`: the module's keys and markers.",
            "model_type": MODEL_TYPE + architecture,
            "perception": None,
            "auto_map": {"AutoConfig": f"{code}.{names[0]}", "AutoModelForCausalLM": f"{code}.{names[1]}"},
        },
    )
    model_class = type(
        names[1],
        (PerceptionModel, model_base),
        {
            "__module__": __name__,
            "__doc__": f"{model_base.__name__} with a perception module.",
            "config_class": config_class,
        },
    )
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    return config_class, model_class


_CLASSES = {architecture: _join(architecture) for architecture in ARCHITECTURES}
globals().update({made.__name__: made for pair in _CLASSES.values() for made in pair})


def attach(model: Any, keys: PerceptionKeys, tokenizer: Any) -> None:
    """Give a loaded model a new perception module, in place; it is then saved as a checkpoint of its own kind.

    A model that has one keeps it. Raises `ThinkSwitchError` for an architecture that is not
    known, a tokenizer that does not fit `keys`, or a model whose module has other keys.
    """
    markers = find_markers(tokenizer, keys.tokens)
    if isinstance(model, PerceptionModel):
        if _settings(model.config.perception) != (keys, markers):
            raise ThinkSwitchError(
                f"{model.config._name_or_path} has a perception module with other keys than "
                "`thinkswitch.perception`; give the same, or start from a checkpoint without one."
            )
        hook: Any = model.soft_prompt
        hook.tokenizer = tokenizer
        return
    architecture = model.config.model_type
    if architecture not in _CLASSES:
        raise ThinkSwitchError(
            f"A perception module fits {', '.join(ARCHITECTURES)} so far, not {architecture}; see "
            "thinkswitch_plugin/perception/model.py."
        )
    table = model.get_input_embeddings().weight
    module = Perception(table.shape[1], keys, scale=float(table.detach().float().std()))
    config_class, model_class = _CLASSES[architecture]
    # The config is shared by every part of the model: it changes its class and stays the same object.
    model.config.__class__ = config_class
    model.config.model_type = config_class.model_type
    model.config.perception = {**keys.model_dump(), "placeholder_id": markers.placeholder, "end_id": markers.end}
    model.config.auto_map = config_class.auto_map
    model.__class__ = model_class
    setattr(model, MODULE, module.to(table.device))
    _put_hook(model, keys, markers, tokenizer)


def _put_hook(model: Any, keys: PerceptionKeys, markers: Markers, tokenizer: Any) -> None:
    model.soft_prompt = SoftPrompt(model, keys, markers, tokenizer)
    model.soft_prompt.put()
    model.base_model.register_forward_pre_hook(model.soft_prompt.put)


def _settings(values: dict[str, Any]) -> tuple[PerceptionKeys, Markers]:
    keys = {name: value for name, value in values.items() if name in PerceptionKeys.model_fields}
    return PerceptionKeys.model_validate(keys), Markers(values["placeholder_id"], values["end_id"])


def load(folder: str | Path, adapter: str | Path | None = None) -> PreTrainedModel:
    """A model with its perception module, ready to generate.

    Args:
        folder: a merged checkpoint, or the base that `adapter` was trained on.
        adapter: what `axolotl train` left in `output_dir`; it is merged in memory.

    Raises:
        ThinkSwitchError: there is no module in the checkpoint or the adapter, or its weights are missing.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ThinkSwitchError(f"{folder} is no checkpoint folder: it has no config.json; name one that has.")
    require_weights(folder)
    if adapter is None and perception_of(folder) is None:
        raise ThinkSwitchError(f"{folder} has no perception module: {DROPPED}.")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True)
    if adapter is not None:
        model = _with_adapter(model, folder, Path(adapter))
    ready: PreTrainedModel = model.eval()
    return ready


def _with_adapter(model: Any, base: Path, adapter: Path) -> PreTrainedModel:
    from peft import PeftModel

    # axolotl writes the config once, the trainer's checkpoints beneath it have none.
    settings = perception_of(adapter) or perception_of(adapter.parent)
    saved = files.read_json(adapter / "adapter_config.json").get("modules_to_save") or []
    if settings is None or MODULE not in saved:
        raise ThinkSwitchError(
            f"The adapter {adapter} has no perception module; train it with `thinkswitch.perception` and "
            f"`lora_modules_to_save: [{MODULE}]`."
        )
    held = adapter if (adapter / "tokenizer_config.json").is_file() else base
    attach(model, _settings(settings)[0], AutoTokenizer.from_pretrained(held))
    merged: PreTrainedModel = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return merged


@contextmanager
def replaced_prompts(model: Any, replace: Prompts) -> Iterator[None]:
    """Put other soft prompts in the places of a model's own while the block runs.

    Args:
        model: one that has a perception module, under peft or not.
        replace: from the prompts of a batch, (questions, tokens, hidden) in the order of its
            rows, to others of that shape, such as `prompts_of_others`.
    """
    hook: SoftPrompt = model.soft_prompt
    before, hook.replace = hook.replace, replace
    try:
        yield
    finally:
        hook.replace = before


@torch.no_grad()
def soft_prompts(model: Any, ids: Tensor) -> Tensor:
    """The soft prompts of rendered prompts `ids`, (rows, length): (questions, tokens, hidden)."""
    found: list[Tensor] = []

    def keep(prompts: Tensor) -> Tensor:
        found.append(prompts)
        return prompts

    model.soft_prompt.put()
    with replaced_prompts(model, keep):
        model.get_input_embeddings()(ids)
    if not found:
        raise ThinkSwitchError(f"No text holds {PLACEHOLDER}; render it by the checkpoint's own chat template.")
    return found[0]


def prompts_of_others(pool: Tensor, seed: int) -> Prompts:
    """For `replaced_prompts`: every question gets the soft prompt of another one, drawn at random.

    Whatever lies in the same batch does not matter: batches are sorted by length and text, and a neighbour's prompt
    would be that of the most similar question.

    Args:
        pool: the soft prompts of all questions, (questions, tokens, hidden), as `soft_prompts` gives them.
    """
    if len(pool) < 2:
        raise ThinkSwitchError("Soft prompts can be swapped among two questions or more; raise `evaluation.limit`.")
    generator = torch.Generator().manual_seed(seed)

    def replace(prompts: Tensor) -> Tensor:
        own = torch.cdist(prompts.flatten(1).float(), pool.flatten(1).float()).argmin(1)
        steps = torch.randint(1, len(pool), (len(prompts),), generator=generator)
        return pool[(own + steps.to(own.device)) % len(pool)]

    return replace


@torch.no_grad()
def prompt_embeds(model: Any, ids: list[int]) -> Tensor:
    """The input embeddings of one rendered prompt, soft prompt included, (length, hidden): what vLLM is sent."""
    model.soft_prompt.put()
    embeddings: Tensor = model.get_input_embeddings()(torch.tensor([ids], device=model.device))
    return embeddings[0]
