"""What makes a folder of weights a complete Hugging Face checkpoint of one mode."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from thinkswitch_plugin import files
from thinkswitch_plugin.errors import ThinkSwitchError

# What differs between an instruct and a thinking checkpoint beside the weights.
MODE_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
)


def adopt_mode(source: Path, target: Path) -> None:
    """Give `target` the tokenizer, chat template and generation config of `source`, and no others."""
    for pattern in MODE_FILES:
        for old in target.glob(pattern):
            files.remove(old)
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copy2(file, target / file.name)


FETCHED = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model")


def require_room(name: str, revision: str | None, what: str) -> None:
    """Raise `ThinkSwitchError` if what is still to be fetched of a hub checkpoint does not fit on the disk."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HfHubHTTPError

    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
    except (HfHubHTTPError, OSError, ValueError):
        return  # the fetch itself says what is wrong, or all of it is there
    needed = sum(
        file.size or 0
        for file in info.siblings or []
        if any(fnmatch(file.rfilename, pattern) for pattern in FETCHED)
        and not isinstance(try_to_load_from_cache(name, file.rfilename, revision=info.sha), str)
    )
    files.require_space(Path(HF_HUB_CACHE), needed, f"Fetching the {what} checkpoint {name}")


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

    Raises `ThinkSwitchError` if there is no such folder or the hub cannot give it.
    """
    from thinkswitch_plugin.args import is_local

    if is_local(name):
        folder = Path(name).expanduser()
        if not (folder / "config.json").is_file():
            raise ThinkSwitchError(f"The {what} checkpoint {name} is no checkpoint folder: it has no config.json.")
        if not any(folder.glob("*.safetensors")):
            raise ThinkSwitchError(
                f"The {what} checkpoint {name} holds no *.safetensors; pickled weights can run code and are not read: "
                "convert them with transformers' `save_pretrained`."
            )
        return folder, None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    require_room(name, revision, what)
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(FETCHED)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ThinkSwitchError(f"The {what} checkpoint {name} cannot be fetched from the hub: {reason}") from None
    return folder, folder.name


def write_card(
    folder: Path,
    *,
    title: str,
    base_models: list[str],
    facts: dict[str, Any],
    merge_yaml: str | None = None,
    library: str = "transformers",
) -> None:
    """The model card: parents, recipe and how to repeat it, in the form the hub renders."""
    import yaml

    head = yaml.safe_dump(
        {
            "base_model": base_models,
            "library_name": library,
            "tags": ["thinkswitch"] + (["mergekit", "merge"] if merge_yaml else []),
        },
        sort_keys=False,
    )
    rows = "".join(f"| {key} | {value} |\n" for key, value in facts.items())
    text = f"---\n{head}---\n# {title}\n\nMade by ThinkSwitch (arXiv 2606.01080).\n\n| | |\n|---|---|\n{rows}"
    if merge_yaml:
        text += f"\n```yaml\n{merge_yaml.strip()}\n```\n"
    (folder / "README.md").write_text(text, encoding="utf-8")
