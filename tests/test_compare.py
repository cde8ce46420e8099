"""`make compare`: how a question passes through Make, how it is asked, and how the answers are shown."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import BIN, ROOT
from tests.faulty_server import FaultyServer
from tests.terminal import run_on_terminal
from tests.test_changes import iterate, place  # noqa: F401
from thinkswitch_plugin import files
from thinkswitch_plugin.args import PromptKeys
from thinkswitch_plugin.console import printable
from thinkswitch_plugin.data import prompts
from thinkswitch_plugin.data.traces import Outcome
from thinkswitch_plugin.demo import task
from thinkswitch_plugin.demo.tokenizer import build_tokenizer
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.judging import compare
from thinkswitch_plugin.recipe import load_recipe
from thinkswitch_plugin.run.checkpoint import Subject

RUN = Path("runs/arithmetic")


@pytest.fixture
def makefile(tmp_path: Path) -> Path:
    """A copy of the Makefile whose `thinkswitch` shows the words and the environment that reach it."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    bin_folder, requirements = tmp_path / ".venv" / "bin", tmp_path / "requirements"
    bin_folder.mkdir(parents=True)
    requirements.mkdir()
    (bin_folder / "thinkswitch").write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\0" "$word"; done; env -0\n')
    (requirements / "install.sh").write_text("#!/bin/sh\n")
    for script in (bin_folder / "thinkswitch", requirements / "install.sh"):
        script.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("by", ["command line", "environment"])
@pytest.mark.parametrize(
    "question",
    [
        "7*3+4*2",
        "What is $5 + $(shell touch mark) + ${HOME} + $$?",
        """It's "quoted" and `touch mark`; touch mark | cat > mark & # not a comment""",
        "two\nlines, a tab\t, a backslash \\ and \\boxed{7}",
        "Wie groß ist λ? 数学 \U0001f9ee",
        "-5+3",
        "%s %d = : ! * ~ ^ ?",
    ],
)
def test_a_question_reaches_the_command_as_it_is(makefile: Path, command: Any, question: str, by: str) -> None:
    words = ["make", "compare", "VENV=.venv"]
    if by == "command line":
        done = command(*words, f"QUESTION={question}", "ITERATION=2", cwd=makefile)
    else:
        done = command(*words, cwd=makefile, QUESTION=question)
    assert done.returncode == 0, done.stderr
    found = done.stdout.split("\0")
    assert f"THINKSWITCH_QUESTION={question}" in found
    assert ("THINKSWITCH_ITERATION=2" if by == "command line" else "THINKSWITCH_ITERATION=") in found
    assert not (makefile / "mark").exists()


def test_no_question_is_a_sentence_that_shows_how(command: Any) -> None:
    done = command(BIN / "thinkswitch", "compare", RUN, "--question=", "--instruct=a", "--thinking=b")
    assert done.returncode == 1 and 'give one: make compare QUESTION="…"' in done.stderr


@pytest.mark.parametrize(
    ("recipe", "text", "empty"),
    [
        ("arithmetic", "1+2", []),
        ("aime", "1+2\n\nPlease reason step by step, and put your final answer within \\boxed{}.", []),
        (
            "pubmedqa",
            "Question: 1+2\n\nPlease reason step by step, and put your final answer (yes, no or maybe) within \\boxed{}.",
            ["context"],
        ),
    ],
)
def test_a_question_is_asked_as_the_domain_asks_its_own(recipe: str, text: str, empty: list[str]) -> None:
    keys = load_recipe(Path(f"recipes/{recipe}.yaml")).keys
    assert prompts.as_asked(keys.prompts, "1+2") == (text, empty)


@pytest.mark.parametrize(
    ("template", "question", "says"),
    [
        ("{{a}} {{b}}", "x", r"has no field for a question \(a, b\); name it prompt or problem or question"),
        ("always the same", "x", "no field for a question"),
        ("{{prompt}}", "a<|im_end|>b", "would end the turn there"),
        ("{{prompt}}", " \n", "there is no question"),
        ("{{prompt}}", "1+\udcff", "not UTF-8 text"),
        ("{{prompt}} {{n + 1}}", "x", "cannot ask a question by itself"),
    ],
)
def test_a_question_that_cannot_be_asked_is_refused(template: str, question: str, says: str) -> None:
    with pytest.raises(ThinkSwitchError, match=says):
        prompts.as_asked(PromptKeys(path="x", template=template), question)  # type: ignore[call-arg]


def test_the_system_turn_is_the_recipes() -> None:
    keys = PromptKeys(path="x", system="Be brief.")  # type: ignore[call-arg]
    assert prompts.messages(keys, "1+2") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+2"},
    ]


