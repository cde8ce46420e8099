"""The switch of a pair: the curve, the command on the files of a run, and which checkpoint answers which question."""

from __future__ import annotations

import itertools
import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from starlette.testclient import TestClient

from tests import report_run
from tests.conftest import BIN, ROOT
from tests.faulty_server import FaultyServer
from thinkswitch_plugin import files, run
from thinkswitch_plugin.cli import main
from thinkswitch_plugin.demo import task
from thinkswitch_plugin.engines.servers import free_port
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.router import curve
from thinkswitch_plugin.router.answer import answer_file
from thinkswitch_plugin.router.classifier import Router
from thinkswitch_plugin.router.curve import Judged
from thinkswitch_plugin.router.make_switch import KEEP, held_out, make_switch
from thinkswitch_plugin.router.serve import application
from thinkswitch_plugin.router.switch import Switch, served_name

TS = BIN / "thinkswitch"
SMALL = Judged(
    p=np.array([0.9, 0.8, 0.5, 0.5, 0.2, 0.1]),
    score={"instruct": np.array([0, 0, 1, 0, 1, 1.0]), "thinking": np.array([1, 1, 1, 1, 0, 1.0])},
    tokens={"instruct": np.full(6, 2.0), "thinking": np.array([20, 22, 18, 20, 16, 18.0])},
    suffices=np.array([False, False, True, False, True, True]),
)


def drawn(count: int, seed: int = 0, know: float = 1.0) -> Judged:
    """Questions; hard ones have a higher p if the router `know`s something."""
    draw = np.random.default_rng(seed)
    hard = draw.random(count) < 0.3
    score = {"instruct": (~hard).astype(float), "thinking": (draw.random(count) < 0.97).astype(float)}
    p = np.clip(draw.random(count) * 0.5 + know * 0.5 * hard, 0, 0.999)
    tokens = {"instruct": np.full(count, 2.0), "thinking": 18 + 4 * draw.random(count) + 4 * hard}
    return Judged(p, score, tokens, ~hard)


def test_share_accuracy_and_tokens_at_every_threshold() -> None:
    points = curve.curve(SMALL)
    assert [p["threshold"] for p in points] == [1.0, 0.9, 0.8, 0.5, 0.2, 0.1]
    assert [p["share"] for p in points] == pytest.approx([0, 1 / 6, 2 / 6, 4 / 6, 5 / 6, 1])
    assert [p["accuracy"] for p in points] == pytest.approx([3 / 6, 4 / 6, 5 / 6, 1, 5 / 6, 5 / 6])
    assert [p["tokens"] for p in points] == pytest.approx([2, 30 / 6, 50 / 6, 84 / 6, 98 / 6, 114 / 6])


def test_thresholds_0_and_1_are_always_thinking_and_always_instruct() -> None:
    for judged in (SMALL, drawn(50)):
        for threshold, mode in ((0.0, "thinking"), (1.0, "instruct")):
            found = curve.chosen(judged, judged.p >= threshold)
            assert found["accuracy"] == pytest.approx(judged.score[mode].mean())
            assert found["tokens"] == pytest.approx(judged.tokens[mode].mean())
        first, last = curve.curve(judged)[0], curve.curve(judged)[-1]
        assert (first["share"], last["share"]) == (0, 1)
        for point in (first, last):
            assert point["ahead_at_same_share"] == pytest.approx(0) and point["accuracy"] == pytest.approx(point["mix"])


@pytest.mark.parametrize("count", range(7))
def test_the_random_mix_is_what_blind_choices_come_to_on_the_average(count: int) -> None:
    masks = [np.isin(np.arange(6), chosen) for chosen in itertools.combinations(range(6), count)]
    found = [curve.chosen(SMALL, mask) for mask in masks]
    mix = curve.mixed(SMALL, count / 6)
    for name in ("share", "accuracy", "tokens"):
        assert np.mean([f[name] for f in found]) == pytest.approx(mix[name])


def test_ahead_of_the_mix_with_the_same_share_and_with_the_same_tokens() -> None:
    judged = drawn(80)
    for threshold in (0.2, 0.5, 0.8):
        think = judged.p >= threshold
        router = curve.chosen(judged, think)
        line = curve.mixed(judged, router["share"])
        assert curve.ahead(judged, think).mean() == pytest.approx(router["accuracy"] - line["accuracy"])
        at = np.interp(router["tokens"], *([curve.mixed(judged, s)[n] for s in (0, 1)] for n in ("tokens", "accuracy")))
        assert curve.ahead(judged, think, "tokens").mean() == pytest.approx(router["accuracy"] - at)


