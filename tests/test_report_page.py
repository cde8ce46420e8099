"""`report.html` in real Chromium, from disk: what it shows, its network requests, and what axe finds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import browser
from tests.report_run import GUARD, make_run, write_guard, write_sweep
from thinkswitch_plugin import files
from thinkswitch_plugin.report import write_report
from thinkswitch_plugin.run import open_run

pytestmark = [pytest.mark.slow, pytest.mark.skipif(browser.CHROMIUM is None, reason=browser.MISSING)]
SIZES = {"desk": (1200, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two iterations, 400 questions, a guard task and a sweep, with its report."""
    here = make_run(tmp_path_factory.mktemp("run"), questions=400)
    write_guard(here)
    write_sweep(here)
    write_report(open_run(here))
    return here


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one iteration with four samples a question."""
    here = make_run(tmp_path_factory.mktemp("several"), questions=60, samples=4, iterations=1)
    write_report(open_run(here))
    return here


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser.started() as started:
        yield started


class Opened:
    """A page with all its errors and network requests."""

    def __init__(self, context: Any, path: Path) -> None:
        self.page = context.new_page()
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        context.on("request", lambda request: self.asked.append(request.url))
        self.address = path.absolute().as_uri()
        self.page.goto(self.address)
        self.page.wait_for_selector("#list li")

    def count(self) -> int:
        """The number of questions that the page reports, after it has finished the last request."""
        self.page.locator("#list[aria-busy=false]").wait_for(state="attached")
        return int(self.page.inner_text("#count").split(" of ")[0].replace(",", ""))

    def show(self, **chosen: str) -> int:
        """Set filters by their ids (`show`, `checkpoint`, `against`, `search`); the count afterwards."""
        for name, value in chosen.items():
            if name == "search":
                self.page.fill("#search", value)
            else:
                self.page.select_option(f"#{name}", label=value)
        return self.count()

    def open(self, doc_id: int) -> Any:
        """Search for one question, open it, return its element."""
        self.show(search=f"#{doc_id}")
        item = self.page.locator(f'#list > li[data-id="{doc_id}"]')
        item.locator("details > summary").first.click()
        item.locator(".answers").first.wait_for()
        return item


@pytest.fixture
def opened(chromium: Any, run: Path) -> Iterator[Opened]:
    context = chromium.new_context(viewport={"width": 1200, "height": 900}, offline=True)
    page = Opened(context, run / "report.html")
    yield page
    assert page.complaints == []
    assert page.asked == [page.address]
    context.close()


def test_what_else_changed_stands_in_a_table_that_the_contents_lead_to(opened: Opened) -> None:
    opened.page.click('nav.contents a[href="#guard"]')
    section = opened.page.locator('section[aria-labelledby="guard"]')
    assert "instruct on thinkswitch_arithmetic_two -" in section.locator("p").first.inner_text()
    rows = section.locator("tbody tr").all_inner_texts()
    assert len(rows) == 4 and all(row.startswith(GUARD) for row in rows)
    assert "more than noise" in next(row for row in rows if "instruct\t2" in row)


def test_no_error_and_no_request_whatever_is_clicked(opened: Opened) -> None:
    for index in range(5):
        opened.page.locator("#list > li > details > summary").nth(index).click()
    opened.page.locator(".answers").first.wait_for()
    for summary in opened.page.locator("details:not([open]) > summary").all()[:40]:
        if summary.is_visible():
            summary.click()
    opened.page.select_option("#theme", "dark")
    opened.page.click("#next")
    assert opened.page.evaluate("window.hacked") is None


def test_charts_are_drawn(opened: Opened) -> None:
    charts = opened.page.locator("svg.chart")
    assert charts.count() == 7  # score, tokens, think ratio, won and lost, the sweep, time, loss
    for chart in charts.all():
        box = chart.bounding_box()
        assert box["width"] > 200 and box["height"] > 60
        assert chart.get_attribute("role") == "img" and len(chart.get_attribute("aria-label")) > 20
        sizes = chart.locator("path").evaluate_all("paths => paths.map(p => p.getBoundingClientRect().width)")
        assert max(sizes) > 20, "lines or bars have a length"


def test_words_of_a_chart_do_not_run_into_each_other(opened: Opened) -> None:
    lost, won = (
        opened.page.locator("svg.chart text", has_text=words).first.bounding_box()
        for words in ("questions lost", "questions won")
    )
    assert lost["x"] + lost["width"] + 2 < won["x"]


def test_a_text_written_from_right_to_left_turns_nothing_else_around(opened: Opened) -> None:
    opened.show(search="right to left")
    opened.page.locator("#list > li > details > summary").first.click()
    opened.page.locator(".answers").first.wait_for()
    isolated = "e => ['isolate', 'plaintext'].includes(getComputedStyle(e).unicodeBidi)"
    for place in (".start bdi", ".gold bdi", ".answer bdi", "pre.prompt", "pre.given", ".trace pre", ".target"):
        every = opened.page.locator(f"#list {place}").all()
        assert every and all(element.evaluate(isolated) for element in every), place


def test_ink_follows_the_theme(opened: Opened) -> None:
    def colours() -> tuple[str, str]:
        look = "e => getComputedStyle(e).fill"
        text = opened.page.locator("svg.chart text").first.evaluate(look)
        return text, opened.page.locator("body").evaluate("e => getComputedStyle(e).backgroundColor")

    opened.page.select_option("#theme", "light")
    light = colours()
    opened.page.select_option("#theme", "dark")
    dark = colours()
    assert light[0] != dark[0] and light[1] == "rgb(255, 255, 255)" and dark[1] != light[1]


def test_a_run_with_a_sweep_shows_its_picture(opened: Opened) -> None:
    sweep = opened.page.locator("article.sweep")
    assert sweep.count() == 1 and sweep.locator("svg.chart").bounding_box()["height"] > 300
    assert "λ* =" in sweep.inner_text() and sweep.locator("tbody tr").count() == 6


def test_filters_show_what_the_report_counts(opened: Opened, run: Path) -> None:
    report = files.read_json(run / "report.json")
    found = report["iterations"][1]["paired"]["instruct"][0]
    assert opened.count() == 400
    chosen = {"checkpoint": "instruct, iteration 1", "against": "iteration 0"}
    assert opened.show(**chosen, show="won") == len(found["won"])
    assert opened.page.locator("#list > li").first.get_attribute("data-id") == str(found["won"][0])
    assert opened.show(show="lost") == len(found["lost"])
    right = round(400 * report["iterations"][1]["instruct"]["mean@k"])
    assert opened.show(show="right") == right
    assert opened.show(show="wrong") == 400 - right
    cut = round(400 * report["iterations"][2]["thinking"]["truncated"])
    assert opened.show(checkpoint="thinking, iteration 2", show="truncated") == cut > 0
    unread = round(400 * (1 - report["iterations"][2]["thinking"]["answered"]))
    assert opened.show(show="without a readable answer") == unread
    opened.page.click("button[type=reset]")
    assert opened.count() == 400
    assert opened.page.locator("#count").get_attribute("aria-live") == "polite"


def test_the_numbers_of_the_comparison_lead_to_their_questions(opened: Opened, run: Path) -> None:
    report = files.read_json(run / "report.json")
    lost = report["iterations"][2]["paired"]["thinking"][1]["lost"]
    opened.page.click('a[data-show=lost][data-mode=thinking][data-iteration="2"][data-against="0"]')
    assert opened.count() == len(lost)
    assert "lost by thinking, iteration 2 against iteration 0" in opened.page.inner_text("#count")


def test_search_finds_questions_and_what_stands_only_in_traces(opened: Opened) -> None:
    question = opened.page.locator("#list > li .start").first.inner_text().split(" = ")[0]
    assert opened.show(search=question) >= 1
    hits = opened.show(search="right to left")
    assert 0 < hits < 100
    item = opened.page.locator("#list > li").first
    item.locator("details > summary").first.click()
    item.locator(".answers").first.wait_for()
    assert (
        "right to left"
        in item.locator(".answers").all_text_contents()[0] + item.locator(".answers").nth(1).text_content()
    )
    assert opened.show(search="no such text anywhere") == 0
    assert opened.show(search="#399") == 1


def test_a_question_opens_with_trace_folded_answer_gold_verdict_and_place(opened: Opened, run: Path) -> None:
    item = opened.open(7)
    text = item.inner_text()
    assert "Right answer:" in text and "Iteration 0" in text and "Iteration 2" in text
    assert item.locator(".answer").count() == 6  # before and after, both modes
    trace = item.locator(".trace").first
    assert not trace.locator("pre").is_visible()
    trace.locator("summary").click()
    assert "=" in trace.locator("pre").inner_text()
    assert not item.locator(".source").first.is_visible()
    item.locator(".place > summary").first.click()
    source = item.locator(".source").first.inner_text()
    name, line = source.rsplit(", line ", 1)
    row = (run / name).read_text().split("\n")[int(line) - 1]
    assert row.startswith('{"doc_id":7,')
    assert item.locator(".answer").first.locator(".right, .wrong").count() == 1


def test_hostile_texts_are_shown_as_text(opened: Opened) -> None:
    for text in ("</script><script>", "<img src=", "<!-- </pre>"):
        assert opened.show(search=text) > 0
        opened.page.locator("#list > li > details > summary").first.click()
        opened.page.locator(".answers").first.wait_for()
    assert opened.page.evaluate("window.hacked") is None
    assert opened.page.locator("#list img").count() == 0


def test_four_hundred_questions_are_paged_and_every_one_can_be_reached(opened: Opened) -> None:
    seen: list[str] = []
    for _ in range(8):
        seen += opened.page.locator("#list > li").evaluate_all("items => items.map(i => i.dataset.id)")
        if opened.page.is_enabled("#next"):
            opened.page.click("#next")
    assert [int(n) for n in seen] == list(range(400))
    assert opened.page.inner_text("#page") == "Page 8 of 8" and opened.page.is_disabled("#next")


def test_everything_is_reached_by_keyboard(opened: Opened) -> None:
    opened.page.keyboard.press("Tab")
    assert opened.page.evaluate("document.activeElement.className") == "skip"
    assert opened.page.locator(".skip").bounding_box()["x"] >= 0, "the skip link shows itself when it is reached"
    opened.page.keyboard.press("Enter")
    reached: list[str] = []
    for _ in range(60):
        opened.page.keyboard.press("Tab")
        reached.append(opened.page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        outline = opened.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", f"{reached[-1]} shows no focus"
        if reached[-1] == "SUMMARY":
            break
    assert reached.index("search") < reached.index("checkpoint") < reached.index("show") < reached.index("SUMMARY")
    opened.page.keyboard.press("Enter")
    opened.page.locator(".answers").first.wait_for()


def test_headings_and_landmarks_are_in_order(opened: Opened) -> None:
    levels = opened.page.locator("h1, h2, h3, h4").evaluate_all("all => all.map(h => Number(h.tagName[1]))")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    for landmark in ("header", "nav", "main", "footer"):
        assert opened.page.locator(landmark).count() >= 1
    assert opened.page.locator("table:not(:has(caption))").count() == 0
    assert opened.page.locator("thead th:not([scope=col]), tbody th:not([scope=row])").count() == 0


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(chromium: Any, run: Path, several: Path, scheme: str, size: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    width, height = SIZES[size]
    for here in (run, several):
        context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        shown = Opened(context, here / "report.html")
        shown.page.locator("#list > li > details > summary").first.click()
        shown.page.locator(".answers").first.wait_for()
        shown.page.locator("section > details > summary").first.click()
        found = Axe().run(shown.page)
        serious = [
            (v["id"], v["impact"], [node["html"][:200] for node in v["nodes"][:3]])
            for v in found.response["violations"]
            if v["impact"] in ("serious", "critical")
        ]
        assert serious == []
        assert len(found.response["passes"]) > 20, "axe has looked"
        assert shown.page.evaluate("document.documentElement.scrollWidth") <= width, "nothing is wider than the screen"
        hidden = "rows => rows.filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.getAttribute('aria-label'))"
        assert size == "desk" or shown.page.locator(".scroll").evaluate_all(hidden) == [], "no column is off the screen"
        assert shown.page.locator("td:not([data-label])").count() == 0
        assert shown.complaints == []
        context.close()


def test_several_samples_show_their_counts_and_every_verdict(chromium: Any, several: Path) -> None:
    context = chromium.new_context(offline=True)
    shown = Opened(context, several / "report.html")
    assert "/4" in shown.page.locator("#list .marks").first.inner_text()
    item = shown.open(3)
    assert item.locator(".samples").first.locator("li").count() == 4
    assert item.locator(".answer").nth(3).locator(".trace").count() == 4
    report = files.read_json(several / "report.json")
    vote = round(60 * report["iterations"][1]["instruct"]["vote@k"])
    assert shown.show(search="", show="right") == vote
    assert shown.complaints == [] and shown.asked == [shown.address]
    context.close()


def test_the_page_can_be_printed_and_read_without_javascript(chromium: Any, run: Path) -> None:
    context = chromium.new_context(java_script_enabled=False, color_scheme="dark")
    page = context.new_page()
    page.goto((run / "report.html").absolute().as_uri())
    assert page.locator("svg.chart").first.is_visible() and "needs JavaScript" in page.inner_text("#main")
    assert page.locator("#filters").is_hidden()
    page.emulate_media(media="print", color_scheme="dark")
    assert page.locator("body").evaluate("e => getComputedStyle(e).backgroundColor") == "rgb(255, 255, 255)"
    assert page.pdf()[:5] == b"%PDF-"
    context.close()
