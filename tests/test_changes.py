"""Which stages run again after a change, what KEEP= prunes, and what `verify` finds; the stages here are instant."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
import torch

from tests.checkpoints import write
from tests.conftest import ROOT
from thinkswitch_plugin import files, run
from thinkswitch_plugin.args import EngineKeys, resolve_seed
from thinkswitch_plugin.data.task_files import task_files
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.loop import begin
from thinkswitch_plugin.run.folder import of_run
from thinkswitch_plugin.run.hashes import Hashes
from thinkswitch_plugin.run.verify import verify

AFTER_PAIRS = {"train", "merge-lora", "rebuild", "eval-instruct", "eval-thinking", "report"}
AFTER_GENERATE = {"pairs", *AFTER_PAIRS}
AFTER_REQUESTS = {"generate", *AFTER_GENERATE}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with copies of everything that a user edits, and a placeholder for the starting pair."""
    for name in ("recipes", "merge_configs", "lm_eval_tasks"):
        shutil.copytree(ROOT / name, tmp_path / name)
    cache = tmp_path / ".cache" / "arithmetic" / "seed-0"
    for mode in run.MODES:
        fake_checkpoint(cache / mode, mode)
    (cache / "prompts.jsonl").write_text('{"id": "p1", "prompt": "1+2"}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(begin, "check_axolotl_keys", lambda recipe: None)
    return tmp_path


def fake_checkpoint(folder: Path, text: str) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "model.safetensors").write_text(text)


def iterate(iterations: int = 1, *, until: str = "", keep: str = "") -> list[tuple[str, int]]:
    """Do what `make iterate` does, with stages that copy from their inputs; return the stages that ran."""
    opened = begin.begin_run("arithmetic", Path("runs"), 0, "embedded", iterations, given=run.Given(keep=keep))
    done: list[tuple[str, int]] = []
    for stage in list(run.stages(opened)):
        if f"{stage.name}-{stage.iteration}" == until:
            break
        run.execute(opened, stage.name, stage.iteration, worker(opened, stage, done))
    return done


def worker(opened: run.Run, stage: run.Stage, done: list[tuple[str, int]]) -> Callable[[], None]:
    def work() -> None:
        done.append((stage.name, stage.iteration))
        read = orjson.dumps(stage.depends_on(Hashes(opened.folder)))
        text = hashlib.sha256(read).hexdigest()
        for output in stage.outputs:
            if output.name == "pair.json":
                pair = opened.recipe.keys.pair
                files.write_json(output, {m: {"path": resolve_seed(getattr(pair, m), 0)} for m in run.MODES})
            elif output.suffix:
                with files.atomic_file(output) as handle:
                    handle.write(text.encode())
            elif output.name in run.MODES and output.parent.name != "eval":
                files.remove(output)
                fake_checkpoint(output, text)
            else:
                with files.atomic_folder(output) as folder:
                    (folder / "result.json").write_text(text)

    return work


def replace(path: str, old: str, new: str) -> Callable[[], None]:
    def change() -> None:
        text = Path(path).read_text()
        assert old in text
        Path(path).write_text(text.replace(old, new, 1))

    return change