def test_the_interval_is_that_of_a_bootstrap_of_the_whole_comparison() -> None:
    judged = drawn(400, seed=1)
    think = judged.p >= 0.6
    draw = np.random.default_rng(0)
    for by in ("share", "tokens"):
        low, high = curve.compared(judged, think)[f"ahead_at_same_{by}_ci95"]
        found = []
        for _ in range(3000):
            at = draw.integers(0, 400, 400)
            part = Judged(
                judged.p[at],
                {m: v[at] for m, v in judged.score.items()},
                {m: v[at] for m, v in judged.tokens.items()},
                judged.suffices[at],
            )
            found.append(curve.ahead(part, think[at], by).mean())
        assert [low, high] == pytest.approx(np.percentile(found, [2.5, 97.5]), abs=0.004)


def test_the_average_over_all_shares_is_the_area_between_the_curves() -> None:
    judged = drawn(60, seed=2)
    points = curve.curve(judged)
    between = [p["accuracy"] - p["mix"] for p in points]
    assert curve.area(judged)["ahead"] == pytest.approx(np.trapezoid(between, [p["share"] for p in points]))
    low, high = curve.area(judged)["ci95"]
    assert 0 < low < high


def test_the_oracle_thinks_only_where_instruct_is_wrong() -> None:
    assert curve.oracle(SMALL) == pytest.approx({"share": 0.5, "accuracy": 1.0, "tokens": (3 * 2 + 62) / 6})


def test_the_verdict_follows_its_rule() -> None:
    better = curve.verdict(curve.curve(drawn(150)))
    assert better["worse"] == [] and len(better["better"]) == 1
    assert better["sentence"].startswith("The router is no worse than the random mix with the same share of thinking")
    blind = curve.verdict(curve.curve(drawn(150, know=0)), "tokens")
    assert "cannot be told from the random mix with the same mean tokens anywhere" in blind["sentence"]
    worse = curve.verdict(curve.curve(drawn(150, know=-1)))
    assert worse["better"] == [] and "is worse than the random mix" in worse["sentence"]
    assert worse["lowest"]["ahead"] < -0.05

    def point(share: float, low: float, high: float) -> dict[str, Any]:
        return {"share": share, "ahead_at_same_share": (low + high) / 2, "ahead_at_same_share_band": [low, high]}

    limits = [(0, 0), (-0.1, -0.02), (-0.1, 0.1), (0.02, 0.2), (0.01, 0.3), (-0.1, 0.1), (0.03, 0.05), (0, 0)]
    found = curve.verdict([point(i / 7, low, high) for i, (low, high) in enumerate(limits)])
    assert found["worse"] == [[1 / 7, 1 / 7]] and found["better"] == [[3 / 7, 4 / 7], [6 / 7, 6 / 7]]
    assert found["sentence"] == (
        "The router is worse than the random mix with the same share of thinking at 14 % (outside the 95 % band), "
        "and better between 43 and 57 % and at 86 %. Lowest and highest difference, compared from 0 to 100 % "
        "thinking: -6.0 points at 14 % thinking, +15.5 points at 57 % thinking."
    )
    few = curve.verdict(curve.curve(drawn(39)))
    assert few["better"] == few["worse"] == [] and "too few to tell" in few["sentence"]


def test_the_band_holds_for_all_shares_at_once() -> None:
    """A random router is outside the band at some share in one trial of twenty; separate intervals miss far more often."""
    outside = {"band": 0, "ci95": 0}
    draw = np.random.default_rng(0)
    for _ in range(200):
        gain, order = draw.choice([0.0, 1.0, -1.0], 200, p=[0.6, 0.3, 0.1]), draw.permutation(200)
        values = np.stack([((order < m) - m / 200) * (gain - gain.mean()) for m in range(20, 181, 8)], axis=1)
        means, errors = values.mean(axis=0), values.std(axis=0) / np.sqrt(200)
        outside["band"] += bool(np.any(np.abs(means) > curve.band(values)))
        outside["ci95"] += bool(np.any(np.abs(means) > 1.96 * errors))
    assert outside["band"] <= 20 < outside["ci95"]


