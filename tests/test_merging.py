"""`thinkswitch merge`, in this process: what it writes, and what it refuses before OUT appears."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.merge_methods.slerp import slerp_merge_method
from mergekit.options import MergeOptions

from tests.checkpoints import equal, qwen3, read, write
from thinkswitch_plugin import cli, files
from thinkswitch_plugin.merging import run
from thinkswitch_plugin.merging.in_memory import load, merge_into
from thinkswitch_plugin.merging.layout import Stored
from thinkswitch_plugin.merging.mergekit_private import CheckedWriter, mergekits_slerp
from thinkswitch_plugin.merging.method import module_kind
from thinkswitch_plugin.merging.tensors import list_tensors

Tensors = dict[str, torch.Tensor]
BAD = "model.layers.1.mlp.up_proj.weight"


def recipe(method: str, *folders: Path, **parameters: Any) -> dict[str, Any]:
    """A merge config; the last folder is the base."""
    return {
        "merge_method": method,
        "base_model": str(folders[-1]),
        "models": [{"model": str(folder)} for folder in folders],
        "parameters": parameters,
    }


def merge(folder: Path, config: dict[str, Any], *options: str) -> Result:
    """`thinkswitch merge` of a config into FOLDER/out."""
    files.write_yaml(folder / "merge.yaml", config)
    words = ["merge", str(folder / "merge.yaml"), str(folder / "out"), "--no-copy-tokenizer", "--quiet", *options]
    return CliRunner().invoke(cli.main, words)


def pair(folder: Path, shards: tuple[int, int] = (1, 1)) -> tuple[Path, Path]:
    a, b = (write(folder / n, qwen3(seed), k) for n, seed, k in zip(("a", "b"), (1, 2), shards, strict=True))
    return a, b


def test_lambda_goes_by_kind_of_module(tmp_path: Path) -> None:
    a, b = pair(tmp_path)
    each = {"lambda": 0.5, "lambda_ffn": 1.0, "lambda_attention": 0.0, "path": "linear"}
    done = merge(tmp_path, recipe("thinkswitch", a, b, **each))
    assert done.exit_code == 0, done.output
    left, right = read(a), read(b)
    for name, tensor in read(tmp_path / "out").items():
        middle = 0.5 * left[name] + 0.5 * right[name]
        expected = {"ffn": right[name], "attention": left[name]}.get(module_kind(name), middle)
        assert torch.allclose(tensor, expected, atol=1e-6), name
    assert files.read_json(tmp_path / "out" / "config.json")["architectures"] == ["Qwen3ForCausalLM"]
    assert "# out" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("method", ["thinkswitch", "slerp", "linear"])
def test_sharding_of_inputs_and_output_changes_nothing(tmp_path: Path, method: str) -> None:
    parameters = {"thinkswitch": {"lambda": 0.3}, "slerp": {"t": 0.7}, "linear": {"weight": 0.5}}[method]
    results = []
    for name, shards, options in (("x", (1, 1), ()), ("y", (2, 5), ("--out-shard-size", "30k"))):
        a, b = pair(tmp_path / name, shards)
        done = merge(tmp_path / name, recipe(method, a, b, **parameters), *options)
        assert done.exit_code == 0, done.output
        results.append(read(tmp_path / name / "out"))
    assert len(list((tmp_path / "y" / "out").glob("*.safetensors"))) > 2
    assert equal(*results)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        (
            "slerp",
            {"t": [{"filter": "self_attn", "value": [0.2, 0.9]}, {"filter": "norm", "value": 1}, {"value": 0.4}]},
        ),
        ("task_arithmetic", {"weight": 0.5}),
        ("ties", {"weight": 0.5, "density": 0.5}),
        ("dare_ties", {"weight": 0.5, "density": 0.5}),
    ],
)
def test_mergekits_own_methods_write_what_mergekit_writes_on_disk_and_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, parameters: dict[str, Any]
) -> None:
    folders = [write(tmp_path / str(seed), qwen3(seed), seed) for seed in (1, 2, 3)][: 2 if method == "slerp" else 3]
    config = recipe(method, *folders, **parameters)
    done = merge(tmp_path, config, "--random-seed", "7")
    assert done.exit_code == 0, done.output
    options = MergeOptions(copy_tokenizer=False, quiet=True, random_seed=7, device="cpu")
    with monkeypatch.context() as patch:
        patch.setattr(slerp_merge_method, "implementation", mergekits_slerp)
        run_merge(MergeConfiguration.model_validate(config), str(tmp_path / "plain"), options)
    plain = read(tmp_path / "plain")
    assert equal(read(tmp_path / "out"), plain)
    model = load(folders[-1], {}, device="cpu")
    merge_into(model, config, seed=7)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in plain.items())


def test_layers_stacked_from_unlike_models_are_left_to_mergekit(tmp_path: Path) -> None:
    llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    three, two = ({n: t for n, t in qwen3(s, k).items() if "_norm." not in n} for s, k in ((1, 3), (2, 2)))
    a = write(tmp_path / "a", three, **llama)
    b = write(tmp_path / "b", two, num_hidden_layers=2, **llama)
    slices = [{"sources": [{"model": str(m), "layer_range": [0, 2]}]} for m in (a, b)]
    done = merge(tmp_path, {"merge_method": "passthrough", "slices": slices})
    assert done.exit_code == 0, done.output
    assert files.read_json(tmp_path / "out" / "config.json")["num_hidden_layers"] == 4
    assert torch.equal(read(tmp_path / "out")["model.layers.3." + BAD[15:]], read(b)[BAD])


def test_a_config_that_casts_may_mix_dtypes(tmp_path: Path) -> None:
    a = write(tmp_path / "a", {n: t.half() for n, t in qwen3(1).items()})
    b = write(tmp_path / "b", qwen3(2))
    done = merge(tmp_path, {**recipe("thinkswitch", a, b, **{"lambda": 0.5}), "dtype": "bfloat16"})
    assert done.exit_code == 0, done.output
    assert {t.dtype for t in read(tmp_path / "out").values()} == {torch.bfloat16}


def poisoned(value: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = read(folder)
        tensors[BAD][5, 5] = value
        files.remove(folder)
        write(folder, tensors)

    return damage


def rewritten(change: Callable[[Tensors], Tensors], **config: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = change(read(folder))
        files.remove(folder)
        write(folder, tensors, **config)

    return damage


def truncated(folder: Path) -> None:
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])


def without_a_shard(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def with_a_wrong_index(folder: Path) -> None:
    index = files.read_json(folder / "model.safetensors.index.json")
    index["weight_map"][BAD] = {"1": "model-00002-of-00002", "2": "model-00001-of-00002"}[
        index["weight_map"][BAD][10]
    ] + ".safetensors"
    files.write_json(folder / "model.safetensors.index.json", index)


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


DAMAGES: list[tuple[str, Callable[[Path], None], str]] = [
    ("nan", poisoned(math.nan), f"b: the tensor {BAD} holds NaN or infinity"),
    ("inf", poisoned(-math.inf), f"b: the tensor {BAD} holds NaN or infinity"),
    ("shard", without_a_shard, "b/model-00002-of-00002.safetensors is missing"),
    ("truncated", truncated, "b/model-00001-of-00002.safetensors is not a whole safetensors file"),
    ("index", with_a_wrong_index, f"places the tensor {BAD} in"),
    ("dtype", rewritten(lambda t: {n: x.half() for n, x in t.items()}), "is stored as F"),
    ("tied", rewritten(lambda t: t, tie_word_embeddings=False), "`tie_word_embeddings`"),
    ("vocabulary", rewritten(lambda t: t, vocab_size=97), "`vocab_size` is 9"),
    ("shape", rewritten(lambda t: {**t, BAD: t[BAD][:-1].clone()}), f"{BAD} has shape"),
    ("tensors", rewritten(lambda t: {n: x for n, x in t.items() if n != BAD}), f"holds the tensor {BAD}"),
    ("config", without_config, "b/config.json does not exist"),
    ("folder", files.remove, "b does not exist"),
]


@pytest.mark.parametrize("method", ["thinkswitch", "slerp"])
@pytest.mark.parametrize(("damage", "message"), [d[1:] for d in DAMAGES], ids=[d[0] for d in DAMAGES])
def test_a_refusal_names_what_is_wrong_and_leaves_nothing(
    tmp_path: Path, method: str, damage: Callable[[Path], None], message: str
) -> None:
    a, b = pair(tmp_path, (1, 2))
    damage(b)
    done = merge(tmp_path, recipe(method, a, b, **({"t": 0.3} if method == "slerp" else {"lambda": 0.3})))
    assert_refused(tmp_path, done, message)


def assert_refused(folder: Path, done: Result, message: str) -> None:
    """Exit code 1 with one sentence that contains `message`, and no output at the destination of the merge."""
    assert done.exit_code == 1, done.output
    assert message in done.output and len(done.output.strip().splitlines()) == 1
    assert not (folder / "out").exists() and not (folder / ".out.partial").exists()


@pytest.mark.parametrize("parameters", [{"lambda": 1.0}, {"lambda": 0.0}, {"lambda": 0.5, "path": "linear"}])
def test_nan_is_found_where_no_angle_is_measured(tmp_path: Path, parameters: dict[str, Any]) -> None:
    a, b = pair(tmp_path)
    poisoned(math.nan)(b if parameters["lambda"] else a)
    done = merge(tmp_path, recipe("thinkswitch", a, b, **parameters))
    assert_refused(tmp_path, done, f"{'b' if parameters['lambda'] else 'a'}: the tensor {BAD} holds NaN")


def test_an_overflow_of_finite_inputs_is_told_apart(tmp_path: Path) -> None:
    a, b = (write(tmp_path / n, {k: t * 4e4 for k, t in qwen3(s).items()}) for n, s in (("a", 1), ("b", 2)))
    done = merge(tmp_path, {**recipe("thinkswitch", a, b, **{"lambda": 0.5, "path": "linear"}), "out_dtype": "float16"})
    assert_refused(tmp_path, done, "though every input is finite")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge_method": "slurp"}, "mergekit has no `merge_method`"),
        ({"models": "all of them"}, "merge.yaml: `models`"),
        ({"models": None}, "merge.yaml: Exactly one of 'models'"),
    ],
)
def test_a_config_that_mergekit_refuses_is_one_sentence(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    config = {**recipe("slerp", *pair(tmp_path), t=0.5), **change}
    done = merge(tmp_path, config)
    assert_refused(tmp_path, done, message)


def test_out_is_not_written_over(tmp_path: Path) -> None:
    config = recipe("thinkswitch", *pair(tmp_path), **{"lambda": 0.5})
    (tmp_path / "out").mkdir()
    assert merge(tmp_path, config).exit_code == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    done = merge(tmp_path, config)
    assert done.exit_code == 1 and "out exists already; delete it" in done.output
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before


def test_an_interrupted_merge_leaves_out_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run.mergekit.merge, "run_merge", interrupted)
    done = merge(tmp_path, recipe("thinkswitch", *pair(tmp_path), **{"lambda": 0.5}))
    assert done.exit_code == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "merge.yaml"]


@pytest.mark.parametrize("use_async", [False, True])
def test_the_writer_keeps_every_bit_and_dtype_and_what_is_carried(tmp_path: Path, use_async: bool) -> None:
    tensors = qwen3(1) | {
        "brain": torch.randn(5001).bfloat16(),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "transposed": torch.randn(6, 9).T,
        "ids": torch.arange(11),
        "mask": torch.tensor([True, False, True]),
        "double": torch.randn(9, dtype=torch.float64),
    }
    head = list_tensors(write(tmp_path / "other", {"mtp.weight": torch.randn(4)}))["mtp.weight"]
    carried = {"mtp.weight": Stored("mtp.weight", head.shape, (head,))}
    out = CheckedWriter(str(tmp_path / "out"), max_shard_size=9000, use_async=use_async, carried=carried)
    for name, tensor in tensors.items():
        out.save_tensor(name, tensor)
    out.finalize()
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert equal(read(tmp_path / "out"), tensors | read(tmp_path / "other"))


def test_a_refusal_while_shards_are_being_written_leaves_nothing(tmp_path: Path) -> None:
    a, b = pair(tmp_path)
    poisoned(math.nan)(b)
    options = ("--async-write", "--out-shard-size", "9k")
    done = merge(tmp_path, recipe("slerp", a, b, t=0.3), *options)
    assert_refused(tmp_path, done, f"b: the tensor {BAD} holds NaN")


def test_pickles_are_refused(tmp_path: Path) -> None:
    a, b = pair(tmp_path)
    done = merge(tmp_path, recipe("thinkswitch", a, b, **{"lambda": 0.5}), "--no-safe-serialization")
    assert_refused(tmp_path, done, "writes safetensors only")


def test_wrong_usage_is_exit_code_2(tmp_path: Path) -> None:
    assert CliRunner().invoke(cli.main, ["merge", "one-word"]).exit_code == 2
    assert isinstance(run.command, click.Command)


@pytest.mark.slow
def test_the_bench_runs_at_a_small_shape_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from experiments import bench_merge

    # Every candidate is a process with imports of its own; these differ from mergekit's defaults in their flags alone.
    kept = {name: how for name, how in bench_merge.MERGES.items() if not name.startswith("mergekit-yaml --async-write")}
    monkeypatch.setattr(bench_merge, "MERGES", kept)
    monkeypatch.setattr(bench_merge.signal, "signal", lambda *_: None)  # the handler would stay
    words = ["--layers", "0", "--vocabulary", "4096", "--rounds", "1", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench_merge", *words])
    bench_merge.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["ratio"] > 0 and result["fastest_mergekit"]["call"].startswith("mergekit-yaml")
    found = result["against"]["the recipes' rebuild: thinkswitch merge"]
    assert found["elements"] > 0 and found["unequal"] == 0
    assert result["gigabytes"] > 0
    assert list(tmp_path.iterdir()) == []


def test_the_bench_says_when_the_disk_is_too_small(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "experiments.bench_merge", "--layers", "100000", "--folder", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "of free disk and" in done.stderr and "Traceback" not in done.stderr
