"""What makes a folder of weights a complete Hugging Face checkpoint of one mode."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from thinkswitch_plugin import files
from thinkswitch_plugin.errors import ThinkSwitchError, not_fetched

# What differs between an instruct and a thinking checkpoint beside the weights.
MODE_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "*processor_config.json",  # of a vision-language model
)

ADAPTER_WEIGHTS = "adapter_model.safetensors"  # of a PEFT adapter
PLACEHOLDER = "<|soft|>"  # the token whose embeddings a perception module replaces
MODULE = "perception"  # that module's name in the model, and so the prefix of its tensors; its settings in the config
MODEL_TYPE = "thinkswitch_"  # in front of the architecture of a checkpoint that has one


@dataclass(frozen=True)
class Subject:
    """A checkpoint in one mode, as it is evaluated.

    Args:
        name: folder or hub id.
        arguments: of its chat template, which put a hybrid into a mode.
        lora: a PEFT adapter put on it; its tokenizer and chat template count then.
        guards: tasks that it is asked besides that of the domain; their answers go to the same files.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    lora: Path | None = None
    guards: Sequence[str] = ()


def perception_of(folder: Path) -> dict[str, Any] | None:
    """The settings of a checkpoint's (or an adapter's) perception module, None where it has none."""
    config = folder / "config.json"
    values = files.read_json(config) if config.is_file() else {}
    return values.get(MODULE) if isinstance(values, dict) else None


def require_plain(folder: Path) -> None:
    """Raise `ThinkSwitchError` if a checkpoint needs a perception module, which most commands would leave out."""
    if perception_of(folder) is not None:
        raise ThinkSwitchError(
            f"{folder} has a perception module, which this command would leave out; load it by "
            "`thinkswitch_plugin.perception.model.load`, as docs/adaptive.md shows."
        )
    if PLACEHOLDER in _chat_template(folder):
        raise ThinkSwitchError(
            f"{folder} has {PLACEHOLDER} in its chat template but no perception module; if its adapter was merged by "
            "axolotl's default, which leaves the module out, merge it again with `merge_method: legacy`."
        )


def _chat_template(folder: Path) -> str:
    """The text of a checkpoint's chat template, in either place; empty where it has none."""
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if file.is_file():
        return file.read_text(encoding="utf-8", errors="replace")
    values = files.read_json(config) if config.is_file() else {}
    return str(values.get("chat_template") or "") if isinstance(values, dict) else ""


def adopt_mode(source: Path, target: Path) -> None:
    """Give `target` the tokenizer, chat template and generation config of `source`, and no others."""
    for pattern in MODE_FILES:
        for old in target.glob(pattern):
            files.remove(old)
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copy2(file, target / file.name)


FETCHED = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "README.md")  # the card names the licence


def folder_name(name: str) -> str:
    """A checkpoint's whole path or hub id as the name of one folder, its parts joined by hyphens."""
    from thinkswitch_plugin.args import is_local

    if not is_local(name):
        return name.replace("/", "-")
    place = Path(name).resolve()
    return "-".join((place.relative_to(Path.cwd()) if place.is_relative_to(Path.cwd()) else place).parts).strip("/-")


def require_weights(folder: Path) -> None:
    """Raise `ThinkSwitchError` if a checkpoint of a run is there but for its weights, which `KEEP=` prunes."""
    if (folder / "config.json").is_file() and not any(folder.glob("*.safetensors")):
        stage = "merge-lora" if folder.name == "instruct" else "rebuild"
        raise ThinkSwitchError(
            f"{folder} has no weights; if KEEP= has pruned them, delete {folder.parent / '.stamps' / stage}.json "
            "and run `make iterate KEEP=all` to have them made again."
        )


def resolve(name: str, revision: str | None, what: str) -> tuple[Path, str | None]:
    """The folder of a checkpoint, fetched from the hub if it is a hub id; and its commit.

    Raises `ThinkSwitchError` if there is no such folder, the hub cannot give it, or it has a perception module.
    """
    from thinkswitch_plugin.args import is_local

    if is_local(name):
        folder, commit = Path(name).expanduser(), None
        if not (folder / "config.json").is_file():
            raise ThinkSwitchError(
                f"The {what} checkpoint {name} is not a checkpoint folder: it has no config.json; name a folder that has one, or a hub id."
            )
        if not any(folder.glob("*.safetensors")):
            raise ThinkSwitchError(
                f"The {what} checkpoint {name} holds no *.safetensors; pickled weights can run code and are not read: "
                "convert them with transformers' `save_pretrained`."
            )
    else:
        folder = _fetch(name, revision, what)
        commit = folder.name
    require_plain(folder)
    return folder, commit


def _fetch(name: str, revision: str | None, what: str) -> Path:
    """The folder of a hub checkpoint, named after its commit; nothing is fetched that does not fit on the disk."""
    import httpx
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HfHubHTTPError

    failures = (HfHubHTTPError, httpx.HTTPError, OSError, ValueError, RuntimeError)
    with suppress(*failures):  # the fetch itself says what is wrong, or all of it is there
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
        needed = sum(
            file.size or 0
            for file in info.siblings or []
            if any(fnmatch(file.rfilename, pattern) for pattern in FETCHED)
            and not isinstance(try_to_load_from_cache(name, file.rfilename, revision=info.sha), str)
        )
        files.require_space(Path(HF_HUB_CACHE), needed, f"Fetching the {what} checkpoint {name}")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(FETCHED)))
    except failures as error:
        raise not_fetched(f"The {what} checkpoint {name} is not a folder, and", error) from None