def label_rows(count: int) -> list[dict[str, str]]:
    """Labels of chains that no evaluation has: a product needs thinking."""
    texts = task.distinct(random.Random(7), count, exclude=task.distinct(random.Random(0), 60))
    return [{"prompt": text, "label": "pre" if "*" in text else "post"} for text in texts]


@pytest.fixture(scope="module")
def judged_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with drawn answers and a router learnt from a file; no checkpoint has weights."""
    folder = report_run.make_run(tmp_path_factory.mktemp("switch"), questions=60)
    labels = folder / "labels.jsonl"
    labels.write_bytes(b"".join(map(files.dumps_line, label_rows(120))))
    make_switch(run.open_run(folder), 2, labels_file=labels)
    return folder


def test_the_job_writes_what_it_found(judged_run: Path) -> None:
    here = judged_run / "iter-2" / "switch"
    assert {p.name for p in here.iterdir()} == {"router.skops", *(f"switch.{s}" for s in ("json", "md", "png", "svg"))}
    found = files.read_json(here / "switch.json")
    opened = run.open_run(judged_run)
    prompts, samples = held_out(opened, 2)
    assert prompts == task.distinct(random.Random(0), 60)
    p = Router.load(here / "router.skops").p_think(prompts)
    judged = Judged.of(p, samples["instruct"], samples["thinking"])
    evaluation = found["evaluation"]
    assert [e["accuracy"] for e in evaluation["curve"]] == [e["accuracy"] for e in curve.curve(judged)]
    assert evaluation["default"]["share"] == float((p >= found["threshold"]["value"]).mean())
    assert evaluation["oracle"] == curve.oracle(judged)
    assert found["threshold"]["kept"] >= KEEP and found["labels"]["prompts"] == 120
    assert next(iter(evaluation["area_by_router"])) == found["router"]["chosen"]
    # Which answers are right was drawn, so no router can know it.
    assert "cannot be told from" in evaluation["verdict"]["share"]["sentence"]
    text = (here / "switch.md").read_text()
    for part in ("| always instruct |", "| always thinking |", "| oracle |", "| router, default |", "against always"):
        assert part in text


def test_a_router_is_not_judged_by_what_it_has_learnt_from(judged_run: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.jsonl"
    rows = [*label_rows(80), {"prompt": task.distinct(random.Random(0), 60)[3] + " ", "label": "pre"}]
    labels.write_bytes(b"".join(map(files.dumps_line, rows)))
    with pytest.raises(ThinkSwitchError, match=r"1 label prompt\(s\) are questions of the evaluation"):
        make_switch(run.open_run(judged_run), 2, labels_file=labels)


def test_an_iteration_without_evaluation_or_router_names_the_next_command(judged_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ThinkSwitchError, match="make switch DOMAIN=arithmetic ITERATION=1"):
        Switch.open(judged_run, iteration=1)
    with pytest.raises(ThinkSwitchError, match="is not a run folder"):
        Switch.open(tmp_path)
    with pytest.raises(ThinkSwitchError, match=r"Iteration 3 .* run `make iterate` first"):
        make_switch(run.open_run(judged_run), 3)
    copied = tmp_path / "arithmetic"
    shutil.copytree(judged_run, copied)
    shutil.rmtree(copied / "iter-2" / "eval" / "thinking")
    with pytest.raises(ThinkSwitchError, match="run `make iterate`"):
        make_switch(run.open_run(copied), 2, labels_file=judged_run / "labels.jsonl")


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    """Answers `echo: ` and the question, as the one model `m`."""
    with FaultyServer() as started:
        yield started


def test_each_question_goes_to_the_mode_that_the_router_says(judged_run: Path, server: FaultyServer) -> None:
    with FaultyServer() as other:
        switch = Switch.open(judged_run, instruct_url=server.url, thinking_url=other.url + "/")
        questions = ["answer 1+2", "answer 1*2", "answer 3*4-1", "answer 5-2"]
        found = switch.answer_all(questions)
        p = [switch.p_think(question) for question in questions]
        assert [f.p_think for f in found] == p and [f.question for f in found] == questions
        assert [f.mode == "thinking" for f in found] == [value >= switch.threshold for value in p]
        assert {"thinking", "instruct"} == {f.mode for f in found}
        for mode, asked in (("instruct", server.asked), ("thinking", other.asked)):
            assert set(asked) == {f.question for f in found if f.mode == mode}
        assert {f.answer for f in found if f.mode == "instruct"} == {f"echo: {q}" for q in server.asked}
        # The thinking template opens the trace, so an answer without a closing tag is a trace that never ended.
        assert {f.reply.outcome for f in found if f.mode == "thinking" and f.reply} == {"unclosed_trace"}
        assert all(f.tokens == 3 for f in found)


@pytest.mark.parametrize(("threshold", "mode"), [(0.0, "thinking"), (1.0, "instruct")])
def test_a_threshold_of_the_users_own(judged_run: Path, server: FaultyServer, threshold: float, mode: str) -> None:
    url: dict[str, Any] = {f"{mode}_url": server.url}  # the other mode has no weights and must not be asked
    switch = Switch.open(judged_run, threshold=threshold, **url)
    assert {f.mode for f in switch.answer_all(["answer 1*2*3", "answer 1+2+3"])} == {mode}
    with pytest.raises(ThinkSwitchError, match="threshold 2 is not a probability"):
        Switch.open(judged_run, threshold=2.0)


def test_a_server_that_is_down_or_serves_something_else_is_a_sentence(judged_run: Path, server: FaultyServer) -> None:
    nobody = f"http://127.0.0.1:{free_port(0)}/v1"
    with pytest.raises(ThinkSwitchError, match=f"{nobody}: no OpenAI-compatible server answers there"):
        Switch.open(judged_run, url=nobody)
    with pytest.raises(ThinkSwitchError, match=r"serves m; none of these is `instruct` or .*iter-2/instruct\. Start"):
        Switch.open(judged_run, url=server.url)
    with pytest.raises(ThinkSwitchError, match="either one address for both modes, or one of each"):
        Switch.open(judged_run, url=server.url, instruct_url=server.url)
    checkpoints = {"instruct": "m", "thinking": "n"}
    assert served_name(server.url, "instruct", checkpoints, alone=False) == ("m", False)
    with pytest.raises(ThinkSwitchError, match="none of these is `thinking` or n"):  # it is known to be instruct
        served_name(server.url, "thinking", checkpoints, alone=True)
    assert served_name(server.url, "thinking", checkpoints, alone=False, hybrid=True) == ("m", False)


def test_a_question_that_a_server_refuses_is_in_the_output_with_its_reason(
    judged_run: Path, server: FaultyServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    switch = Switch.open(judged_run, threshold=1.0, instruct_url=server.url)
    with pytest.raises(ThinkSwitchError, match=r"gave no answer to this question: .*a 400"):
        switch.answer("status-400:* 1")
    source, out = tmp_path / "questions.jsonl", tmp_path / "out" / "answers.jsonl"
    source.write_text('{"question": "answer 1", "id": 7, "answer": "gold"}\n\n{"prompt": "status-400:* 2"}\n')
    answer_file(switch, str(source), out)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "2 questions: 2 by instruct (3 tokens), 0 by thinking (0 tokens), 1.5 tokens a question; 1 not answered" in (
        printed.err
    )
    first, second = (row for _, row in files.read_jsonl(out))
    assert (first["id"], first["answer"], first["mode"]) == (7, "echo: answer 1", "instruct")
    assert "a 400" in second["error"] and "answer" not in second


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"question": ""}', "line 2: the question is missing"),
        ('{"text": "1+2"}', "line 2: the question is missing"),
        ('{"question": "a<|im_end|>b"}', "line 2: the question holds '<|im_end|>'"),
        ("1+2", "line 2: not valid JSON"),
    ],
)
def test_a_row_that_cannot_be_asked_is_named_before_any_is_asked(
    judged_run: Path, server: FaultyServer, tmp_path: Path, line: str, says: str
) -> None:
    source = tmp_path / "questions.jsonl"
    source.write_text(f'{{"question": "answer 1"}}\n{line}\n')
    switch = Switch.open(judged_run, threshold=1.0, instruct_url=server.url)
    with pytest.raises(ThinkSwitchError, match=re.escape(f"{source}, {says}")):
        answer_file(switch, str(source), tmp_path / "out.jsonl")
    assert not server.asked and not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("extra", [[], ["1+2", "--file", "x"], ["1+2", "--threshold", "1.5"]])
def test_one_question_or_many_but_not_both(judged_run: Path, extra: list[str]) -> None:
    assert CliRunner().invoke(main, ["answer", str(judged_run), *extra]).exit_code == 2


def test_the_switch_works_beside_a_loop_that_is_at_work(judged_run: Path, server: FaultyServer) -> None:
    import asyncio

    async def in_a_notebook() -> str | None:
        return Switch.open(judged_run, threshold=1.0, instruct_url=server.url).answer("answer 1").answer

    assert asyncio.run(in_a_notebook()) == "echo: answer 1"


@pytest.fixture(scope="module")
def switched(own_run: Path, forked: Any) -> Path:
    """A finished run of real checkpoints with its router, by the command."""
    done = forked(TS, "switch", own_run, "1", "--limit", "300")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "instruct: 300 answered, 0 stored before" in done.stdout
    return own_run


@pytest.mark.slow
def test_labels_router_and_curve_of_real_checkpoints(switched: Path, forked: Any) -> None:
    here = switched / "iter-1" / "switch"
    found = files.read_json(here / "switch.json")
    rows = [row for _, row in files.read_jsonl(here / "labels.jsonl")]
    assert len(rows) == 300 and found["labels"]["trained_on"] == 0
    trained = {row["messages"][0]["content"] for _, row in files.read_jsonl(switched / "iter-1" / "pairs.jsonl")}
    assert not trained & {row["prompt"] for row in rows} and not set(task.held_out()) & {row["prompt"] for row in rows}
    assert all((row["label"] == "post") == (row["instruct"] == row["reference"]) for row in rows)
    right = np.mean([row["reference"] == task.answer(row["prompt"]) for row in rows])
    assert right > 0.95  # what the labels assume
    evaluation = found["evaluation"]
    assert evaluation["n"] == 400 and evaluation["verdict"]["share"]["worse"] == []
    assert evaluation["area"]["ci95"][0] > 0, evaluation["verdict"]["share"]["sentence"]

    # A killed command resumes: answered prompts are not asked again, and of more prompts only the new ones are.
    generations = here / "thinking" / "generations.jsonl"
    whole = generations.read_bytes()
    generations.write_bytes(whole[: len(whole) * 2 // 3])
    kept = whole[: len(whole) * 2 // 3].count(b"\n")
    done = forked(TS, "switch", switched, "1", "--limit", "310")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "instruct: 10 answered, 300 stored before" in done.stdout
    assert f"thinking: {310 - kept} answered, {kept} stored before" in done.stdout
    again = [row for _, row in files.read_jsonl(here / "labels.jsonl")]
    assert again[:300] == rows and len(again) == 310


@pytest.mark.slow
def test_one_question_and_many_in_process(switched: Path, command: Any, forked: Any, tmp_path: Path) -> None:
    questions = task.held_out(24)
    switch = Switch.open(switched)
    found = switch.answer_all(questions)
    _, samples = held_out(run.open_run(switched), 1)
    for i, one in enumerate(found):  # the checkpoints answer as in their evaluation
        assert one.answer == samples[one.mode][i].found[0] and one.tokens == samples[one.mode][i].tokens[0]
    assert {one.mode for one in found} == {"instruct", "thinking"}
    with TestClient(application(switch), base_url="http://127.0.0.1") as client:
        for one in found[:6]:  # the endpoint answers the same, its traces included
            reply = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": one.question}]})
            text = reply.json()["choices"][0]["message"]["content"]
            assert reply.headers["X-ThinkSwitch-Mode"] == one.mode and text.endswith(one.answer or "")
    done = forked(TS, "answer", switched, questions[0])
    assert done.returncode == 0, done.stderr
    assert f"  answer: {found[0].answer}" in done.stdout and f"{found[0].mode} (p(think) = " in done.stdout
    source = tmp_path / "questions.jsonl"
    source.write_text("".join(json.dumps({"question": q}) + "\n" for q in questions))
    done = command("sh", "-c", f"{TS} answer {switched} - < {source}")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(r["answer"], r["mode"], r["tokens"]) for r in rows] == [(f.answer, f.mode, f.tokens) for f in found]
    assert done.stderr.strip().startswith("24 questions: ")


@pytest.mark.slow
def test_make_switch_hands_its_settings_on(command: Any, finished_run: Path) -> None:
    done = command("make", "-n", "switch", f"RUNS={finished_run.parent}", "ITERATION=1", "LABELS=mine.jsonl", "LIMIT=9")
    assert done.returncode == 0 and "thinkswitch switch" in done.stdout
    assert (ROOT / "Makefile").read_text().count("\nswitch: setup ## ") == 1
