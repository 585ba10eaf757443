"""What axe finds on the site's pages, and whether they fit a phone."""

from pathlib import Path
from typing import Any

import pytest

AXE = Path(__file__).parents[2] / "node_modules" / "axe-core" / "axe.min.js"
A_FEW = ("learn/batch-normalisation", "index", "reference/commands", "tutorials/first-hour")
LOOKS = [(width, scheme) for width in (1280, 375) for scheme in ("light", "dark")]


def check(browser: Any, pages: list[Path], width: int, scheme: str) -> None:
    """Nothing serious by axe, and nothing wider than the window."""
    if not AXE.exists():
        pytest.skip("axe-core is not here: npm install --no-save axe-core@4.14.1")
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    wrong = []
    for path in pages:
        page.goto(f"file://{path}")
        page.add_script_tag(path=str(AXE))
        page.wait_for_timeout(300)
        for found in page.evaluate("axe.run().then(r => r.violations)"):
            if found["impact"] in ("serious", "critical"):
                nodes = [node["html"][:120] for node in found["nodes"][:3]]
                wrong.append((path.name, found["id"], found["impact"], nodes))
        wide = page.evaluate("document.documentElement.scrollWidth")
        if wide > width + 1:
            wrong.append((path.name, "as wide as", wide))
    context.close()
    assert wrong == []


@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_a_few_pages_can_be_used_by_everybody(
    site: Path, browser: Any, width: int, scheme: str
) -> None:
    check(browser, [site / f"{name}.html" for name in A_FEW], width, scheme)


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_every_page_can_be_used_by_everybody(
    site: Path, browser: Any, width: int, scheme: str
) -> None:
    """All but the lists and reports of raw results."""
    pages = [p for p in sorted(site.glob("**/*.html")) if p.relative_to(site).parts[0] != "results"]
    assert len(pages) > 30
    check(browser, pages, width, scheme)
