"""`thinkswitch judge`: a real server answers as the judge, in both orders; only what wins in both counts as won."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.faulty_server import FaultyServer, completion, shaped
from tests.report_run import make_run
from thinkswitch_plugin import cli, files
from thinkswitch_plugin.data.traces import split
from thinkswitch_plugin.demo import task

PARTS = re.compile(
    r"\[Question\]\n(.*)\n\n\[Answer of assistant A\]\n(.*)\n\n\[Answer of assistant B\]\n(.*)\n\nExpl", re.S
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("judged"), questions=60, iterations=1)


def by_gold(body: dict[str, Any]) -> tuple[int, object]:
    """A judge that knows the answers, and thinks aloud first."""
    question, a, b = PARTS.search(body["messages"][-1]["content"]).groups()  # type: ignore[union-attr]
    right = task.answer(question)
    verdict = "C" if (a == right) == (b == right) else "A" if a == right else "B"
    return 200, completion(f"<think>Maybe [[C]]?</think>\n\nA says {a}. [[{verdict}]]")


def judge(run: Path, server: FaultyServer, *words: str) -> Result:
    return CliRunner().invoke(cli.main, ["judge", str(run), "--judge", "m", "--engine", server.url, *words])


def right(run: Path, k: int) -> dict[str, bool]:
    path = next((run / f"iter-{k}" / "eval" / "thinking").rglob("samples_*.jsonl"))
    rows = (row for _, row in files.read_jsonl(path))
    return {f"q{row['doc_id']:05}": split(row["resps"][0][0], opened=True).answer == row["target"] for row in rows}


def test_a_judge_finds_the_questions_won_and_lost_sees_no_trace_and_is_asked_once(made: Path) -> None:
    before, after = right(made, 0), right(made, 1)
    with FaultyServer(refuse=by_gold) as server:
        done = judge(made, server, "--mode", "thinking")
        assert done.exit_code == 0, done.output
        asked = len(server.seen)
        assert "thinking of iteration 1 against iteration 0, by m: preferred on " in done.output
        assert judge(made, server, "--mode", "thinking").output == done.output and len(server.seen) == asked
    found = files.read_json(made / "iter-1" / "judge" / "thinking" / "judge.json")
    assert found["won"] == [name for name in after if after[name] and not before[name]]
    assert found["lost"] == [name for name in after if before[name] and not after[name]]
    assert found["won"] and found["lost"] and not found["disagree"] and not found["unread"]
    assert not any("=" in body["messages"][-1]["content"].partition("[Question]")[2] for body in server.seen)


def test_a_judge_that_prefers_a_place_wins_nothing_and_one_without_a_verdict_is_counted(made: Path) -> None:
    with FaultyServer(refuse=lambda body: (200, completion("[[A]]"))) as server:
        assert " disagree" in judge(made, server, "--limit", "30").output
    found = files.read_json(made / "iter-1" / "judge" / "instruct" / "judge.json")
    assert not found["won"] and not found["lost"] and found["disagree"] and len(found["tied"]) == 30
    with FaultyServer(refuse=lambda body: (200, completion("Both are fine."))) as server:
        done = judge(made, server, "--limit", "20")
    found = files.read_json(made / "iter-1" / "judge" / "instruct" / "judge.json")
    assert len(found["unread"]) + len(found["tied"]) == 20 and "left out without a verdict" in done.output
    with FaultyServer(refuse=lambda body: (200, shaped("length", content="<think>[[A]] or [[B]]"))) as server:
        judge(made, server, "--limit", "10")
    found = files.read_json(made / "iter-1" / "judge" / "instruct" / "judge.json")
    assert len(found["unread"]) + len(found["tied"]) == 10 and not found["disagree"]


def test_a_judge_that_the_server_does_not_have_is_one_sentence(made: Path) -> None:
    with FaultyServer() as server:
        words = ["judge", str(made), "--judge", "gpt", "--engine", server.url]
        done = CliRunner().invoke(cli.main, words)
    assert done.exit_code == 1 and "gpt" in done.output and len(done.output.splitlines()) == 1
