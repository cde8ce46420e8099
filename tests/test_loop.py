"""One real iteration of the demo domain: its files, its figures, and the plain tools on them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.conftest import BIN, ROOT
from thinkswitch_plugin import files
from thinkswitch_plugin.data.traces import has_tag
from thinkswitch_plugin.demo import task
from thinkswitch_plugin.judging.samples import newest
from thinkswitch_plugin.run import open_run, stages
from thinkswitch_plugin.training import distil

pytestmark = pytest.mark.slow


def test_report_shows_instruct_better_and_thinking_kept(finished_run: Path) -> None:
    report = files.read_json(finished_run / "report.json")
    zero, one = report["iterations"]
    assert zero["instruct"]["n"] >= 400
    assert one["instruct"]["mean@k"] - zero["instruct"]["mean@k"] >= 0.20
    assert one["thinking"]["mean@k"] >= zero["thinking"]["mean@k"] - 0.03
    assert min(zero["thinking"]["think_ratio"], one["thinking"]["think_ratio"]) >= 0.95
    assert one["instruct"]["think_ratio"] == 0.0
    assert {"generate", "pairs", "train", "merge_lora", "merge", "eval"} <= set(one["seconds"])
    assert one["merge"]["method"] == "slerp" and one["merge"]["lambda"] >= 0.9
    assert report["versions"]["axolotl"] and report["seed"] == 0
    (first, begun), (last, ended) = one["losses"][0], one["losses"][-1]
    assert first < last and begun > ended > 0
    assert not (finished_run / "iter-1" / "adapter" / "trainer_state.json").exists()


def test_pairs_are_the_teachers_answers_without_a_trace(finished_run: Path) -> None:
    rows = [row for _, row in files.read_jsonl(finished_run / "iter-1" / "pairs.jsonl")]
    counts = files.read_json(finished_run / "iter-1" / "pairs.json")
    assert counts["kept"] + sum(counts["dropped"].values()) == counts["samples"] == 512
    assert len(rows) == counts["kept"]
    held_out = set(task.held_out())
    right = 0
    for row in rows:
        question, label = (m["content"] for m in row["messages"])
        assert question not in held_out and not has_tag(label)
        right += label == task.answer(question)
    assert right / len(rows) > 0.95


def test_each_checkpoint_has_the_files_of_its_own_mode(finished_run: Path) -> None:
    pair = files.read_json(finished_run / "iter-0" / "pair.json")
    for mode in ("instruct", "thinking"):
        made, parent = finished_run / "iter-1" / mode, Path(pair[mode]["path"])
        for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
            assert (made / name).read_bytes() == (parent / name).read_bytes(), f"{mode}/{name}"
        assert "thinkswitch" in (made / "README.md").read_text()
        assert load_file(str(made / "model.safetensors")).keys() == load_file(str(parent / "model.safetensors")).keys()


def test_tensors_without_lora_are_merged_unrounded(finished_run: Path) -> None:
    pair = files.read_json(finished_run / "iter-0" / "pair.json")
    before = load_file(str(Path(pair["instruct"]["path"]) / "model.safetensors"))
    after = load_file(str(finished_run / "iter-1" / "instruct" / "model.safetensors"))
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(before[name], after[name])
    assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], after["model.layers.0.mlp.up_proj.weight"])


def test_iterate_again_has_nothing_to_do(finished_run: Path, command: Any) -> None:
    def stamps() -> dict[Path, int]:
        names = {stage.name for stage in stages(open_run(finished_run))}
        return {p: p.stat().st_mtime_ns for p in finished_run.rglob(".stamps/*.json") if p.stem in names}

    words = ("make", "iterate", "ITERATIONS=1", f"RUNS={finished_run.parent}")
    before = stamps()
    for path in (finished_run / "iter-1" / "pairs.jsonl", ROOT / "recipes" / "arithmetic.yaml"):
        os.utime(path)
    done = command(*words)
    assert done.returncode == 0 and "Nothing to do" in done.stdout
    assert len(before) == 12 and stamps() == before


def test_the_plan_reads_as_the_method(command: Any, tmp_path: Path) -> None:
    done = command("make", "-n", "iterate", "ITERATIONS=2", f"RUNS={tmp_path}")
    words = [
        line.split("thinkswitch ")[1].split()[0] for line in done.stdout.splitlines() if "bin/thinkswitch " in line
    ]
    once = ["requests", "generate", "pairs", "train", "merge-lora", "rebuild", "eval"]
    assert words == ["begin", "pair", "eval", *once, *once, "report"]
    assert list(tmp_path.iterdir()) == []


def test_another_seed_in_the_same_folder_is_refused(finished_run: Path, command: Any) -> None:
    done = command("make", "iterate", "SEED=7", f"RUNS={finished_run.parent}")
    assert done.returncode != 0 and "was begun with SEED=0" in done.stderr and "RUNS=" in done.stderr


@pytest.mark.usefixtures("forked_engines")
def test_plain_axolotl_trains_an_iterations_config_to_the_same_adapter(
    finished_run: Path, forked: Any, tmp_path: Path
) -> None:
    loop, plain = tmp_path / "loop", tmp_path / "plain"
    config = files.read_yaml(finished_run / "iter-1" / "axolotl.yaml") | {"max_steps": 12}
    places = {"output_dir": str(loop / "adapter"), "dataset_prepared_path": str(loop / "prepared")}
    distil.train(config | places, loop, options=(), minimum=1e-4)
    places = {"output_dir": str(plain / "adapter"), "dataset_prepared_path": str(plain / "prepared")}
    files.write_yaml(plain / "recipe.yaml", config | places)
    done = forked(BIN / "axolotl", "train", plain / "recipe.yaml", "--launcher", "python")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    first, again = (load_file(str(folder / "adapter" / "adapter_model.safetensors")) for folder in (loop, plain))
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)


def test_axolotl_stops_when_the_adapter_did_not_move(finished_run: Path, forked: Any, tmp_path: Path) -> None:
    config = files.read_yaml(finished_run / "iter-1" / "axolotl.yaml")
    config |= {
        "output_dir": str(tmp_path / "adapter"),
        "dataset_prepared_path": str(tmp_path / "prepared"),
        "max_steps": 2,
        "learning_rate": 0.0,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(config))
    done = forked(BIN / "axolotl", "train", path, "--launcher", "python")
    assert done.returncode != 0 and "the adapter did not move" in done.stdout + done.stderr


def test_plain_mergekit_runs_a_merge_config_beside_a_pair(finished_run: Path, forked: Any, tmp_path: Path) -> None:
    pair = files.read_json(finished_run / "iter-0" / "pair.json")
    for mode in ("instruct", "thinking"):
        (tmp_path / mode).symlink_to(Path(pair[mode]["path"]).resolve())
    shutil.copy(ROOT / "merge_configs" / "slerp.yaml", tmp_path)
    done = forked(BIN / "mergekit-yaml", "slerp.yaml", "rebuilt", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "rebuilt" / "chat_template.jinja").read_text() == (
        tmp_path / "thinking/chat_template.jinja"
    ).read_text()


def test_plain_lm_eval_finds_the_task_with_no_option(finished_run: Path, command: Any, tmp_path: Path) -> None:
    model = finished_run / "iter-1" / "thinking"
    done = command(
        BIN / "lm_eval",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={model}",
        "--tasks",
        "thinkswitch_arithmetic",
        "--apply_chat_template",
        "--limit",
        "20",
        "--batch_size",
        "20",
        "--output_path",
        tmp_path,
        "--log_samples",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = files.read_json(newest(tmp_path, "results_*.json"))["results"]["thinkswitch_arithmetic"]
    assert results["mean@k,none"] > 0.9 and results["think_ratio,none"] == 1.0


@pytest.mark.usefixtures("forked_engines")
def test_a_lambda_that_stops_the_thinking_is_refused_and_the_old_pair_kept(finished_run: Path, tmp_path: Path) -> None:
    from thinkswitch_plugin.args import EngineKeys, RebuildKeys
    from thinkswitch_plugin.errors import ThinkSwitchError
    from thinkswitch_plugin.loop.rebuild import Check, rebuild_thinking

    here = finished_run / "iter-1"
    pair = files.read_json(finished_run / "iter-0" / "pair.json")
    out = tmp_path / "thinking"
    out.mkdir()
    (out / "old").touch()
    keys = RebuildKeys.model_validate({"lambda": -1, "lambda_steps": [-0.5], "check_prompts": 16})
    check = Check(
        here / "requests.jsonl",
        reference_requests=here / "requests.jsonl",
        reference=here / "generations.jsonl",
        engine="embedded",
        engine_keys=EngineKeys.model_validate({}),
        logs=tmp_path / "logs",
    )
    with pytest.raises(
        ThinkSwitchError,
        match=r"No λ keeps the rebuilt checkpoint thinking \(λ → think ratio of what was not cut: -1 → 0.*, \d+ of 16 cut",
    ):
        rebuild_thinking(here / "instruct", Path(pair["thinking"]["path"]), keys, out, check, lambda *_: None)
    assert (out / "old").exists() and not list(tmp_path.glob(".thinking*"))