RECIPE = "recipes/arithmetic.yaml"


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (replace(".cache/arithmetic/seed-0/prompts.jsonl", "1+2", "2+2"), {"requests", *AFTER_REQUESTS}),
        (replace(RECIPE, "max_tokens: 64", "max_tokens: 65"), {"requests", *AFTER_REQUESTS}),
        (replace(RECIPE, "unfinished: drop", "unfinished: retry"), AFTER_REQUESTS),
        (replace(RECIPE, "selection: first", "selection: all"), AFTER_GENERATE),
        (replace(RECIPE, "learning_rate: 0.001", "learning_rate: 0.002"), AFTER_PAIRS),
        (replace("recipes/cpu.overlay.yaml", "val_set_size: 0", "val_set_size: 0\nlora_alpha: 32"), AFTER_PAIRS),
        (replace(RECIPE, "lambda: 0.9", "lambda: 0.92"), {"rebuild", "eval-thinking", "report"}),
        (
            replace("merge_configs/slerp.yaml", "  t: 0.2", "  t: 0.3"),
            {"rebuild", "eval-thinking", "report"},
        ),
        (
            replace(RECIPE, 'batch_size: "400"', 'batch_size: "200"'),
            {"eval-0", "eval-instruct", "eval-thinking", "report"},
        ),
        (
            replace("lm_eval_tasks/thinkswitch_arithmetic.yaml", "version: 1.0", "version: 1.1"),
            {"eval-0", "requests", *AFTER_REQUESTS},
        ),
        (
            replace("lm_eval_tasks/thinkswitch_tasks.py", "def ", "\ndef "),
            {"eval-0", "requests", *AFTER_REQUESTS},
        ),
        (replace(RECIPE, "kind: digit", "kind: integer"), AFTER_GENERATE),
        (replace(RECIPE, "output_dir: runs", "output_dir: elsewhere"), set()),
        (replace(RECIPE, "# greedy", "# greedily"), set()),
        (replace(RECIPE, "adapter: qlora", "adapter: qlora\nwandb_project: x\nuse_trackio: true"), set()),
        (replace(RECIPE, "  rebuild:", "  engine: {concurrency: 8, timeout: 5}\n  rebuild:"), set()),
    ],
)
def test_a_change_runs_exactly_the_stages_again_that_depend_on_it(
    place: Path, change: Callable[[], None], again: set[str]
) -> None:
    assert len(iterate()) == 12
    change()
    done = {name if k else ("eval-0" if name.startswith("eval") else f"{name}-0") for name, k in iterate()}
    assert done == again
    assert iterate() == []


def test_touching_every_file_runs_nothing_again(place: Path) -> None:
    iterate()
    for path in place.rglob("*"):
        if path.is_file() and ".stamps" not in path.parts:
            os.utime(path)
    assert iterate() == []


def test_a_sweep_made_later_brings_a_new_report_once(place: Path) -> None:
    iterate()
    sweep = Path("runs/arithmetic/iter-1/sweep/sweep.json")
    files.write_json(sweep, {"points": []})
    assert iterate() == [("report", 1)] and iterate() == []
    os.utime(sweep)
    assert iterate() == []
    sweep.unlink()
    assert iterate() == [("report", 1)]


