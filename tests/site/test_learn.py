"""The page on batch normalisation: its figures are the raw ones, its network is PyTorch's."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGE = DOCS / "learn" / "batch-normalisation.md"
RAW = re.compile(r"\[([^\]]+)\]\(\.\./results/([^\s)]+) \"([^\"]+)\"\)")
LEVEL = re.compile(r"([\d.]+) % interval\s+\[[^\]]+\]\(\.\./results/(\S+) \"([^\"]+)\.interval\.0")
WIDGETS = ("computes", "two", "training", "shift", "smooth", "scale", "fold", "pairs")


def value(document: Any, path: str) -> float:
    """What stands at `a.0.b*100` of a JSON document; `@x,y` finds a comparison by its arms.

    Lines of JSON are a list of their rows.
    """
    path, _, times = path.partition("*")
    for step in path.split("."):
        if step.startswith("@"):
            first, other = step[1:].split(",")
            document = next(c for c in document if (c["first"], c["other"]) == (first, other))
        else:
            document = document[int(step)] if isinstance(document, list) else document[step]
    return float(document) * float(times or 1)


def test_every_quoted_figure_is_the_raw_one() -> None:
    found = RAW.findall(PAGE.read_text(encoding="utf-8"))
    assert len(found) > 30
    for text, file, how in found:
        path, _, form = how.partition(":")
        text_of = (DOCS / "results" / file).read_text(encoding="utf-8")
        rows = file.endswith(".jsonl")
        raw = [*map(json.loads, text_of.splitlines())] if rows else json.loads(text_of)
        assert format(value(raw, path), form) == text.replace("−", "-"), (file, how)


def test_every_interval_has_the_level_of_its_study() -> None:
    found = LEVEL.findall(PAGE.read_text(encoding="utf-8"))
    assert len(found) >= 4
    for text, file, comparison in found:
        raw = json.loads((DOCS / "results" / file).read_text(encoding="utf-8"))
        assert f"{100 * (1 - value(raw, f'{comparison}.level')):.3g}" == text, (file, comparison)


def test_what_the_page_ships_is_small() -> None:
    shipped = [p for p in (DOCS / "learn").iterdir() if p.suffix != ".md"]
    assert sum(p.stat().st_size for p in shipped) < 3_000_000


@pytest.fixture(scope="module")
def page(site: Path, browser: Any) -> Iterator[Any]:
    """The page, opened from its folder at a laptop's width."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    failures: list[str] = []
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.on("console", lambda m: failures.append(m.text) if m.type == "error" else None)
    page.goto(f"file://{site}/learn/batch-normalisation.html")
    page.wait_for_function("document.querySelectorAll('figure.bn > :first-child:not(img)').length")
    yield page
    assert failures == []
    page.close()


def test_every_picture_can_be_moved(page: Any) -> None:
    for name in WIDGETS:
        assert page.locator(f"#bn-{name} img.still").count() == 0, name
        assert page.locator(f"#bn-{name} [role=slider], #bn-{name} input[type=range]").count(), name


def test_moving_one_picture_moves_the_outputs_of_all_others(page: Any) -> None:
    figure = page.locator("#bn-computes")
    before = figure.locator(".formula li").all_text_contents()
    circles = (
        "[...document.querySelectorAll('#bn-computes svg > circle')].map(c => c.getAttribute('cx'))"
    )
    outputs = page.evaluate(circles)
    row = figure.locator("[role=slider]").nth(3)
    row.focus()
    for _ in range(10):
        row.press("ArrowRight")
    after = figure.locator(".formula li").all_text_contents()
    assert all(a != b for a, b in zip(before, after, strict=True))
    moved = [a != b for a, b in zip(outputs, page.evaluate(circles), strict=True)]
    assert sum(moved) > 300
    assert "seven others" in figure.locator(".say").inner_text()
    # Evaluation: the others stand still.
    figure.get_by_label("stored (evaluation)").check()
    outputs = page.evaluate(circles)
    row.press("ArrowRight")
    moved = [a != b for a, b in zip(outputs, page.evaluate(circles), strict=True)]
    assert 30 <= sum(moved) <= 41
    figure.get_by_text("Start again").click()


def test_rows_and_the_bias_can_be_dragged(page: Any) -> None:
    def drag(what: Any, by: float) -> None:
        what.scroll_into_view_if_needed()
        box = what.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(x, y)
        page.mouse.down()
        page.mouse.move(x + by, y, steps=5)
        page.mouse.up()

    row = page.locator("#bn-computes [role=slider]").nth(2)
    drag(row, 40)
    assert int(row.get_attribute("aria-valuenow")) > 3
    page.locator("#bn-computes").get_by_text("Start again").click()
    slider = page.locator("#bn-fold input[type=range]")
    slider.evaluate("e => { e.value = 0; e.dispatchEvent(new Event('input')); }")
    drag(page.locator("#bn-fold .drag"), 200)
    assert 0.1 < float(slider.input_value()) < 1


