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

from functools import lru_cache
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from thinkswitch_plugin import files
from thinkswitch_plugin.args import PerceptionKeys
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.perception import features
from thinkswitch_plugin.perception.markers import Markers, find_markers, find_spans
from thinkswitch_plugin.perception.module import Perception
from thinkswitch_plugin.perception.private import KeepsModuleInFloat32, change_class
from thinkswitch_plugin.run.checkpoint import MODEL_TYPE, MODULE, perception_of, require_weights

ARCHITECTURES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}  # model type: prefix of its classes
CODE_FILE = "modeling_thinkswitch.py"
DROPPED = "axolotl's default merge leaves it out, so merge the adapter again with `merge_method: legacy`"


class SoftPrompt:
    """The forward hook: it overwrites the embeddings of placeholders with the prompt of their question."""

    def __init__(self, model: PreTrainedModel, keys: PerceptionKeys, markers: Markers, tokenizer: Any = None) -> None:
        self.model, self.keys, self.markers, self.tokenizer = model, keys, markers, tokenizer
        self._hooked: WeakSet[nn.Module] = WeakSet()
        self._features = lru_cache(maxsize=2**16)(self._read_features)

    def put(self, *_: Any) -> None:
        """Hook the input embeddings as they are now.

        If they are trained, peft replaces them by a layer that may not call them at all. Both may be hooked:
        the second time gives the same prompts, which depend on the question alone.
        """
        embeddings: Any = self.model.get_input_embeddings()
        if embeddings not in self._hooked:
            embeddings.register_forward_hook(self)
            self._hooked.add(embeddings)

    def __deepcopy__(self, memo: dict[int, Any]) -> SoftPrompt:
        """With its model, or not at all: peft copies the embeddings, and the hook on them, if they are trained."""
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
        # At call time: peft replaces the module by a wrapper with the trained copy.
        module = getattr(self.model, MODULE)
        prompts: Tensor = module(questions, mask, torch.tensor(values, device=embeddings.device))
        return prompts

    def _read_features(self, question: tuple[int, ...]) -> list[float]:
        if self.tokenizer is None:
            self.tokenizer = AutoTokenizer.from_pretrained(self.model.config.name_or_path)
        return features.read(self.tokenizer.decode(question), self.keys.features)


class PerceptionModel(KeepsModuleInFloat32, PreTrainedModel):  # type: ignore[misc]
    """What a causal language model gains by a perception module; the classes below join it with theirs."""

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
        """As transformers', with the file that names the code that the checkpoint needs."""
        super().save_pretrained(save_directory, *arguments, **options)
        names = ", ".join(sorted((type(self).__name__, type(self.config).__name__)))
        with files.atomic_file(Path(save_directory) / CODE_FILE) as handle:
            handle.write(
                '"""This checkpoint has a perception module; the package thinkswitch loads it."""\n\n'
                f"from {__name__} import {names}\n".encode()
            )


def _join(architecture: str, stem: str) -> tuple[type[Any], type[PerceptionModel]]:
    """The config and model classes of one architecture, made known to the Auto classes."""
    bases = [getattr(transformers, stem + kind) for kind in ("Config", "ForCausalLM")]
    names = [f"ThinkSwitch{base.__name__}" for base in bases]
    code = Path(CODE_FILE).stem
    config_values = {
        "__module__": __name__,
        "__doc__": f"{bases[0].__name__} with `perception`: the module's keys and markers.",
        "model_type": MODEL_TYPE + architecture,
        "perception": None,
        "auto_map": {"AutoConfig": f"{code}.{names[0]}", "AutoModelForCausalLM": f"{code}.{names[1]}"},
    }
    config_class: type[Any] = type(names[0], (bases[0],), config_values)
    model_values = {
        "__module__": __name__,
        "__doc__": f"{bases[1].__name__} with a perception module.",
        "config_class": config_class,
    }
    model_class = type(names[1], (PerceptionModel, bases[1]), model_values)
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    return config_class, model_class


_CLASSES = {architecture: _join(architecture, stem) for architecture, stem in ARCHITECTURES.items()}
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
                f"{model.config.name_or_path} has a perception module with other keys than "
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
    change_class(model, model_class, config_class)
    model.config.perception = {**keys.model_dump(), "placeholder_id": markers.placeholder, "end_id": markers.end}
    model.config.auto_map = config_class.auto_map
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
        raise ThinkSwitchError(f"{folder} is not a checkpoint folder: it has no config.json; name one that has.")
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


@torch.no_grad()
def prompt_embeds(model: Any, ids: list[int]) -> Tensor:
    """The input embeddings of one rendered prompt, soft prompt included, (length, hidden): what vLLM is sent."""
    model.soft_prompt.put()
    embeddings: Tensor = model.get_input_embeddings()(torch.tensor([ids], device=model.device))
    return embeddings[0]
