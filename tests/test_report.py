"""The data of the report: grading only once, comparisons in `report.json`, and the contents of the page."""

from __future__ import annotations

import base64
import gzip
import random
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import orjson
import pytest

from tests.report_run import BUDGET, HOSTILE, TASK, make_run, store_answers, write_samples, write_sweep
from thinkswitch_plugin import files
from thinkswitch_plugin.data.traces import split
from thinkswitch_plugin.demo import task
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.judging import figures, paired, samples, verdict
from thinkswitch_plugin.report import page, pictures, tables, write_report
from thinkswitch_plugin.report.build import build_report, evaluations, price_per_hour
from thinkswitch_plugin.report.charts import inline
from thinkswitch_plugin.report.questions import Limits, Prompts, Questions, sent_text, shorten
from thinkswitch_plugin.run import REPORT_FILES, Given, open_run
from thinkswitch_plugin.run.hashes import Hashes


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("made"), questions=130, samples=1)


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("several"), questions=40, samples=4, iterations=1)


def folder_of(run: Path, k: int, mode: str) -> Path:
    return run / f"iter-{k}" / "eval" / mode


def read(run: Path, k: int = 1, mode: str = "thinking", kind: str = "digit") -> list[figures.Sample]:
    return list(samples.graded(folder_of(run, k, mode), TASK, str(run / "pair" / mode), kind)[1])