def test_a_drag_takes_less_than_a_frame(page: Any) -> None:
    """The work of one event, layout included; the median, since the machine has other work."""
    took = page.evaluate(
        """() => {
          const took = {};
          for (const figure of document.querySelectorAll('figure.bn')) {
            if (figure.id === 'bn-two') continue;  // its worker has its own time
            const input = figure.querySelector('input[type=range]');
            const all = [];
            for (let k = 0; k < 15; k++) {
              const span = input.max - input.min;
              input.value = +input.min + span * (k % 7) / 7;
              const began = performance.now();
              input.dispatchEvent(new Event('input'));
              figure.getBoundingClientRect();
              all.push(performance.now() - began);
            }
            took[figure.id] = all.sort((a, b) => a - b)[7];
          }
          return took;
        }"""
    )
    assert len(took) == len(WIDGETS) - 1
    assert max(took.values()) <= 16, took


def test_the_forward_pass_is_pytorchs(page: Any) -> None:
    """Logits of the first 20 pictures within 1e-6 of PyTorch's in float64, and the same scores."""
    raw = json.loads((DOCS / "results" / "learn" / "page.json").read_text(encoding="utf-8"))
    page.evaluate("normlabTwo.begin()")
    figure = page.locator("#bn-two")
    size = figure.locator("input[type=range]")

    def choose(which: str, content: str, count: int) -> None:
        page.evaluate(f"document.querySelector('#bn-two input[value={which}]').click()")
        page.evaluate(f"document.querySelector('#bn-two input[value={content}]').click()")
        at = (1, 2, 4, 8, 16, 32, 64, 200).index(count)
        size.evaluate("(e, v) => { e.value = v; e.dispatchEvent(new Event('input')); }", at)

    def logits(key: str) -> tuple[list[float], int]:
        page.wait_for_function(f"(normlabTwo.known['{key}'] || {{}}).done", timeout=120_000)
        return page.evaluate(
            f"[[...normlabTwo.known['{key}'].logits.slice(0, 200)], "
            f"normlabTwo.known['{key}'].right.reduce((a, b) => a + b)]"
        )

    for which in ("end", "early"):
        theirs = raw[which]
        cases = [("batch mixed 32", "mixed", 32), ("batch class 16", "class", 16)]
        for key, content, count in (*cases, ("running", "mixed", 32), ("population", "mixed", 32)):
            choose(which, content, count)
            mine, right = logits(f"{which} {key}")
            flat = [v for row in theirs["logits"][key] for v in row]
            assert mine == pytest.approx(flat, abs=1e-6), (which, key)
            assert right == theirs["right"][key], (which, key)
    choose("end", "mixed", 1)
    mine, right = logits("end batch mixed 1")
    assert mine == pytest.approx(mine[:10] * 20, abs=1e-9)  # one answer for every picture
    assert right == 20


def test_answers_of_a_dropped_job_do_not_end_its_successor(page: Any) -> None:
    """Batches of 64 asked twice, the second time when the first is computed but not yet told."""
    left = page.evaluate(
        """async () => {
          normlabTwo.begin();
          const size = document.querySelector('#bn-two input[type=range]');
          const move = (v) => { size.value = v; size.dispatchEvent(new Event('input')); };
          const task = () => new Promise((go) => setTimeout(go));
          document.querySelector('#bn-two input[value=early]').click();
          document.querySelector('#bn-two input[value=class]').click();
          const found = () => normlabTwo.known['early batch class 8'];
          move(3);
          while (!found().right.some((r) => r >= 0)) await task();
          const first = found(), began = performance.now();
          while (performance.now() - began < 3000);  // this page listens to no answer
          move(3);
          if (first.done || found() === first) return 'the first job had ended';
          while (!found().done) await task();
          return found().right.filter((r) => r < 0).length;
        }"""
    )
    assert left == 0


def test_the_border_is_wrong_until_the_bias_map_is_used(page: Any) -> None:
    figure = page.locator("#bn-fold")
    slider = figure.locator("input[type=range]")
    slider.evaluate("e => { e.value = 1; e.dispatchEvent(new Event('input')); }")
    text = figure.locator(".say").last.inner_text()
    assert "Inside: largest difference 0" in text
    assert float(re.findall(r"At the border: ([\d.]+)", text)[0]) > 0.01
    figure.get_by_label("with the bias map").check()
    assert "largest difference 0 everywhere" in figure.locator(".say").last.inner_text()


def test_pairs_below_six_decide_nothing(page: Any) -> None:
    figure = page.locator("#bn-pairs")
    slider = figure.locator("input[type=range]")
    slider.evaluate("e => { e.value = 5; e.dispatchEvent(new Event('input')); }")
    assert "nothing can be decided" in figure.locator(".say").inner_text()
    slider.evaluate("e => { e.value = 6; e.dispatchEvent(new Event('input')); }")
    assert "p = 0.031" in figure.locator(".say").inner_text()  # as docs/results has it


def test_without_scripts_there_are_pictures_and_the_same_text(site: Path, browser: Any) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"file://{site}/learn/batch-normalisation.html")
    stills = page.locator("figure.bn img.still")
    assert stills.count() == len(WIDGETS)
    for n in range(len(WIDGETS)):
        box = stills.nth(n).bounding_box()
        assert box is not None
        assert box["height"] > 60
    assert page.locator(".question details").count() == 15
    context.close()
