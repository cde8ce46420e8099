"""Model cards: what the hub reads from them, when scores are added, and that no stage runs again because of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results

from tests.conftest import BIN, ROOT
from tests.test_changes import iterate, place  # noqa: F401
from thinkswitch_plugin import files, run
from thinkswitch_plugin.recipe import load_recipe
from thinkswitch_plugin.report import cards
from thinkswitch_plugin.run.hashes import Hashes
from thinkswitch_plugin.run.verify import verify

FIGURES = {
    "n": 30,
    "k": 8,
    "mean@k": 0.475,
    "pass@k": 0.7,
    "vote@k": 0.5333333,
    "ci95": [0.33, 0.61],
    "tokens": 5120.25,
    "think_ratio": 0.0,
    "truncated": 0.1,
    "answered": 0.9,
}


def of_the_hub(tmp_path: Path, *licences: str) -> run.Run:
    """A run of the AIME recipe whose starting pair came from the hub, with these licences in its cards."""
    opened = run.Run(tmp_path / "runs/aime", load_recipe(Path("recipes/aime.yaml")), 0, "vllm", 2)
    pair = {}
    for mode, licence in zip(run.MODES, licences, strict=True):
        folder = tmp_path / "hub" / mode
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "README.md").write_text(f"---\nlibrary_name: transformers\n{licence}---\n# A parent\n")
        pair[mode] = {"name": f"Qwen/Qwen3-4B-{mode.title()}-2507", "path": str(folder), "revision": "c0ffee"}
    files.write_json(opened.iteration(0) / "pair.json", pair)
    for k in (1, 2):
        files.write_json(opened.iteration(k) / "pairs.jsonl", {})
        for mode in run.MODES:
            (opened.iteration(k) / mode).mkdir()
            (opened.iteration(k) / mode / "config.json").write_text("{}")
    return opened


def write_all(opened: run.Run) -> None:
    for k in (1, 2):
        cards.write_card(opened, k, "instruct", opened.iteration(k) / "instruct")
        merge = f"merge_method: slerp\nbase_model: {opened.anchor(k)}\nparameters:\n  t: 0.2\n"
        cards.write_card(opened, k, "thinking", opened.iteration(k) / "thinking", merge)


def write_report(opened: run.Run) -> None:
    entries: list[dict[str, Any]] = [
        {"iteration": k, **{mode: {**FIGURES, "mean@k": 0.4 + 0.1 * k} for mode in run.MODES}}
        for k in range(opened.iterations + 1)
    ]
    for k, entry in enumerate(entries[1:], 1):
        entry["paired"] = {mode: [{"sentence": f"{mode} {k} against {j}."} for j in {k - 1, 0}] for mode in run.MODES}
    files.write_json(opened.folder / "report.json", {"iterations": entries})


@pytest.fixture
def hub_run(tmp_path: Path) -> run.Run:
    licence = "license: apache-2.0\nlicense_link: https://example.org/LICENSE\n"
    return of_the_hub(tmp_path, licence, licence)


def test_the_hub_reads_parents_relation_data_licence_and_tags(hub_run: run.Run) -> None:
    write_all(hub_run)
    instruct, thinking = (ModelCard.load(hub_run.iteration(2) / mode / "README.md") for mode in run.MODES)
    assert instruct.data.base_model == ["Qwen/Qwen3-4B-Instruct-2507"]
    assert instruct.data["base_model_relation"] == "finetune" and "axolotl" in instruct.data.tags
    assert thinking.data.base_model == ["Qwen/Qwen3-4B-Instruct-2507", "Qwen/Qwen3-4B-Thinking-2507"]
    assert thinking.data["base_model_relation"] == "merge" and {"mergekit", "merge"} <= set(thinking.data.tags)
    for card in (instruct, thinking):
        assert card.data.datasets == ["AI-MO/aimo-validation-aime"]
        assert (card.data.license, card.data.license_link) == ("apache-2.0", "https://example.org/LICENSE")
        assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
        assert "thinkswitch" in card.data.tags and card.data.eval_results is None
        assert "Not evaluated yet." in card.text and "| Seed | 0 |" in card.text
    # Other machines do not have our folders: a parent from the hub is named by its id.
    assert "```yaml\nmerge_method: slerp\nbase_model: Qwen/Qwen3-4B-Thinking-2507\n" in thinking.text
    first = ModelCard.load(hub_run.iteration(1) / "instruct" / "README.md")
    assert "| Parents | `Qwen/Qwen3-4B-Instruct-2507 at c0ffee` (sha256 " in first.text
    assert str(hub_run.iteration(1) / "instruct") in instruct.text


def test_the_scores_come_in_with_the_report_and_survive_the_round_trip(hub_run: run.Run) -> None:
    write_all(hub_run)
    write_report(hub_run)
    cards.complete_cards(hub_run)
    path = hub_run.iteration(1) / "thinking" / "README.md"
    card = ModelCard.load(path)
    task = hub_run.recipe.keys.evaluation.task
    expected = cards.eval_results(task, {**FIGURES, "mean@k": 0.5})
    assert card.data.eval_results is not None
    assert sorted(card.data.eval_results, key=str) == sorted(expected, key=str)
    name, again = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert name == "thinkswitch-aime-thinking-1" and sorted(again, key=str) == sorted(expected, key=str)
    found = {r.metric_name: r for r in again}
    assert found["Mean@8"].metric_value == 0.5 and found["Mean@8"].metric_type == "accuracy"
    assert found["Mean@8"].metric_args == {"k": 8, "questions": 30, "ci95": [0.33, 0.61]}
    assert {"Pass@8", "Vote@8", "Tokens a completion", "Think ratio"} <= found.keys()
    assert found["Mean@8"].dataset_type == "MathArena/aime_2026"
    assert card.data.metrics == ["accuracy"] and card.data["base_model_relation"] == "merge"
    assert "50.0 % right (95 % interval 33.0–61.0) on 30 held-out questions, 8 samples a question" in card.text
    assert "Against the starting pair: thinking 1 against 0." in card.text
    assert "| Mean@8 |" in card.text and "| Vote@8 |" in card.text
    assert "| 1 | thinking | 50.0 % |" in card.text and "| 2 |" not in card.text  # the loop up to this checkpoint
    assert "Not evaluated yet." not in card.text and card.text.count("## Merge") == 1
    text = path.read_text()
    cards.complete_cards(hub_run)
    assert path.read_text() == text  # nothing piles up


def test_parents_of_different_licences_and_of_none_leave_it_open(tmp_path: Path) -> None:
    opened = of_the_hub(tmp_path, "license: apache-2.0\n", "license: mit\n")
    write_all(opened)
    assert ModelCard.load(opened.iteration(2) / "instruct" / "README.md").data.license == "apache-2.0"
    assert ModelCard.load(opened.iteration(2) / "thinking" / "README.md").data.license is None
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "README.md").write_text("---\n: [\n---\n")
    assert cards.licence([tmp_path / "broken"]) == cards.licence([tmp_path / "nowhere"]) == cards.licence([]) == {}


def test_a_licence_that_each_parent_links_to_its_own_copy_of_is_one_licence(tmp_path: Path) -> None:
    for name, extra in (
        ("a", "license: apache-2.0\nlicense_link: https://x/a"),
        ("b", "license: apache-2.0\nlicense_link: https://x/b"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(f"---\n{extra}\n---\n")
    assert cards.licence([tmp_path / "a"]) == {"license": "apache-2.0", "license_link": "https://x/a"}
    assert cards.licence([tmp_path / "a", tmp_path / "b"]) == {"license": "apache-2.0"}
    (tmp_path / "b/README.md").write_text("---\nlicense: other\nlicense_name: mine\n---\n")
    (tmp_path / "a/README.md").write_text("---\nlicense: other\nlicense_name: yours\n---\n")
    assert cards.licence([tmp_path / "a", tmp_path / "b"]) == {}


def test_a_card_that_cannot_be_read_is_left_and_stops_nothing(
    hub_run: run.Run, capsys: pytest.CaptureFixture[str]
) -> None:
    write_all(hub_run)
    write_report(hub_run)
    broken = hub_run.iteration(1) / "instruct" / "README.md"
    broken.write_text("---\n: [\n---\nmine\n")
    (hub_run.iteration(1) / "thinking" / "README.md").unlink()
    cards.complete_cards(hub_run)
    assert broken.read_text().endswith("mine\n") and f"{broken} is left as it is" in capsys.readouterr().out
    assert ModelCard.load(hub_run.iteration(2) / "instruct" / "README.md").data.eval_results


def test_a_pair_of_local_folders_claims_no_parent_of_the_hub(tmp_path: Path) -> None:
    opened = of_the_hub(tmp_path, "", "")
    pair = files.read_json(opened.iteration(0) / "pair.json")
    files.write_json(
        opened.iteration(0) / "pair.json",
        {mode: {**v, "name": f"./{mode}", "revision": None} for mode, v in pair.items()},
    )
    write_all(opened)
    card = ModelCard.load(opened.iteration(1) / "thinking" / "README.md")
    assert card.data.base_model is None and "base_model_relation" not in card.data
    assert str(tmp_path / "hub" / "thinking") in card.text


@pytest.mark.usefixtures("place")
def test_a_card_makes_nothing_run_again() -> None:
    iterate()
    folder = Path("runs/arithmetic")
    before = Hashes(folder).of(folder / "iter-1/thinking")
    for mode in run.MODES:
        (folder / "iter-1" / mode / "README.md").write_text("completed")
    assert Hashes(folder).of(folder / "iter-1/thinking") == before
    assert iterate() == []
    verify(folder)


@pytest.mark.slow
def test_the_cards_of_a_real_run_hold_its_scores(finished_run: Path, command: Any, tmp_path: Path) -> None:
    report = files.read_json(finished_run / "report.json")
    for mode in run.MODES:
        card = ModelCard.load(finished_run / "iter-1" / mode / "README.md")
        assert isinstance(card.data, ModelCardData) and card.data.eval_results
        accuracy = next(r for r in card.data.eval_results if r.metric_type == "accuracy")
        assert accuracy.metric_value == pytest.approx(report["iterations"][1][mode]["mean@k"], abs=1e-6)
        assert "| 1 | instruct |" in card.text and "Not evaluated yet." not in card.text
    assert "merge_method: slerp" in ModelCard.load(finished_run / "iter-1/thinking/README.md").text
    copy = tmp_path / "thinking"
    shutil.copytree(finished_run / "iter-1/thinking", copy)
    (copy / "README.md").unlink()
    assert Hashes(tmp_path).of(copy) == Hashes(tmp_path).of(finished_run / "iter-1/thinking")
    assert command(BIN / "thinkswitch", "verify", finished_run, cwd=ROOT).returncode == 0