def one_by_one(run: Path, k: int, mode: str) -> list[figures.Sample]:
    """Graded without batches: each text tokenized by itself."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run / "pair" / mode)
    found = []
    for _, row in files.read_jsonl(samples.newest(folder_of(run, k, mode), "samples_*.jsonl")):
        sample = figures.Sample(row["doc_id"])
        for text in row["resps"][0]:
            length = len(tokenizer.encode(text, add_special_tokens=False))
            tagless = mode == "thinking" and "</think>" not in text
            cut = length >= BUDGET or (tagless and length >= 0.99 * BUDGET)
            done = split(text, opened=mode == "thinking", cut=cut)
            right = verdict.verdict_on("digit", done, row["target"])
            sample.correct.append(right.correct is True)
            sample.found.append(right.answer)
            sample.closed_trace.append(done.closed_trace)
            sample.tokens.append(length if cut else length + 1)
            sample.truncated.append(cut)
        found.append(sample)
    return found


@pytest.mark.parametrize("mode", ["instruct", "thinking"])
def test_verdicts_by_stored_answers_are_those_of_grading_every_text_by_itself(several: Path, mode: str) -> None:
    stored = folder_of(several, 1, mode) / samples.REQUESTS
    expected = one_by_one(several, 1, mode)
    assert read(several, 1, mode) == expected
    hidden = stored.rename(stored.with_suffix(".away"))
    try:
        assert read(several, 1, mode) == expected
    finally:
        hidden.rename(stored)
    assert mode == "instruct" or any(cut for s in expected for cut in s.truncated)


def test_the_engine_says_how_a_completion_ended_and_the_task_how_its_answer_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, questions=20, iterations=1)
    stored = folder_of(run, 1, "thinking") / samples.GENERATIONS
    first, *others = stored.read_bytes().splitlines()
    answer = orjson.loads(first)
    assert read(run)[0].truncated == [False]
    answer["response"]["body"]["choices"][0]["finish_reason"] = "length"
    answer["response"]["body"]["usage"]["completion_tokens"] = 999
    stored.write_bytes(b"\n".join([orjson.dumps(answer), *others]) + b"\n")
    found = read(run, kind="decision")[0]
    assert (found.tokens, found.truncated, found.closed) == ([999], [True], 0), "as the engine said, whatever the text"
    assert found.found == read(run)[0].found, "the task says how its answers are read"
    monkeypatch.setattr(samples, "kind_of_task", lambda task: None)
    with pytest.raises(ThinkSwitchError, match=r"Question 0 .* cannot be graded"):
        read(run, kind="decision")
    monkeypatch.undo()
    stored.write_bytes(b"\n".join(others) + b"\n")
    with pytest.raises(ThinkSwitchError, match=r"generations\.jsonl has no answer q00000-s0, which .*samples_"):
        read(run)


def test_reading_stored_answers_needs_no_tokenizer(made: Path) -> None:
    found = samples.graded(folder_of(made, 1, "instruct"), TASK, "/nonexistent", "digit")[1]
    assert len(list(found)) == 130


def test_an_evaluation_is_read_by_the_convention_that_its_recipe_names(made: Path) -> None:
    keys, folder, model = open_run(made).recipe.keys, folder_of(made, 1, "thinking"), str(made / "pair" / "thinking")
    assert any(sample.closed for sample in samples.samples_of(folder, keys, model))
    named = keys.model_copy(update={"trace": "cohere"})  # set after the evaluation
    assert not any(sample.closed for sample in samples.samples_of(folder, named, model))


def test_every_iteration_is_compared_with_the_one_before_and_with_the_start(made: Path) -> None:
    opened = open_run(made)
    judged = evaluations(opened)
    report = build_report(opened, judged)
    zero, one, two = report["iterations"]
    assert "paired" not in zero
    assert [c["against"] for c in one["paired"]["instruct"]] == [0]
    assert [c["against"] for c in two["paired"]["thinking"]] == [1, 0]
    samples = {(e.iteration, e.mode): e.samples for e in judged}
    found = one["paired"]["instruct"][0]
    assert found == {"against": 0, **paired.compare(samples[0, "instruct"], samples[1, "instruct"])}
    right = {k: {s.doc_id for s in samples[k, "instruct"] if s.correct[0]} for k in (0, 1)}
    assert set(found["won"]) == right[1] - right[0] and set(found["lost"]) == right[0] - right[1]
    assert found["difference"] == pytest.approx(one["instruct"]["mean@k"] - zero["instruct"]["mean@k"])


@pytest.fixture(scope="module")
def written(made: Path) -> Path:
    write_report(open_run(made))
    return made


def blocks_of(page: str) -> list[Any]:
    return [
        question
        for packed in re.findall(r'<script type="text/plain" class="block">([^<]*)</script>', page)
        for question in orjson.loads(gzip.decompress(base64.b64decode(packed)))
    ]


def test_every_file_of_the_report_is_written_and_the_same_again(written: Path) -> None:
    first = {name: (written / name).read_bytes() for name in REPORT_FILES}
    assert first["iterations.png"].startswith(b"\x89PNG") and b"<svg" in first["paired.svg"]
    assert "won and" in first["report.md"].decode() and "within noise" in first["report.md"].decode()
    write_report(open_run(written))
    assert {name: (written / name).read_bytes() for name in REPORT_FILES} == first


def test_finished_controls_are_shown_beside_the_run_until_its_checkpoint_is_made_again_and_dropped_prompts_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path, questions=60, iterations=1)
    run, here = open_run(folder), folder / "controls" / "shuffled"
    write_samples(here / "eval" / "instruct" / "x", task.distinct(random.Random(0), 60), 1, 0, "instruct", 0)
    store_answers(here / "eval" / "instruct", "instruct")
    figures_ = figures.summarize(samples.samples_of(here / "eval" / "instruct", run.recipe.keys, ""))
    beside = Hashes(folder).of(folder / "iter-1" / "instruct")
    about = {"control": "shuffled", "mode": "instruct", "title": "labels <shuffled>", "beside": beside}
    files.write_json(here / "result.json", {**about, **figures_})
    counts = files.read_json(folder / "iter-1" / "pairs.json")
    files.write_json(folder / "iter-1" / "pairs.json", counts | {"disagreed": [f"p{n}" for n in range(7)]})
    write_report(run)
    for name in ("report.md", "report.html"):
        assert "prompts whose samples disagree: 7 (p0, p1, p2, p3, p4, …)" in (folder / name).read_text()
    (found,) = files.read_json(folder / "report.json")["controls"]
    one = files.read_json(folder / "report.json")["iterations"][1]["instruct"]
    assert found["paired"]["difference"] == pytest.approx(figures_["mean@k"] - one["mean@k"])
    assert "| labels <shuffled> | instruct | " in (folder / "report.md").read_text()
    assert "labels &lt;shuffled&gt;" in (folder / "report.html").read_text()
    assert "Controls" in capsys.readouterr().out
    (folder / "iter-1" / "instruct" / "config.json").write_text("{}")
    assert "controls" not in build_report(run, evaluations(run))
    assert "repeat it: make control CONTROL=shuffled" in " ".join(capsys.readouterr().out.split())


def test_every_control_can_be_named_on_the_command_line() -> None:
    from experiments.__main__ import control
    from experiments.controls import NAMES

    (choice,) = (p.type for p in control.params if p.name == "name")
    assert set(choice.choices) == {*NAMES, "losses"}  # the last compares the two losses, and has a module of its own


def test_the_page_holds_every_question_with_what_each_checkpoint_answered(written: Path) -> None:
    questions = blocks_of((written / "report.html").read_text())
    assert len(questions) == 130
    judged = evaluations(open_run(written))
    for n in (0, 57, 129):
        assert questions[n]["prompt"] == orjson.loads(judged[0].path.read_bytes().splitlines()[n])["doc"]["question"]
        for place, e in zip(questions[n]["checkpoints"], judged, strict=True):
            assert place["correct"] == e.samples[n].correct and place["line"] == n + 1
            text = orjson.loads(e.path.read_bytes().splitlines()[n])["resps"][0][0]
            shown = place["texts"][0]
            assert (shown["trace"] is not None) is (e.mode == "thinking")
            assert text.endswith((shown["answer"] or shown["trace"])[-5:])


def test_what_a_model_wrote_stands_nowhere_as_markup(written: Path) -> None:
    page = (written / "report.html").read_text()
    texts = [c["texts"][0] for q in blocks_of(page) for c in q["checkpoints"]]
    shown = "".join((t["trace"] or "") + (t["answer"] or "") for t in texts)
    assert all(text.strip() in shown for text in HOSTILE), "the run holds every hostile text"
    for text in HOSTILE:
        assert text not in page
    assert page.count("<script") == page.count("</script>") == 4  # two blocks, the index, our own


def test_the_page_names_no_address_that_could_be_loaded(written: Path) -> None:
    page = (written / "report.html").read_text()
    markup = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    addresses = re.findall(r"""\b(?:src|srcset|href|action|data|poster)\s*=\s*["']?([^"'\s>]*)""", markup)
    assert addresses and all(address.startswith("#") for address in addresses)
    assert "url(http" not in page and "@import" not in page
    assert "default-src &#39;none&#39;" in page and "style=" not in page


def test_a_name_with_markup_in_it_is_escaped(written: Path) -> None:
    from thinkswitch_plugin.report.page import content

    opened = open_run(written)
    judged = evaluations(opened)
    report = build_report(opened, judged) | {"domain": "<b>x</b>", "engine": '"><script>'}
    from thinkswitch_plugin.report.templates import environment

    page = environment(html=True).get_template("page.html.j2").render(**content(opened, report, judged))
    assert "<b>x</b>" not in page and "&lt;b&gt;x&lt;/b&gt;" in page and '"><script>' not in page


def test_texts_are_shortened_by_the_stated_rule() -> None:
    assert shorten("abc", 3) == "abc"
    text = shorten("a" * 600 + "b" * 600, 100)
    assert text == "a" * 60 + "\n[… 1,100 characters left out …]\n" + "b" * 40
    assert Limits.of(400, 6, 1) == Limits(1, 16_666, 20_000)
    assert Limits.of(30, 6, 64).samples == 64, "a small set shows every sample"
    assert Limits.of(10_000, 6, 8) == Limits(1, 666, 2_000)


def test_the_prompt_is_shown_without_the_marks_of_the_chat_format_where_that_can_be_told(tmp_path: Path) -> None:
    def prompt(template: Any, sent: Any, doc: dict[str, Any]) -> str:
        files.write_json(tmp_path / "results_1.json", {"configs": {"t": {"doc_to_text": template}}})
        return Prompts(tmp_path).of(samples.Row(0, doc, "", [""], sent, {}))

    rendered = "<|im_start|>user\nWhat is 1+2?\n<|im_end|>\n"
    assert prompt("What is {{q}}?\n", rendered, {"q": "1+2"}) == "What is 1+2?"
    assert prompt("{{q.nothing.there}}", rendered, {"q": "1+2"}) == rendered, "a template that fails"
    assert prompt("Something else {{q}}", rendered, {"q": "1+2"}) == rendered, "a template that was not used"
    assert prompt("def text(doc): ...", rendered, {"q": "1+2"}) == rendered
    messages = '[{"role": "system", "content": "Be \\"brief\\"."}, {"role": "user", "content": "1+2"}]'
    assert sent_text([messages]) == 'Be "brief".\n\n1+2'
    assert prompt("{{q}}", [messages], {"q": "1+2"}) == "1+2"


def test_samples_in_another_order_and_missing_questions_are_found_by_their_id(tmp_path: Path) -> None:
    run = make_run(tmp_path, questions=12, iterations=1, answers=False)
    path = samples.newest(folder_of(run, 1, "thinking"), "samples_*.jsonl")
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([b"", *lines[:0:-1]]) + b"\n")  # the first question gone, the rest backwards
    questions = Questions(evaluations(open_run(run)), run)
    found = [q for packed in questions.blocks() for q in orjson.loads(gzip.decompress(base64.b64decode(packed)))]
    assert found[0]["checkpoints"][3] is None and found[0]["checkpoints"][0] is not None
    last = orjson.loads(lines[11])
    assert found[11]["prompt"] == last["doc"]["question"] and found[11]["checkpoints"][3]["line"] == 2
    index = orjson.loads(gzip.decompress(base64.b64decode(questions.index())))
    assert index["checkpoints"][3]["verdict"][0] == "-" and len(index["start"]) == 12


