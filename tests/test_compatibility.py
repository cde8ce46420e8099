from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import write
from thinkswitch_plugin import files
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.merging.compatibility import Allowances, list_tensors, require_compatible

W = {"w": torch.zeros(2, 2)}


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({"w": torch.zeros(2, 3)}, {}, r"w has shape \[2, 2\] and \[2, 3\]"),
        ({"w": torch.zeros(2, 2), "x": torch.zeros(1)}, {}, "only .*b holds the tensor x"),
        ({"w": torch.zeros(2, 2).half()}, {}, "w is stored as F32 and F16"),
        (W, {"vocab_size": 9}, "`vocab_size` is 96 and 9"),
        (W, {"tie_word_embeddings": False}, "`tie_word_embeddings` is True and False"),
    ],
)
def test_a_pair_that_does_not_match_is_named(
    tmp_path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], message: str
) -> None:
    a, b = write(tmp_path / "a", W), write(tmp_path / "b", tensors, **config)
    with pytest.raises(ThinkSwitchError, match=message):
        require_compatible(a, b)


def test_what_a_config_copes_with_is_allowed(tmp_path: Path) -> None:
    a = write(tmp_path / "a", {"embed": torch.zeros(8, 2), **W}, vocab_size=8)
    b = write(tmp_path / "b", {"embed": torch.zeros(9, 2).half(), "w": W["w"].half(), "x": W["w"]}, vocab_size=9)
    require_compatible(a, b, Allowances(architecture=True, vocabulary=True, dtype=True))
    with pytest.raises(ThinkSwitchError, match=r"embed has shape"):
        files.write_json(b / "config.json", files.read_json(a / "config.json"))
        require_compatible(a, b, Allowances(architecture=True, dtype=True))


def test_tokenizers_with_other_vocabularies_are_refused(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", W), write(tmp_path / "b", W)
    for folder, extra in ((a, "<think>"), (b, "<thought>")):
        files.write_json(
            folder / "tokenizer.json", {"model": {"vocab": {"x": 0}}, "added_tokens": [{"id": 1, "content": extra}]}
        )
    with pytest.raises(ThinkSwitchError, match="vocabularies differ"):
        require_compatible(a, b)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", W), write(tmp_path / "b", W)
    shard = b / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ThinkSwitchError, match=r"b/model\.safetensors is \d+ bytes long where its header promises"):
        require_compatible(a, b)


@pytest.mark.parametrize(
    "content", [b"", b"12", b"\xff" * 64, b"\x02" + bytes(7) + b"[]", b"\x08" + bytes(7) + b'{"w": 1}']
)
def test_what_is_no_safetensors_file_is_named(tmp_path: Path, content: bytes) -> None:
    folder = write(tmp_path / "a", W)
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ThinkSwitchError, match=r"model\.safetensors is no whole safetensors file"):
        list_tensors(folder)


def test_shards_and_index_must_agree(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", {"w": torch.zeros(2), "x": torch.zeros(2)}, shards=2)
    assert set(list_tensors(folder)) == {"w", "x"}
    index = files.read_json(folder / "model.safetensors.index.json")
    places = index["weight_map"]
    files.write_json(folder / "model.safetensors.index.json", {"weight_map": {**places, "y": places["w"]}})
    with pytest.raises(
        ThinkSwitchError, match=r"places the tensor y in model-00001-of-00002.safetensors, which does not"
    ):
        list_tensors(folder)
    (folder / places["x"]).unlink()
    with pytest.raises(ThinkSwitchError, match=r"model-00002-of-00002.safetensors is missing"):
        list_tensors(folder)
