"""`make screenshots RUN_FOLDERS=runs/arithmetic`: `docs/pictures/report-{light,dark,phone}.png` of a run's report."""

from __future__ import annotations

import argparse
from pathlib import Path

from tests import browser

VIEWS = {
    "light": {"viewport": {"width": 1120, "height": 1180}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1120, "height": 1180}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 844}, "color_scheme": "light", "device_scale_factor": 1.5},
}


def main() -> None:
    """Open the page in every view and save what is on the screen; dark shows the questions, one of them open."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a run folder with its report.html")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    options = parser.parse_args()
    page_file = options.run / "report.html"
    if browser.CHROMIUM is None:
        raise SystemExit(f"screenshots: {browser.MISSING}")
    if not page_file.is_file():
        raise SystemExit(f"screenshots: {page_file} does not exist; `make report` writes it.")
    options.out.mkdir(parents=True, exist_ok=True)
    with browser.started() as chromium:
        for name, view in VIEWS.items():
            page = chromium.new_page(**view)
            page.goto(page_file.absolute().as_uri())
            page.wait_for_selector("#list li")
            if name == "dark":
                page.click("a[data-show=won]")
                page.locator("#list > li > details > summary").first.click()
                page.locator(".answers").first.wait_for()
                page.locator(".trace > summary").first.click()
                page.locator("#questions").evaluate("heading => heading.scrollIntoView({behavior: 'instant'})")
            page.screenshot(path=options.out / f"report-{name}.png")
            print(options.out / f"report-{name}.png")


if __name__ == "__main__":
    main()