def test_a_file_of_equal_size_copied_with_its_old_time_is_seen(place: Path) -> None:
    iterate()
    prompts = place / ".cache/arithmetic/seed-0/prompts.jsonl"
    times = prompts.stat()
    prompts.write_text(prompts.read_text().replace("1+2", "4+4"))
    os.utime(prompts, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert ("requests", 1) in iterate()


def test_a_report_of_two_configurations_is_refused(place: Path) -> None:
    iterate()
    replace(RECIPE, "learning_rate: 0.001", "learning_rate: 0.002")()
    opened = run.open_run(Path("runs/arithmetic"))
    (opened.folder / ".stamps/report.json").unlink()
    with pytest.raises(ThinkSwitchError, match="train of iteration 1 is not done, or what it depends on has changed"):
        run.execute(opened, "report", 1, lambda: None)


def test_options_that_say_only_how_vllm_uses_the_machine_ask_nothing_again() -> None:
    args = ["--quantization", "fp8", "--gpu-memory-utilization", "0.9", "--max-num-seqs=4", "--enforce-eager"]
    assert EngineKeys(vllm_args=args).answering_options() == ["--quantization", "fp8"]
    args = ["--enforce-eager", "-q", "fp8", "--gpu_memory_utilization", "0.9", "-tp", "2", "--seed", "-1"]
    assert EngineKeys(vllm_args=args).answering_options() == ["-q", "fp8", "--seed", "-1"]
    over_nodes = (
        "-dp 8 -dpl 4 --data-parallel-backend ray --data_parallel_rpc_port=1 --nnodes 2 --node-rank 0 -asc 2 -q fp8"
    )
    assert EngineKeys(vllm_args=over_nodes.split()).answering_options() == ["-q", "fp8"]


def test_what_lies_beside_a_checkpoint_makes_no_other_checkpoint_of_it(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "checkpoint", {"w": torch.zeros(2)})
    before = Hashes(tmp_path).of(checkpoint)
    for name in (".git/index", ".gitattributes", "LICENSE", "README.md", "original/consolidated.pth", "model.gguf"):
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_text("x")
    assert Hashes(tmp_path).of(checkpoint) == before
    for name in ("chat_template.jinja", "tokenizer.json", "merges.txt", "mergekit_config.yml"):
        (checkpoint / name).write_text("x")
        assert Hashes(tmp_path).of(checkpoint) != before
        (checkpoint / name).unlink()
    other = tmp_path / "adapter"  # of any other folder everything counts
    files.write_json(other / "adapter_config.json", {})
    before = Hashes(tmp_path).of(other)
    (other / "adapter_model.bin").touch()
    assert Hashes(tmp_path).of(other) != before


def test_task_files_follow_includes_functions_and_local_data(place: Path) -> None:
    names = {str(path) for path in task_files("thinkswitch_aime_k8")}
    assert {"lm_eval_tasks/thinkswitch_aime_k8.yaml", "lm_eval_tasks/thinkswitch_aime.yaml"} < names
    assert "recipes/template/test.jsonl" in {str(path) for path in task_files("thinkswitch_template")}
    assert "lm_eval_tasks/thinkswitch_tasks.py" in names


def weights(iterations: int) -> list[list[str]]:
    return [
        [mode for mode in run.MODES if Path(f"runs/arithmetic/iter-{k}/{mode}/model.safetensors").is_file()]
        for k in range(1, iterations + 1)
    ]


BOTH = list(run.MODES)


@pytest.mark.parametrize(("keep", "left"), [("all", [BOTH] * 3), ("2", [[], BOTH, BOTH]), ("last", [[], [], BOTH])])
def test_keep_prunes_old_weights_and_nothing_runs_again(place: Path, keep: str, left: list[list[str]]) -> None:
    assert len(iterate(3, keep=keep)) == 28
    assert weights(3) == left
    assert (place / "runs/arithmetic/iter-1/instruct/tokenizer_config.json").is_file()
    assert all((place / f".cache/arithmetic/seed-0/{mode}/model.safetensors").is_file() for mode in run.MODES)
    assert iterate(3, keep=keep) == []
    (place / "runs/arithmetic/.stamps/report.json").unlink()
    assert iterate(3, keep=keep) == [("report", 3)]
    verify(Path("runs/arithmetic"))


def test_a_rehearsal_keeps_weights_only_while_a_stage_reads_them(place: Path) -> None:
    own = Path("runs/arithmetic/own")
    shutil.copytree(".cache/arithmetic/seed-0", own)
    for mode in run.MODES:
        replace(RECIPE, f"{mode}: .cache/arithmetic/seed-{{seed}}/", f"{mode}: {own}/")()
    pair = [own / mode / "model.safetensors" for mode in run.MODES]
    iterate(until="rebuild-1", keep="none")
    assert [path.is_file() for path in pair] == [False, True] and weights(1) == [["instruct"]]
    assert [name for name, _ in iterate(keep="none")] == ["rebuild", "eval-instruct", "eval-thinking", "report"]
    assert not any(path.is_file() for path in pair) and weights(1) == [[]]
    assert iterate(keep="none") == []


def test_pruning_takes_no_pair_that_an_unfinished_iteration_reads(place: Path) -> None:
    iterate(3, until="train-3", keep="last")
    assert weights(2) == [[], BOTH]
    assert [name for name, k in iterate(3, keep="last") if k == 3] == [
        "train",
        "merge-lora",
        "rebuild",
        "eval-instruct",
        "eval-thinking",
        "report",
    ]
    assert weights(3) == [[], [], BOTH]


def test_a_stage_that_needs_a_pruned_checkpoint_says_so_and_how_to_get_it_back(place: Path) -> None:
    iterate(2, keep="last")
    old = {p: p.read_bytes() for p in place.rglob("iter-2/*/model.safetensors")}
    replace(RECIPE, "lambda: 0.9", "lambda: 0.92")()
    with pytest.raises(
        ThinkSwitchError, match=r"iter-1/instruct, whose weights KEEP= has pruned; delete (.*merge-lora\.json)"
    ) as error:
        iterate(2)
    Path(str(error.value).split("delete ")[1].split(" and")[0]).unlink()
    done = iterate(2)
    assert done[0] == ("merge-lora", 1) and ("train", 1) not in done
    assert weights(2) == [BOTH, BOTH] and len(old) == 2


def test_a_kill_between_note_and_deletion_loses_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    iterate(2)
    hashes = Hashes(Path("runs/arithmetic"))
    unlink = Path.unlink

    def killed(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".safetensors":
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "unlink", killed)
        hashes.prune([Path("runs/arithmetic/iter-1/instruct/model.safetensors")])
    assert weights(2) == [BOTH, BOTH]
    assert Hashes(Path("runs/arithmetic")).missing(Path("runs/arithmetic/iter-1/instruct")) == []


@pytest.mark.parametrize("text", ["0", "-1", "newest", "1.5"])
def test_a_policy_that_is_none_is_refused_before_any_work(place: Path, text: str) -> None:
    with pytest.raises(ThinkSwitchError, match=f"KEEP={text} is unknown"):
        iterate(keep=text)
    assert not (place / "runs").exists()


def test_verify_names_every_file_that_does_not_fit(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    iterate()
    verify(Path("runs/arithmetic"))
    assert "12 stages fit their stamps" in capsys.readouterr().out
    here = place / "runs/arithmetic/iter-1"
    model = here / "instruct/model.safetensors"
    times = model.stat()
    model.write_text(model.read_text()[::-1])
    os.utime(model, ns=(times.st_atime_ns, times.st_mtime_ns))
    (here / "thinking/extra.bin").touch()
    (here / "pairs.json").unlink()
    replace(".cache/arithmetic/seed-0/prompts.jsonl", "1+2", "3+3")()
    replace(RECIPE, "learning_rate: 0.001", "learning_rate: 0.002")()
    with pytest.raises(ThinkSwitchError, match="things do not match"):
        verify(Path("runs/arithmetic"))
    found = capsys.readouterr().out
    for line in (
        "iter-1/instruct/model.safetensors: changed since merge-lora of iteration 1 wrote it",
        "iter-1/thinking/extra.bin: not written by rebuild of iteration 1",
        "iter-1/pairs.json: missing, pairs of iteration 1 wrote it",
        "prompts.jsonl: not what requests of iteration 1 read",
        "recipes/arithmetic.yaml: `axolotl` is not what train of iteration 1 was done with",
        "iter-1/instruct: not what rebuild of iteration 1 read",
    ):
        assert line in found
    assert "generations.jsonl" not in found


def test_verify_of_an_unfinished_run_says_what_is_left(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    iterate(until="train-1")
    verify(Path("runs/arithmetic"))
    assert "6 stages fit" in (out := capsys.readouterr().out) and "6 stages are not done yet" in out


def test_a_stamp_says_what_was_written_read_and_by_which_command(place: Path) -> None:
    iterate()
    stamp = files.read_json(Path("runs/arithmetic/iter-1/.stamps/merge-lora.json"))
    wrote = Path("iter-1/instruct/model.safetensors")
    assert stamp["outputs"][str(wrote)] == hashlib.sha256(("runs/arithmetic" / wrote).read_bytes()).hexdigest()
    assert set(stamp["inputs"]) >= {"iter-1/adapter", "iter-1/axolotl.yaml"}
    assert stamp["seed"] == 0 and stamp["command"].split()[0] == "thinkswitch" and stamp["versions"]["python"]


def test_a_run_that_was_moved_or_copied_verifies_and_has_nothing_to_do(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(iterate(2, keep="last")) == 20
    shutil.copytree("runs", "archive/2026")  # with new times and inodes
    shutil.move("runs", "moved")
    for new in (Path("archive/2026"), place / "moved"):
        verify(new / "arithmetic")
        assert "20 stages fit their stamps" in capsys.readouterr().out
        begin.begin_run("arithmetic", new, 0, "embedded", 2)
        assert "Nothing to do" in capsys.readouterr().out
    replace(RECIPE, "learning_rate: 0.001", "learning_rate: 0.002")()
    assert {stage.name for stage in run.forget_stale(run.open_run(new / "arithmetic"))[1]} == {"train"}


def test_a_run_of_an_earlier_version_whose_stamps_hold_longer_paths_has_nothing_to_do(place: Path) -> None:
    iterate(2, keep="last")
    for path in Path("runs").rglob("*.json"):
        if ".stamps" in path.parts:
            path.write_text(path.read_text().replace('"iter-', '"runs/arithmetic/iter-'))
    verify(Path("runs/arithmetic"))
    assert iterate(2, keep="last") == []


def test_damaged_stamps_and_memory_cost_only_their_own_stage(place: Path) -> None:
    iterate()
    folder = Path("runs/arithmetic")
    (folder / "iter-1/.stamps/pairs.json").write_bytes(b'{"stage": "pa')
    (folder / ".stamps/hashes.json").write_bytes(b"\0\0\0")
    assert iterate() == [("pairs", 1)]
    (folder / "run.json").write_bytes(b"")
    with pytest.raises(ThinkSwitchError, match=r"run.json is damaged .* delete it and run `make iterate`"):
        iterate()
    (folder / "run.json").unlink()
    assert iterate() == []


def test_what_a_killed_command_left_is_cleared_but_not_a_training_to_go_on_with(place: Path) -> None:
    iterate(until="train-1")
    opened = run.open_run(Path("runs/arithmetic"))
    here = opened.iteration(1)
    kept = here / ".adapter.partial/checkpoint-16/trainer_state.json"

    def killed() -> None:
        files.write_json(kept, {})
        (here / ".instruct.partial").mkdir()
        (here / ".pairs.jsonl.partial").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.execute(opened, "train", 1, killed)
    assert begin.begin_run("arithmetic", Path("runs"), 0, "embedded", 1)
    assert kept.is_file() and not (here / ".instruct.partial").exists() and not (here / ".pairs.jsonl.partial").exists()
    replace(RECIPE, "learning_rate: 0.001", "learning_rate: 0.002")()
    begin.begin_run("arithmetic", Path("runs"), 0, "embedded", 1)
    assert not (here / ".adapter.partial").exists()


def test_too_little_disk_is_said_before_a_stage_that_writes_a_checkpoint(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    iterate(until="merge-lora-1")
    opened = run.open_run(Path("runs/arithmetic"))
    monkeypatch.setattr(files, "size", lambda path: 8_000_000_000)
    usage = type("usage", (), {"free": 5_000_000_000})
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        ThinkSwitchError,
        match=r"merge-lora of iteration 1 writes about 8\.0 GB into runs/arithmetic, and 5\.0 GB are free",
    ):
        run.execute(opened, "merge-lora", 1, lambda: pytest.fail("work was begun"))


def test_a_runs_own_checkpoints_are_named_by_mode_and_iteration(place: Path) -> None:
    iterate()
    folder = Path("runs/arithmetic")
    named = {
        name: of_run(folder, name, "instruct", 1) for name in ("", "instruct", "thinking", "instruct-0", "org/model")
    }
    assert named == {
        "": "",
        "instruct": "",
        "thinking": "runs/arithmetic/iter-1/thinking",
        "instruct-0": ".cache/arithmetic/seed-0/instruct",
        "org/model": "org/model",
    }
    with pytest.raises(ThinkSwitchError, match="runs/arithmetic has no thinking checkpoint of iteration 2"):
        of_run(folder, "thinking-2", "instruct", 1)