def test_a_chart_inside_the_page_has_no_style_no_foreign_id_and_a_label(made: Path) -> None:
    opened = open_run(made)
    report = build_report(opened, evaluations(opened))
    one = str(inline(pictures.iterations_picture(report, ("score",)), "one", 'a "label" <b>'))
    other = str(inline(pictures.iterations_picture(report, ("score",)), "other", "b"))
    root = ElementTree.fromstring(one)
    assert root.attrib["role"] == "img" and root.attrib["aria-label"] == 'a "label" <b>'
    assert "style" not in one and "#000000" not in one and "currentColor" in one
    ids = {mark: set(re.findall(r' id="([^"]+)"', mark)) for mark in (one, other)}
    assert ids[one] and not ids[one] & ids[other]
    for reference in re.findall(r'(?:url\(|href=")#([^")]+)', one):
        assert reference in ids[one]


def test_a_sweep_is_shown_where_there_is_one(tmp_path: Path) -> None:
    run = make_run(tmp_path, questions=8, iterations=1)
    write_report(open_run(run))
    assert 'id="interpolation"' not in (run / "report.html").read_text()
    write_sweep(run)
    write_report(open_run(run))
    page = (run / "report.html").read_text()
    assert 'id="interpolation"' in page and "λ* =" in page and "iter-1 over λ" in page


