from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import qwen3, write
from thinkswitch_plugin import files
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.merging.compatibility import Allowances, require_compatible
from thinkswitch_plugin.merging.similarity import similarity
from thinkswitch_plugin.merging.tensors import list_tensors

W = {"w": torch.zeros(2, 2)}
NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({"w": torch.zeros(2, 3)}, {}, r"w has shape \[2, 2\] and \[2, 3\]"),
        ({"w": torch.zeros(2, 2), NORM: torch.zeros(1)}, {}, rf"only .*b holds the tensor {NORM}"),
        ({"w": torch.zeros(2, 2).half()}, {}, "w is stored as F32 and F16"),
        (W, {"vocab_size": 9}, "`vocab_size` is 96 and 9"),
        (W, {"tie_word_embeddings": False}, "`tie_word_embeddings` is True and False"),
        (W, {"num_key_value_heads": 1}, "`num_key_value_heads` is 2 and 1"),
    ],
)
def test_a_pair_that_does_not_match_is_named(
    tmp_path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], message: str
) -> None:
    a, b = write(tmp_path / "a", W), write(tmp_path / "b", tensors, **config)
    with pytest.raises(ThinkSwitchError, match=message):
        require_compatible(a, b)


def test_rotary_bases_are_compared_wherever_they_are_written(tmp_path: Path) -> None:
    older = write(tmp_path / "older", W, rope_theta=1_000_000)
    newer = write(tmp_path / "newer", W, rope_parameters={"rope_theta": 5_000_000.0, "rope_type": "default"})
    same = write(tmp_path / "same", W, rope_theta=5000000)
    with pytest.raises(ThinkSwitchError, match=r"`rope_parameters` is {'rope_theta': 1000000} and .*5000000\.0"):
        require_compatible(older, newer)
    require_compatible(same, newer)
    silent, default = write(tmp_path / "silent", W), write(tmp_path / "default", W, rope_theta=10000.0)
    require_compatible(silent, default)


def test_a_tied_head_that_only_one_stores_is_no_difference(tmp_path: Path) -> None:
    without, tensors = qwen3(1), qwen3(2)
    with_head = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    a, b = write(tmp_path / "instruct", without), write(tmp_path / "thinking", with_head)
    require_compatible(a, b)
    assert similarity(a, b) == similarity(a, write(tmp_path / "plain", tensors))
    untied = [write(tmp_path / n, t, tie_word_embeddings=False) for n, t in (("c", without), ("d", with_head))]
    with pytest.raises(ThinkSwitchError, match=r"only .*d holds the tensor lm_head\.weight"):
        require_compatible(*untied)


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
    with pytest.raises(ThinkSwitchError, match=r"b/model\.safetensors is not a whole safetensors file"):
        require_compatible(a, b)


@pytest.mark.parametrize(
    "content", [b"", b"12", b"\xff" * 64, b"\x02" + bytes(7) + b"[]", b"\x08" + bytes(7) + b'{"w": 1}']
)
def test_what_is_no_safetensors_file_is_named(tmp_path: Path, content: bytes) -> None:
    folder = write(tmp_path / "a", W)
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ThinkSwitchError, match=r"model\.safetensors is not a whole safetensors file"):
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