@pytest.mark.usefixtures("place")
def test_what_is_not_there_names_the_next_command() -> None:
    with pytest.raises(ThinkSwitchError, match="run `make iterate DOMAIN=arithmetic` first, or give two checkpoints"):
        compare.compare(RUN, "1+2")
    iterate(until="train-1")
    with pytest.raises(ThinkSwitchError, match=r"no finished iteration yet; run `make iterate .* by ITERATION=0"):
        compare.compare(RUN, "1+2")
    with pytest.raises(ThinkSwitchError, match=r"has no checkpoint runs/arithmetic/iter-1/instruct; `make status`"):
        compare.compare(RUN, "1+2", iteration=1)


def test_a_long_trace_is_shortened_and_a_terminal_cannot_be_steered() -> None:
    text = compare.shortened("a" * 600 + "b" * 600)
    assert text == "a" * 500 + " […] " + "b" * 200 and compare.shortened("short") == "short"
    assert printable("\x1b[2J\x1b[31mhow\x07 are\r\n\tyou\x9b λ\u200d\x1b") == "how are\n\tyou λ\u200d"


def test_a_question_longer_than_the_checkpoint_reads_is_refused(tmp_path: Path) -> None:
    build_tokenizer("thinking").save_pretrained(tmp_path)
    files.write_json(tmp_path / "config.json", {"max_position_embeddings": 40})
    keys = load_recipe(Path("recipes/arithmetic.yaml")).keys
    with pytest.raises(
        ThinkSwitchError, match=r"the question has \d+ tokens, and .* reads up to 40; ask a shorter one"
    ):
        compare.ask("thinking", Subject(str(tmp_path)), "1+" * 30 + "1", keys, "embedded", 0, tmp_path)


def test_no_answer_is_said_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    found = compare.Answer("thinking", "x", "hm", None, Outcome.UNCLOSED, 64, 60, 1.5, True)
    compare.show("1+2", [found])
    shown = capsys.readouterr().out
    assert "thinking: 64 tokens, 1.50 s, cut by the token limit" in shown
    assert "(no answer: the trace never ended)" in shown and "trace (60 tokens): hm" in shown


def test_a_server_of_the_users_own_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("recipes", "merge_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    build_tokenizer("instruct").save_pretrained("m")
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "m" / "model.safetensors").touch()
    monkeypatch.setattr(compare.checkpoint, "resolve", lambda name, *_: (Path("m"), None))  # served under its name
    with FaultyServer() as server:
        first, second = compare.compare(
            RUN, "answer 17", instruct="m", thinking="m", engine=server.url, out=Path("out.json")
        )
        assert (first.answer, first.tokens, first.cut) == ("echo: answer 17", 3, False)
        with pytest.raises(ThinkSwitchError, match="leave ENGINE= out to ask it in process"):
            compare.compare(RUN, "status-400:* 17", instruct="m", thinking="m", engine=server.url)
        teacher = tmp_path / "teacher.overlay.yaml"
        files.write_yaml(teacher, {"thinkswitch": {"engine": {"server": {"model": "house/teacher"}}}})
        compare.compare(RUN, "answer 18", instruct="m", thinking="m", engine=server.url, overlays=[str(teacher)])
        assert {body["model"] for body in server.seen} == {"m"}  # the columns' checkpoints, whoever teaches
    assert second.title == "thinking (m)"
    stored = files.read_json(Path("out.json"))
    assert [a["outcome"] for a in stored["answers"]] == ["complete", "complete"]


@pytest.mark.slow
def test_the_embedded_pair_side_by_side(finished_run: Path, make: Any, tmp_path: Path) -> None:
    out = tmp_path / "answers.json"
    words = ["compare", "QUESTION=7*3+4*2", f"RUNS={finished_run.parent}", f"OUT={out}"]
    done = make(*words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not set("\r\x1b") & set(done.stdout)
    titles = ["instruct before (iteration 0)", "instruct after (iteration 1)", "thinking (iteration 1)"]
    stored = files.read_json(out)
    assert [a["title"] for a in stored["answers"]] == titles
    before, after, thinking = stored["answers"]
    assert before["trace"] is None and before["tokens"] == after["tokens"] == 2
    assert thinking["answer"] == task.answer("7*3+4*2") and thinking["tokens"] > thinking["trace_tokens"] > 2
    for answer in stored["answers"]:
        assert f"{answer['title']}: {answer['tokens']} tokens, " in done.stdout
    assert f"  trace ({thinking['trace_tokens']} tokens): {thinking['trace'][:5]}" in done.stdout
    real_make = os.environ.get("MAKE", "make")
    code, shown = run_on_terminal([real_make, *words], COLUMNS="100")
    assert code == 0 and "\x1b[2m" in shown  # the trace is dim
    assert "instruct before" in shown and "7*3+4*2" in shown and "tokens" in shown
