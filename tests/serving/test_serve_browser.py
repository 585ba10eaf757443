"""The page of `normlab serve` in headless Chromium: every way to give a picture, every reader."""

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from PIL import Image

import normlab
from normlab.data import load
from normlab.interchange import export_run
from servers import Server, running

pytestmark = pytest.mark.usefixtures("browser")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    run = normlab.train("fast79", out=folder / "run", data="sample", epochs=1, threads=1)
    return export_run(run, folder / "model.onnx").path


@pytest.fixture(scope="module")
def server(exported: Path) -> Iterator[Server]:
    with running(str(exported), limits={"file_bytes": 100_000}) as server:
        yield server


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": 1100, "height": 900})
    problems: list[str] = []
    asked: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text))
    page.on("request", lambda r: asked.append(r.url))
    page.goto(server.url)
    page.wait_for_selector("#samples button:nth-child(10)")
    yield page
    page.close()
    # Refused pictures and a server that has gone are noted there, too.
    assert [text for text in problems if not text.startswith("Failed to load resource")] == []
    other = [url for url in asked if not url.startswith((server.url, "data:", "blob:"))]
    assert other == []


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two pictures, one of another shape than the network's, and a file that is none."""
    folder = tmp_path_factory.mktemp("pictures")
    x = load("sample").x_test
    Image.fromarray(x[0]).save(folder / "small.png")
    Image.fromarray(x[1]).resize((300, 200)).save(folder / "large <b>.jpg")
    (folder / "words.png").write_text("no picture")
    return [folder / name for name in ("small.png", "large <b>.jpg", "words.png")]


def answered(page: Any, count: int) -> list[Any]:
    """The cards, newest first, once each of `count` has its answer."""
    page.wait_for_selector(f"#results > li:nth-child({count})")
    page.wait_for_selector(".waiting", state="detached")
    return list(page.locator("#results > li").all())


def expected(server: Server, content: bytes) -> list[tuple[str, float]]:
    (answer,) = server.post(content).json()["results"]
    return [(p["class"], p["probability"]) for p in answer["predictions"]]


def test_chosen_pictures_get_bars(page: Any, server: Server, pictures: list[Path]) -> None:
    page.set_input_files("#files", pictures[:2])
    cards = answered(page, 2)
    for card, path in zip(cards, pictures, strict=False):
        ranked = expected(server, path.read_bytes())
        assert card.locator("h3").inner_text() == path.name
        assert card.locator(".answer").inner_text() == ranked[0][0]
        assert card.locator(".bars .name").all_inner_texts() == [name for name, _ in ranked]
        values = [float(v.split()[-2]) for v in card.locator(".value").all_inner_texts()]
        assert values == pytest.approx([100 * p for _, p in ranked], abs=0.06)
        page.wait_for_timeout(400)  # bars grow to their length
        track = card.locator(".track").first.bounding_box()["width"]
        fill = card.locator(".fill").first.bounding_box()["width"]
        assert fill / track == pytest.approx(ranked[0][1], abs=0.02)
        assert "ms in all" in card.locator(".took").inner_text()
        seen = card.locator(".seen img")
        assert seen.evaluate("image => image.naturalWidth") == 32
        assert "as the network sees it: 32 × 32" in card.locator(".seen").inner_text()
    assert page.inner_text("#status").startswith("2 pictures. ")


def test_a_dropped_picture_is_answered(page: Any, pictures: list[Path]) -> None:
    content = base64.b64encode(pictures[0].read_bytes()).decode()
    transfer = page.evaluate_handle(
        """text => {
            const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "dropped.png", { type: "image/png" }));
            return transfer;
        }""",
        content,
    )
    page.dispatch_event("h1", "dragenter", {"dataTransfer": transfer})
    assert page.locator("body.dragging").count() == 1
    page.dispatch_event("h1", "drop", {"dataTransfer": transfer})
    assert page.locator("body.dragging").count() == 0
    (card,) = answered(page, 1)
    assert card.locator("h3").inner_text() == "dropped.png"
    assert card.locator(".bars li").count() == 5


def test_a_pasted_picture_is_answered(page: Any, pictures: list[Path]) -> None:
    page.evaluate(
        """text => {
            const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
            const data = new DataTransfer();
            data.items.add(new File([bytes], "image.png", { type: "image/png" }));
            document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data }));
        }""",
        base64.b64encode(pictures[0].read_bytes()).decode(),
    )
    (card,) = answered(page, 1)
    assert card.locator(".bars li").count() == 5


def test_the_keyboard_alone_is_enough(page: Any) -> None:
    """Tab reaches the file input, then the samples; Enter answers; the answer is read aloud."""
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "files"
    outline = "getComputedStyle(document.getElementById('choose')).outlineStyle"
    assert page.evaluate(outline) == "solid"
    for _ in range(9):
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.innerText") == "ship"
    page.keyboard.press("Enter")
    (card,) = answered(page, 1)
    best, share = card.locator(".answer").inner_text(), card.locator(".value").first.inner_text()
    assert page.inner_text("#status") == f"sample ship.png: {best}, {share}."
    assert page.get_attribute("#status", "aria-live") == "polite"
    page.keyboard.press("Tab")  # truck
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "clear"
    page.keyboard.press("Enter")
    assert page.locator("#results > li").count() == 0
    assert page.evaluate("document.activeElement.id") == "files"


