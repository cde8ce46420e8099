from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from thinkswitch_plugin import files, places, run
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.loop import begin


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> run.Run:
    monkeypatch.setattr(begin, "check_axolotl_keys", lambda recipe: None)  # takes seconds; tested by itself
    return begin.begin_run("arithmetic", tmp_path, 0, "embedded", 1)


def do(opened: run.Run, name: str = "pair", text: str = "x") -> list[str]:
    """Run one stage whose work only writes its outputs; what was done is returned."""
    done: list[str] = []
    iteration = 0 if name == "pair" else 1
    stage = run.find_stage(opened, name, iteration)

    def work() -> None:
        done.append(name)
        for output in stage.outputs:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(text)

    run.execute(opened, name, iteration, work)
    return done


def test_the_anchor_is_the_original_or_the_checkpoint_of_the_iteration_before(fresh: run.Run) -> None:
    original = fresh.checkpoint("thinking", 0)
    assert [fresh.anchor(k) for k in (1, 2)] == [original, original]
    fresh.recipe.keys.rebuild.anchor = "previous"
    assert [fresh.anchor(k) for k in (1, 2)] == [original, str(fresh.iteration(1) / "thinking")]


def test_a_stage_is_done_once(fresh: run.Run) -> None:
    pair = '{"instruct": {"path": "recipes"}, "thinking": {"path": "tests"}}'
    assert do(fresh, "pair", pair) == ["pair"]
    assert do(fresh, "pair", pair) == []


def test_a_pair_whose_checkpoints_are_gone_is_made_again(fresh: run.Run) -> None:
    pair = '{"instruct": {"path": "recipes"}, "thinking": {"path": "nowhere"}}'
    assert do(fresh, "pair", pair) == ["pair"]
    assert do(fresh, "pair", pair) == ["pair"]


def test_touching_an_input_reruns_nothing_and_changing_it_reruns_the_stage(fresh: run.Run) -> None:
    here = fresh.iteration(1)
    files.write_json(here / "requests.jsonl", {})
    files.write_json(here / "generations.jsonl", {"n": 1})
    assert do(fresh, "pairs") == ["pairs"]
    os.utime(here / "generations.jsonl", (1, 1))
    assert do(fresh, "pairs") == []
    files.write_json(here / "generations.jsonl", {"n": 2})
    _, waiting = run.forget_stale(fresh)
    assert "pairs" in [s.name for s in waiting]
    assert do(fresh, "pairs") == ["pairs"]


def test_a_lost_output_is_made_again(fresh: run.Run) -> None:
    do(fresh, "pair", "{}")
    (fresh.iteration(0) / "pair.json").unlink()
    assert do(fresh, "pair", "{}") == ["pair"]


def test_a_failed_stage_leaves_no_stamp(fresh: run.Run) -> None:
    def work() -> None:
        raise ThinkSwitchError("no")

    with pytest.raises(ThinkSwitchError):
        run.execute(fresh, "pair", 0, work)
    assert not run.stamp_path(fresh, run.find_stage(fresh, "pair", 0)).exists()


def test_resumable_output_is_kept_only_while_its_inputs_stay_the_same(fresh: run.Run) -> None:
    here = fresh.iteration(1)
    files.write_json(here / "requests.jsonl", {"n": 1})

    def killed_half_way() -> None:
        (here / "generations.jsonl").write_text("half")
        raise ThinkSwitchError("killed")

    def look() -> None:
        seen.append((here / "generations.jsonl").exists())
        (here / "generations.jsonl").write_text("whole")

    seen: list[bool] = []
    with pytest.raises(ThinkSwitchError):
        run.execute(fresh, "generate", 1, killed_half_way)
    run.execute(fresh, "generate", 1, look)
    files.write_json(here / "requests.jsonl", {"n": 2})
    run.execute(fresh, "generate", 1, look)
    assert seen == [True, False]


def test_another_seed_or_engine_for_the_same_folder_is_refused(fresh: run.Run) -> None:
    runs = fresh.folder.parent
    for seed, engine in ((1, "embedded"), (0, "http://127.0.0.1:1/v1")):
        with pytest.raises(ThinkSwitchError, match="RUNS="):
            begin.begin_run("arithmetic", runs, seed, engine, 1)
    assert begin.begin_run("arithmetic", runs, 0, "auto", 2).engine == "embedded"


def test_a_server_may_move_or_be_joined_by_others_in_the_same_run(fresh: run.Run) -> None:
    runs, old = fresh.folder.parent / "served", "http://127.0.0.1:1/v1"
    first = begin.begin_run("arithmetic", runs, 0, old, 1)
    moved = begin.begin_run("arithmetic", runs, 0, f"http://10.0.0.2:80/v1,{old}", 1)
    assert run.open_run(moved.folder).engine == f"http://10.0.0.2:80/v1,{old}"
    assert [stage.values for stage in run.stages(moved)] == [stage.values for stage in run.stages(first)]


def test_another_overlay_for_the_same_folder_is_refused_and_none_means_the_same(fresh: run.Run) -> None:
    runs = fresh.folder.parent
    with pytest.raises(ThinkSwitchError, match="was begun with OVERLAY=''"):
        begin.begin_run("arithmetic", runs, 0, "embedded", 1, ["cpu"])
    other = begin.begin_run("arithmetic", runs / "b", 0, "embedded", 1, ["cpu"])
    assert begin.begin_run("arithmetic", runs / "b", 0, "embedded", 1).recipe.overlays == other.recipe.overlays


def test_a_run_names_files_of_the_package_so_that_another_installation_finds_them(
    fresh: run.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = fresh.folder.parent.absolute() / "c"
    monkeypatch.chdir(tmp_path)  # where the recipe is found in the package only
    folder = begin.begin_run("arithmetic", runs, 0, "embedded", 1, ["cpu"]).folder
    begun = files.read_json(folder / "run.json")
    assert (begun["recipe"], begun["overlays"]) == (
        "package:recipes/arithmetic.yaml",
        ["package:recipes/cpu.overlay.yaml"],
    )
    assert run.open_run(folder).recipe.path.is_absolute()
    monkeypatch.chdir(places.HOME)
    assert begin.begin_run("arithmetic", runs, 0, "embedded", 1, ["cpu"]).recipe.path == Path("recipes/arithmetic.yaml")


def test_a_file_in_the_current_folder_is_not_taken_for_the_recipe_of_a_run(
    fresh: run.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = fresh.folder.parent.absolute() / "d"
    monkeypatch.chdir(tmp_path)
    folder = begin.begin_run("arithmetic", runs, 0, "embedded", 1).folder
    text = (places.HOME / "recipes" / "arithmetic.yaml").read_text()
    files.write_text(tmp_path / "recipes" / "arithmetic.yaml", text.replace("lora_r:", "lora_r: 1  #"))
    assert run.open_run(folder).recipe.axolotl["lora_r"] != 1
    files.write_json(folder / "run.json", files.read_json(folder / "run.json") | {"recipe": "recipes/mine.yaml"})
    with pytest.raises(ThinkSwitchError, match=r"recipes/mine\.yaml"):  # of another folder
        run.open_run(folder)


def test_nothing_is_written_for_a_domain_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ThinkSwitchError):
        begin.begin_run("nothing", tmp_path / "runs", 0, "auto", 1)
    assert not (tmp_path / "runs").exists()


def test_a_second_command_is_kept_out(fresh: run.Run) -> None:
    with (fresh.folder / ".lock").open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(ThinkSwitchError, match="Another command is at work"):
            do(fresh, "pair")
