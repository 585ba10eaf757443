"""The documentation site: built strictly, whole, without a request to anybody, and findable."""

import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def test_no_page_asks_anybody_for_anything(site: Path) -> None:
    pages = sorted(site.glob("**/*.html"))
    assert len(pages) > 30
    foreign = re.compile(r"<(?:link|script|img|iframe|source)\b[^>]*(?:src|href)=\"(?:https?:)?//")
    for page in pages:
        assert not foreign.search(page.read_text(encoding="utf-8")), page
    for style in site.glob("**/*.css"):
        assert not re.search(r"url\(['\"]?(?:https?:)?//|@import", style.read_text("utf-8")), style


def test_commands_are_the_programs_own(site: Path) -> None:
    from normlab.cli import cli

    text = (site / "reference" / "commands.html").read_text(encoding="utf-8")
    for verb in cli.commands.values():
        for option in verb.params:
            for word in option.opts:
                if word.startswith("--") and not getattr(option, "hidden", False):
                    assert word in text, (verb.name, word)


def test_python_names_are_all_there(site: Path) -> None:
    import normlab

    text = (site / "reference" / "python.html").read_text(encoding="utf-8")
    for name in normlab.__all__:
        assert f"normlab.{name}<" in text, name


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    spec = spec_from_file_location("build_site", ROOT / "scripts" / "build_site.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "a.md").write_text("x", encoding="utf-8")
    broken: list[str] = []
    text = "[here](a.md#x) [gone](b.md) ![gone](c.png) `[code](d.md)`"
    assert module.mended(text, "page.md", tmp_path, broken).endswith("`[code](d.md)`")
    assert broken == ["page.md: b.md", "page.md: c.png"]


def test_search_works_from_a_folder(site: Path, browser: Any) -> None:
    page = browser.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"file://{site}/search.html?q=recalibrate")
    page.wait_for_selector("ul.search li a", timeout=20_000)
    found = page.locator("ul.search li a").all_text_contents()
    assert any("doctor" in title.lower() or "commands" in title.lower() for title in found), found
    assert all(url.startswith(("file:", "data:", "blob:")) for url in asked)
    page.close()