def test_what_a_screen_reader_finds(page: Any, pictures: list[Path]) -> None:
    assert page.get_by_role("heading", name="What is on the picture?").count() == 1
    assert page.get_by_label("Choose pictures", exact=True).count() >= 1
    assert page.get_by_role("button", name="sample: cat").count() == 1
    page.set_input_files("#files", pictures[0])
    answered(page, 1)
    assert page.get_by_role("img", name="small.png as the network sees it").count() == 1
    unnamed = "[...document.images].filter(image => !image.alt).length"
    assert page.evaluate(unnamed) == 0
    assert page.get_attribute("html", "lang") == "en"


def test_an_error_stands_beside_the_answers(page: Any, pictures: list[Path]) -> None:
    page.set_input_files("#files", pictures)
    cards = answered(page, 3)
    assert [card.locator(".bars li").count() for card in cards] == [5, 5, 0]
    text = cards[2].inner_text()
    assert "No answer" in text
    assert "Not a picture" in text
    assert "words.png: no answer." in page.inner_text("#status")


def test_a_file_that_is_too_large_is_refused_without_being_sent(page: Any, tmp_path: Path) -> None:
    path = tmp_path / "noise.bmp"
    Image.effect_noise((400, 400), 50).save(path)
    sent: list[str] = []
    page.on("request", lambda r: sent.append(r.url) if r.method == "POST" else None)
    page.set_input_files("#files", path)
    (card,) = answered(page, 1)
    assert "0.2 MB; at most 0.1 MB" in card.inner_text()
    assert sent == []


def test_a_server_that_has_gone_is_told(page: Any, pictures: list[Path]) -> None:
    page.route("**/predict*", lambda route: route.abort())
    page.set_input_files("#files", pictures[0])
    page.wait_for_selector(".bad")
    assert "cannot be reached" in page.inner_text(".bad")


def test_an_overloaded_server_is_asked_again(page: Any, pictures: list[Path]) -> None:
    times = []

    def busy_once(route: Any) -> None:
        times.append(1)
        if len(times) == 1:
            route.fulfill(status=429, headers={"Retry-After": "1"}, json={"detail": "busy"})
        else:
            route.continue_()

    page.route("**/predict*", busy_once)
    page.set_input_files("#files", pictures[0])
    page.wait_for_selector(".bars li")
    assert len(times) == 2


def test_a_model_of_other_classes_offers_no_samples(
    browser: Any, exported: Path, tmp_path: Path
) -> None:
    """Who made the model chose the names; they are shown as text, and nothing else."""
    names = ["mask", "no mask", "<img src=x onerror=alert(1)>", "\u202eback", "e\x1b[31m", *"abcde"]
    model = onnx.load(exported)
    for entry in model.metadata_props:
        if entry.key == "class_names":
            entry.value = json.dumps(names)
    onnx.save(model, tmp_path / "masks.onnx")
    with running(str(tmp_path / "masks.onnx")) as masks:
        page = browser.new_page()
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: problems.append(dialog.message))
        page.goto(masks.url)
        # Not wait_for_function: it makes code of a string in the page, which our policy forbids.
        page.wait_for_selector("#about > *", state="attached")
        assert page.locator("#samples-section").is_hidden()
        assert page.locator("#samples button").count() == 0
        page.click("summary")
        shown = page.inner_text("#about")
        page.close()
    assert problems == []
    assert "mask, no mask, <img src=x onerror=alert(1)>" in shown
    assert "\u202e" not in shown
    assert "\x1b" not in shown


def lightness(page: Any) -> int:
    color = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(int(x) for x in color.removeprefix("rgb(").rstrip(")").split(","))


def test_dark_mode_turns_the_colours(page: Any) -> None:
    light = lightness(page)
    page.emulate_media(color_scheme="dark")
    assert lightness(page) < 200 < 600 < light


@pytest.mark.parametrize("width", [320, 360, 768])
def test_nothing_sticks_out_sideways(page: Any, width: int, pictures: list[Path]) -> None:
    page.set_viewport_size({"width": width, "height": 740})
    page.set_input_files("#files", pictures)
    answered(page, 3)
    page.click("summary")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_many_at_once_arrive_one_by_one(page: Any, tmp_path: Path) -> None:
    x = load("sample").x_test
    for i in range(30):
        file = io.BytesIO()
        Image.fromarray(x[i]).save(file, "PNG")
        (tmp_path / f"{i:02}.png").write_bytes(file.getvalue())
    page.set_input_files("#files", sorted(tmp_path.iterdir()))
    cards = answered(page, 30)
    assert [card.locator("h3").inner_text() for card in cards] == [f"{i:02}.png" for i in range(30)]
    assert page.locator(".bad").count() == 0
    assert page.inner_text("#status").startswith("30 pictures. ")
