"""A real sweep of the tiny pair, resumed; its options; selective merges and baselines."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import BIN
from thinkswitch_plugin import files
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.judging.evaluation import Sampling, load_task
from thinkswitch_plugin.merging.config import fit_layers, named_models, place_models
from thinkswitch_plugin.recipe import load_recipe
from thinkswitch_plugin.report.sweeps import points_of
from thinkswitch_plugin.run.hashes import Hashes
from thinkswitch_plugin.search.ablation import collect, has_lambda, interpolated_layers
from thinkswitch_plugin.search.pair import Pair, few_questions
from thinkswitch_plugin.search.sweep import earlier, parse_sampling, parse_weights

TS = BIN / "thinkswitch"


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("0 0.5 1", [0, 0.5, 1]),
        ("0 0.1 … 1", [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]),
        ("0 .25 ... 1", [0, 0.25, 0.5, 0.75, 1]),
        ("1,0,1, -0.2 1.2", [-0.2, 0, 1, 1.2]),
        ("0.4 0.45 … 0.6 1", [0.4, 0.45, 0.5, 0.55, 0.6, 1]),
    ],
)
def test_lambdas_are_read_as_people_write_them(text: str, weights: list[float]) -> None:
    assert parse_weights(text) == pytest.approx(weights)


@pytest.mark.parametrize("text", ["", "0 x 1", "nan", "… 1", "0 … 1", "0 0.3 … 1", "0 0 … 1", "1 0.9 … 2"])
def test_lambdas_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ThinkSwitchError, match="LAMBDAS"):
        parse_weights(text)


def test_sampling_settings() -> None:
    assert parse_sampling("0.6/0.95 0.7", 8) == [Sampling(0.6, 0.95, 8), Sampling(0.7, None, 8)]
    assert parse_sampling("", None) == [Sampling()]
    for text in ("hot", "0.6/2", "0.6/0", "-1", "0.6/0.9/0.1"):
        with pytest.raises(ThinkSwitchError, match="SAMPLING"):
            parse_sampling(text, None)


def test_a_points_folder_says_its_settings(tmp_path: Path) -> None:
    for weight, sampling in ((-0.2, Sampling()), (0.5, Sampling(0.6, 0.95, 8)), (1.0, Sampling(0.7))):
        files.write_json(tmp_path / f"points/lambda-{weight:g}{sampling.slug}/candidate.json", {})
    files.write_json(tmp_path / "points/lambda-0.25-n20/candidate.json", {})
    assert sorted(earlier(tmp_path), key=str) == sorted(
        [(-0.2, Sampling()), (0.25, Sampling()), (0.5, Sampling(0.6, 0.95, 8)), (1.0, Sampling(0.7))], key=str
    )


def test_a_trial_with_few_questions_has_a_folder_of_its_own() -> None:
    keys = load_recipe(Path("recipes/arithmetic.yaml")).keys
    few = keys.model_copy(update={"evaluation": keys.evaluation.model_copy(update={"limit": 20})})
    here = Path("iter-1")
    names = [few_questions(Pair(k, {}, 0, "embedded", here, here, 1, True)) for k in (keys, few)]
    assert names == ["", "-n20"]


def test_k_and_sampling_reach_the_task() -> None:
    keys = load_recipe(Path("recipes/arithmetic.yaml")).keys.evaluation
    task = load_task(keys, Sampling(0.6, 0.95, 4))["thinkswitch_arithmetic"]
    assert task.config.repeats == 4
    settings = task.config.generation_kwargs
    assert (settings["do_sample"], settings["temperature"], settings["top_p"]) == (True, 0.6, 0.95)
    assert settings["until"] == ["<|im_end|>"]
    greedy = load_task(keys, Sampling(0))["thinkswitch_arithmetic"].config.generation_kwargs
    assert greedy["do_sample"] is False and "temperature" not in greedy
    for sampling in (Sampling(0, None, 4), Sampling(samples=4)):
        with pytest.raises(ThinkSwitchError, match="same answer"):
            load_task(keys, sampling)


SLICES = {
    "merge_method": "thinkswitch",
    "base_model": "./thinking",
    "slices": [
        {"sources": [{"model": "./thinking", "layer_range": [a, b]}], "parameters": {"lambda": share}}
        for a, b, share in ((0, 12, 0), (12, 24, 0.8), (24, 36, 0.8))
    ],
}


@pytest.mark.parametrize(
    ("layers", "ranges", "interpolated"),
    [
        (36, [[0, 12], [12, 24], [24, 36]], "12–23, 24–35"),
        (48, [[0, 16], [16, 32], [32, 48]], "16–31, 32–47"),
        (4, [[0, 1], [1, 3], [3, 4]], "1–2, 3"),
        (1, [[0, 0], [0, 1], [1, 1]], "0"),
    ],
)
def test_layer_ranges_fit_any_depth(layers: int, ranges: list[list[int]], interpolated: str) -> None:
    fitted = fit_layers(SLICES, layers)
    found = [piece["sources"][0]["layer_range"] for piece in fitted["slices"]]
    assert found == [r for r in ranges if r[0] < r[1]]
    assert [r[0] for r in found[1:]] == [r[1] for r in found[:-1]] and (found[0][0], found[-1][1]) == (0, layers)
    assert interpolated_layers(fitted, layers) == interpolated


def test_every_merge_config_of_the_project_names_known_checkpoints() -> None:
    paths = collect([Path("merge_configs"), *(Path("merge_configs") / n for n in ("layers", "modules", "baselines"))])
    assert len(paths) > 20
    for path in paths:
        config = files.read_yaml(path)
        assert named_models(config) <= {"instruct", "thinking", "instruct-0", "base"}, path
        placed = place_models(config, {"instruct": "/i", "thinking": "/t", "instruct-0": "/z", "base": "/b"})
        assert all(name.startswith("/") for name in named_models(placed)), path


def test_lambda_is_only_put_where_there_is_one() -> None:
    settable = {
        path.stem
        for path in collect([Path("merge_configs"), Path("merge_configs/baselines")])
        if has_lambda(files.read_yaml(path))
    }
    assert settable == {"slerp", "linear", "thinkswitch"}


def test_a_sweep_of_no_run_and_no_pair_is_one_sentence(command: Any, tmp_path: Path) -> None:
    done = command(TS, "sweep", "--domain", "arithmetic", "--runs", tmp_path)
    assert (
        done.returncode == 1
        and "is not a run folder" in done.stderr
        and "--instruct folder --thinking folder" in done.stderr
    )
    assert len(done.stderr.strip().splitlines()) == 1 and list(tmp_path.iterdir()) == []
    for text in ("many", "²", "0", "-1", "1.5"):
        done = command(TS, "sweep", "--domain", "arithmetic", "--samples", text)
        assert done.returncode == 2 and "give a whole number above 0" in done.stderr and "Traceback" not in done.stderr


def test_figures_depend_on_the_evaluation_sets_of_a_folder_of_the_users_own(tmp_path: Path) -> None:
    keys, data = load_recipe(Path("recipes/arithmetic.yaml")).keys, tmp_path / "sets"
    pair = Pair(keys, {}, 0, "embedded", tmp_path, tmp_path, None, False, data=str(data))
    files.write_json(data / "test.json", {"a": 1})
    before = pair.task_hashes(Hashes(tmp_path))
    files.write_json(data / "test.json", {"a": 2})
    changed = {Path(path).name for path, found in pair.task_hashes(Hashes(tmp_path)).items() if found != before[path]}
    assert changed == {"sets"} and "thinkswitch_tasks.py" in {Path(path).name for path in before}


def test_a_config_that_cannot_be_made_of_the_pair_is_left_out_with_a_reason() -> None:
    keys = load_recipe(Path("recipes/arithmetic.yaml")).keys
    here = Path("iter-1")

    def subject(**roles: str) -> Pair:
        folders = {name: Path(folder) for name, folder in roles.items()}
        return Pair(keys, folders, 0, "embedded", here, here, 1, True)

    three = named_models(files.read_yaml(Path("merge_configs/baselines/three.yaml")))
    ties = named_models(files.read_yaml(Path("merge_configs/baselines/ties.yaml")))
    whole = subject(**{"instruct": "i", "thinking": "t", "instruct-0": "z", "base": "b"})
    assert whole.lacks(three) is whole.lacks(ties) is None
    start = subject(**{"instruct": "i", "thinking": "t", "instruct-0": "i"})
    assert "is ./instruct here" in str(start.lacks(three))
    assert "no ./base; name the common ancestor" in str(start.lacks(ties))


@pytest.fixture(scope="module")
def swept(own_run: Path, make: Any) -> Path:
    """A sweep of five points of iteration 1, by Make."""
    done = make("sweep", "ITERATION=1", "LAMBDAS=0 0.2 0.5 0.9 1", f"RUNS={own_run.parent}")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return own_run / "iter-1" / "sweep"


@pytest.mark.slow
def test_the_three_stages_and_the_sweet_spot_of_the_tiny_pair(swept: Path) -> None:
    found = files.read_json(swept / "sweep.json")
    points = {p["lambda"]: p for p in found["points"]}
    assert sorted(points) == [0, 0.2, 0.5, 0.9, 1]
    assert points[0]["think_ratio"] <= 0.05 and points[0.2]["think_ratio"] <= 0.05
    assert points[0.9]["think_ratio"] >= 0.95 and points[1]["think_ratio"] >= 0.95
    curve = found["curves"][0]
    assert 0.2 <= curve["stages"]["lower"] <= curve["stages"]["middle"] <= curve["stages"]["upper"] <= 0.9
    spot = curve["sweet_spot"]
    assert spot["tokens"] <= spot["thinking"]["tokens"]
    assert points[1]["ci95"][0] <= spot["mean@k"]
    for name in ("sweep.md", "sweep.png", "sweep.svg"):
        assert (swept / name).stat().st_size > 500
    assert "λ* =" in (swept / "sweep.md").read_text()
    assert not list(swept.rglob("*.safetensors"))


@pytest.mark.slow
def test_lambda_1_and_0_score_as_the_checkpoints_themselves(swept: Path, finished_run: Path) -> None:
    report = files.read_json(finished_run / "report.json")
    points = {p["lambda"]: p for p in files.read_json(swept / "sweep.json")["points"]}
    assert points[0]["mean@k"] == report["iterations"][1]["instruct"]["mean@k"]
    assert points[0]["tokens"] == report["iterations"][1]["instruct"]["tokens"]


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_a_finer_one_keeps_the_points(swept: Path, own_run: Path, forked: Any) -> None:
    marks = {p: p.stat().st_mtime_ns for p in swept.glob("points/*/candidate.json")}
    gone = swept / "points" / "lambda-0.5"
    shutil.rmtree(gone)
    (swept / "points" / ".lambda-0.7.partial").mkdir()  # what a kill leaves behind
    words = ["--domain", "arithmetic", "--runs", own_run.parent, "--iteration", "1", "--lambdas", "0.5 0.7"]
    done = forked(TS, "sweep", *words)
    assert done.returncode == 0, done.stderr[-2000:]
    points = [p["lambda"] for p in files.read_json(swept / "sweep.json")["points"]]
    assert points == [0, 0.2, 0.5, 0.7, 0.9, 1]
    for path, mark in marks.items():
        assert (path.stat().st_mtime_ns == mark) == (path.parent != gone), path


@pytest.mark.slow
def test_merging_in_memory_equals_mergekit_yaml(finished_run: Path, tmp_path: Path, forked: Any) -> None:
    from transformers import AutoModelForCausalLM

    from thinkswitch_plugin.merging.in_memory import merge_into

    pair = files.read_json(finished_run / "iter-0" / "pair.json")
    roles = {mode: str(Path(pair[mode]["path"]).absolute()) for mode in ("instruct", "thinking")}
    roles |= {"base": str(Path(roles["instruct"]).parent / "base"), "instruct-0": roles["instruct"]}
    roles["instruct"] = str(finished_run / "iter-1" / "instruct")
    model = AutoModelForCausalLM.from_pretrained(roles["thinking"], dtype="auto")
    for path in (Path("merge_configs/slerp.yaml"), Path("merge_configs/baselines/ties.yaml")):
        config = place_models(files.read_yaml(path), roles)
        files.write_yaml(tmp_path / "merge.yaml", config)
        done = forked(BIN / "mergekit-yaml", tmp_path / "merge.yaml", tmp_path / path.stem)
        assert done.returncode == 0, done.stderr[-2000:]
        merge_into(model, config)
        for name, tensor in load_file(str(tmp_path / path.stem / "model.safetensors")).items():
            assert torch.equal(model.state_dict()[name], tensor), f"{path.stem}: {name}"


@pytest.mark.slow
def test_layers_modules_and_baselines_by_make(own_run: Path, make: Any) -> None:
    for target in ("ablate", "baselines"):
        done = make(target, "ITERATION=1", "LIMIT=60", f"RUNS={own_run.parent}")
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    here = own_run / "iter-1" / "merges"
    layers = files.read_json(here / "layers" / "merges.json")["merges"]
    assert [row["layers"] for row in layers] == ["", "", "0–3", "0", "1–2", "3", "0–2", "1–3"]
    assert layers[0]["think_ratio"] == 0 and layers[1]["think_ratio"] >= 0.95 and layers[2]["think_ratio"] >= 0.95
    modules = {row["name"]: row for row in files.read_json(here / "modules" / "merges.json")["merges"]}
    assert modules["attention-instruct-ffn-instruct"]["think_ratio"] < 0.2
    assert modules["attention-thinking-ffn-thinking"]["think_ratio"] >= 0.95
    assert (here / "modules" / "modules.svg").stat().st_size > 500
    rows = {row["name"]: row for row in files.read_json(here / "baselines" / "merges.json")["merges"]}
    assert {"slerp", "linear", "task_arithmetic", "ties", "dare_ties", "three", "transplant"} <= rows.keys()
    assert rows["task_arithmetic"]["mean@k"] == rows["linear"]["mean@k"]  # eq. 7: the ancestor cancels
    assert "Think #R" in (here / "layers" / "merges.md").read_text()


@pytest.mark.slow
def test_several_samples_and_sampling_settings_make_several_curves(own_run: Path, make: Any) -> None:
    words = ["LAMBDAS=0 1", "SAMPLES=2", "SAMPLING=0.6/0.95 1.0", "LIMIT=20", f"OUT={own_run / 'sampled'}"]
    done = make("sweep", *words, f"RUNS={own_run.parent}")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = files.read_json(own_run / "sampled" / "sweep" / "sweep.json")
    assert [(p["lambda"], p["temperature"], p["top_p"], p["k"]) for p in found["points"]] == [
        (0, 0.6, 0.95, 2),
        (1, 0.6, 0.95, 2),
        (0, 1.0, None, 2),
        (1, 1.0, None, 2),
    ]
    assert len(found["curves"]) == 2
    assert all(p["mean@k"] <= p["pass@k"] for p in found["points"])
    # Another k is another curve of the same folder, and mixes with none.
    done = make("sweep", "LAMBDAS=0 1", *words[3:], f"RUNS={own_run.parent}")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = files.read_json(own_run / "sampled" / "sweep" / "sweep.json")
    assert {c["sampling"] for c in found["curves"]} == {"T 0.6, top-p 0.95, k 2", "T 1, k 2", "the task's own"}
    for curve in found["curves"]:
        points = points_of(found, curve)
        assert [(p["lambda"], p["k"]) for p in points] == [(0, curve["samples"] or 1), (1, curve["samples"] or 1)]


@pytest.mark.slow
def test_the_bench_finds_equal_scores(forked: Any, finished_run: Path) -> None:
    done = forked(BIN / "python", "-m", "experiments.bench_sweep", "--lambdas", "0.5", "--limit", "40")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert '"equal": true' in done.stdout.splitlines()[-1]
