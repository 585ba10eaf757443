"""Photograph the moving pictures of the page on batch normalisation, for readers without scripts.

    make docs && python scripts/learn_stills.py

Opens site/learn/batch-normalisation.html in Chromium and writes docs/learn/still-*.png.
"""

import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "site" / "learn" / "batch-normalisation.html"


def main() -> None:
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1000, "height": 900}, color_scheme="light")
        page.goto(PAGE.as_uri())
        page.evaluate("normlabTwo.begin()")
        page.wait_for_function(
            "Object.values(normlabTwo.known).length === 3"
            " && Object.values(normlabTwo.known).every(k => k.done)",
            timeout=120_000,
        )
        fold = page.locator("#bn-fold input[type=range]")
        fold.evaluate("e => { e.value = 1; e.dispatchEvent(new Event('input')); }")
        page.add_style_tag(
            content="figcaption, .bn .row button { display: none } .bn { border: 0 }"
        )
        for figure in page.locator("figure.bn").all():
            name = figure.get_attribute("id")
            figure.screenshot(path=ROOT / "docs" / "learn" / f"still-{name}.png")
        browser.close()


if __name__ == "__main__":
    main()