def test_a_significant_loss_is_marked_as_one(made: Path, tmp_path: Path) -> None:
    opened = open_run(made)
    report = build_report(opened, evaluations(opened))
    for entry in report["iterations"][1:]:
        for found in entry["paired"]["instruct"]:
            found["won"], found["lost"] = found["lost"], found["won"]
            found["difference"] *= -1
    page.write_page(opened, report, evaluations(opened), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    badges = re.findall(r'<span class="badge (\w*)">([^<]*)</span>', text)
    assert badges[:2] == [("worse", "more than noise"), ("", "within noise")], "instruct and thinking in the summary"
    of_table = [re.findall(r'<span class="badge (\w*)">', row) for row in re.findall(r"<tr>.*?</tr>", text, re.DOTALL)]
    instruct = [found[0] for found, row in zip(of_table, re.findall(r"<tr>.*?</tr>", text, re.DOTALL), strict=True)
                if found and row.startswith('<tr><th scope="row">instruct')]  # fmt: skip
    assert instruct == ["worse", "", "worse"]


def test_the_table_says_what_its_scores_are(made: Path, several: Path) -> None:
    one, four = (build_report(opened, evaluations(opened)) for opened in map(open_run, (made, several)))
    assert "accuracy" in tables.header(one) and "Vote@4" not in tables.header(one)
    assert {"Mean@4", "Pass@4", "Vote@4"} <= set(tables.header(four)) and "accuracy" not in tables.header(four)
    for report in (one, four):
        assert {len(row) for row in tables.rows(report)} == {len(tables.header(report))}
    row = dict(zip(tables.header(four), list(tables.rows(four))[-2], strict=True))
    assert row["Vote@4"] == f"{100 * four['iterations'][-1]['instruct']['vote@k']:.1f} %"
    assert re.search(r"instruct gets \d+\.\d % right \(\d+\.\d % before, ", tables.headline(one))
    assert "instruct has a Mean@4 of " in tables.headline(four)


def test_the_command_that_made_a_run_names_its_overlays(tmp_path: Path) -> None:
    here = make_run(tmp_path / "my runs", questions=6, iterations=1)
    settings = files.read_json(here / "run.json")
    assert page.provenance(open_run(here))["command"] == (
        f"make iterate DOMAIN=arithmetic ITERATIONS=1 SEED=0 ENGINE=embedded RUNS='{here.parent}'"
    )
    overlays = ["recipes/cpu.overlay.yaml", "recipes/24gb.overlay.yaml"]
    files.write_json(here / "run.json", {**settings, "overlays": overlays})
    assert page.provenance(open_run(here))["command"].endswith(f" OVERLAY='{' '.join(overlays)}'")


def test_a_price_gives_money(made: Path) -> None:
    from thinkswitch_plugin.report.page import costs

    opened = open_run(made, Given(price="36"))
    rows = list(costs(build_report(opened, evaluations(opened))))
    assert rows[0][:3] == ["0", "pair", "2.5"] and rows[0][4] == "0.0250"


@pytest.mark.parametrize("text", ["cheap", "nan", "inf", "-1"])
def test_what_is_no_price_is_refused(text: str) -> None:
    with pytest.raises(ThinkSwitchError, match=f"PRICE_PER_HOUR={text} is not a price"):
        price_per_hour(text)


def test_the_wheel_carries_the_pages_parts(tmp_path: Path) -> None:
    import tomllib

    from tests.conftest import ROOT

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "thinkswitch_plugin.report" in settings["packages"]
    patterns = settings["package-data"]["thinkswitch_plugin.report"]
    folder = ROOT / "thinkswitch_plugin" / "report"
    carried = {path.name for pattern in patterns for path in folder.glob(pattern)}
    assert carried == {p.name for p in folder.iterdir() if p.is_file() and p.suffix != ".py"}


@pytest.mark.slow
def test_the_bench_finds_the_same_figures_with_and_without_stored_answers(tmp_path: Path) -> None:
    from experiments.bench_report import measure

    result = measure(30, 2, 1, 100, tmp_path)
    assert result["same figures both ways"] and result["completions"] == 240
    assert result.get("seconds until usable", 1) > 0
