"""The report of `normlab inspect` in headless Chromium: mouse, keyboard, phone, dark mode."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from normlab.inspection.recording import read_recording
from normlab.reports.inspection_report import inspect
from recorded import STEPS, write_run

pytestmark = pytest.mark.usefixtures("browser")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    runs = [write_run(folder / norm, norm) for norm in ("batch", "none")]
    inspect(*runs).write(folder / "inspect")
    return folder / "inspect" / "report.html"


@pytest.fixture
def page(browser: Any, report: Path) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text))
    page.on("request", lambda r: None if r.url.startswith("data:") else asked.append(r.url))
    asked: list[str] = []
    page.goto(report.as_uri())
    yield page
    page.close()
    assert problems == []
    assert asked == [report.as_uri()]  # the page itself and nothing else


def shown(page: Any) -> int:
    return int(page.inner_text("#shown").replace(",", ""))


def test_the_keyboard_moves_through_the_steps(page: Any) -> None:
    assert shown(page) == STEPS[0]
    page.focus("#step")
    seen = []
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "End", "Home"):
        page.keyboard.press(key)
        seen.append(shown(page))
    assert seen == [STEPS[1], STEPS[2], STEPS[1], STEPS[-1], STEPS[0]]
    page.keyboard.press("End")
    assert page.get_attribute("#step", "aria-valuetext") == f"after step {STEPS[-1]}"


def test_the_mouse_drags_the_slider(page: Any) -> None:
    box = page.locator("#step").bounding_box()
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 4, y)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, y, steps=4)
    page.mouse.up()
    assert shown(page) == STEPS[len(STEPS) // 2]


def test_pictures_and_numbers_follow_the_step(page: Any, report: Path) -> None:
    svg = page.get_by_role("img", name="norm batch, seed 0, dense3, output")
    first = svg.locator("path.area").get_attribute("d")
    page.focus("#step")
    page.keyboard.press("End")
    assert svg.locator("path.area").get_attribute("d") != first
    recording = read_recording(report.parent.parent / "batch")
    median = recording.arrays["dense3/out/percentiles"][-1, 1]
    assert f"median {float(f'{median:.3g}'):g}" in svg.get_attribute("aria-label")
    loss = recording.arrays["loss"][-1]
    assert f"loss there {float(f'{loss:.3g}'):g}" in page.inner_text("main")
    assert page.locator("main svg").count() == 7 * 2 * 2  # layers, runs, sides


def test_play_runs_to_the_end_and_stops(page: Any) -> None:
    page.click("#play")
    assert page.get_attribute("#play", "aria-pressed") == "true"
    page.wait_for_selector("#play[aria-pressed=false]")
    assert shown(page) == STEPS[-1]


@pytest.mark.parametrize("width", [320, 390, 1200])
def test_nothing_sticks_out_sideways(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_on_a_phone_each_cell_says_its_run_and_pictures_stay_readable(page: Any) -> None:
    """Two runs stand below each other there; a picture is moved sideways within its own frame."""
    who = page.locator(".who").first
    assert not who.is_visible()
    page.set_viewport_size({"width": 390, "height": 800})
    assert who.is_visible()
    assert "norm batch" in who.inner_text()
    drift = page.locator("figure img").nth(3)
    assert drift.bounding_box()["width"] >= 600
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_dark_mode_turns_the_colours(page: Any) -> None:
    def lightness() -> int:
        color = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(int(x) for x in color.removeprefix("rgb(").rstrip(")").split(","))

    light = lightness()
    page.emulate_media(color_scheme="dark")
    assert lightness() < 200 < 600 < light
