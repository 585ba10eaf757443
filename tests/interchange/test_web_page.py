"""The exported page in headless Chromium: certified, without a server or network."""

import base64
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import normlab
from normlab.__main__ import run as command
from normlab.data import load
from normlab.data.pictures.reading import read_square
from normlab.errors import UserError
from normlab.evaluation.prediction import run_predictor
from normlab.interchange import export_run, web_page, web_runtime
from normlab.interchange.certificate import CertificateError

pytestmark = pytest.mark.usefixtures("browser")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> normlab.Run:
    try:
        web_runtime.runtime()
    except UserError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("run") / "it's <b>"
    return normlab.train("fast79", out=folder, data="sample", epochs=1, threads=1)


@pytest.fixture(scope="module")
def exported(run: normlab.Run, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return export_run(run, tmp_path_factory.mktemp("web") / "page", file_format="web")


@pytest.fixture(scope="module")
def address(exported: Any) -> Iterator[str]:
    """A plain server of files."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = partial(Quiet, directory=str(exported.path.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(params=["server", "folder"])
def page(
    browser: Any, exported: Any, address: str, request: pytest.FixtureRequest
) -> Iterator[Any]:
    where = address if request.param == "server" else exported.path.as_uri()
    page = browser.new_page(viewport={"width": 1100, "height": 900})
    problems: list[str] = []
    asked: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text))
    page.on("request", lambda r: asked.append(r.url))
    page.goto(where)
    page.wait_for_selector("#samples button:nth-child(10)")
    asked_first = len(asked)
    yield page
    page.close()
    assert problems == []
    base = where.removesuffix("index.html")
    assert [url for url in asked if not url.startswith((base, "blob:", "data:"))] == []
    later = [url for url in asked[asked_first:] if not url.startswith(("blob:", "data:"))]
    assert later == []  # once it is there it asks for nothing, whatever it answers


def answered(page: Any, count: int) -> list[Any]:
    page.wait_for_selector(f"#results > li:nth-child({count})")
    page.wait_for_selector(".waiting", state="detached")
    return list(page.locator("#results > li").all())


def png(pixels: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_it_is_certified_in_a_browser(exported: Any) -> None:
    certificate = exported.certificate
    assert certificate.test_images == 200
    assert certificate.checked_with.startswith("Chromium")
    assert certificate.largest_difference < 1e-5
    assert certificate.reading.largest_difference <= 1
    names = {path.name for path in exported.path.parent.iterdir()}
    assert names == {path.name for path in exported.files}
    assert {"index.html", "README.md", "LICENSE-onnxruntime.txt"} < names
    assert 5e6 < sum(exported.files.values()) < 8e6


@pytest.mark.parametrize(
    "page",
    [lambda exported, _: exported.path.as_uri(), lambda _, r: r.getfixturevalue("address")],
    indirect=True,
    ids=["folder", "server"],
)
def test_it_answers_as_normlab_predict(page: Any, run: normlab.Run, tmp_path: Path) -> None:
    """Turned, transparent, grey, of other sizes."""
    photo = Image.fromarray(load("sample").x_test[7]).resize((90, 60))
    exif = Image.Exif()
    exif[274] = 6
    veiled = photo.convert("RGBA")
    veiled.putalpha(Image.linear_gradient("L").resize(photo.size))
    photo.save(tmp_path / "turned.png", exif=exif)
    veiled.save(tmp_path / "veiled.png")
    photo.convert("L").save(tmp_path / "grey.png")
    photo.save(tmp_path / "photo.png")
    paths = sorted(tmp_path.glob("*.png"))
    page.set_input_files("#files", paths)
    cards = answered(page, 4)
    predictor = run_predictor(run)
    squares = np.stack([read_square(path, 32) for path in paths])
    for card, path, p in zip(cards, paths, predictor.answers(squares)[0], strict=True):
        assert card.locator("h3").inner_text() == path.name
        shown = [float(v.split()[-2]) for v in card.locator(".value").all_inner_texts()]
        assert shown == pytest.approx(sorted(100 * p, reverse=True)[:5], abs=0.3)
        assert card.locator(".seen img").evaluate("image => image.naturalWidth") == 32


def test_what_is_no_picture_is_told(page: Any, tmp_path: Path) -> None:
    (tmp_path / "words.png").write_text("no picture")
    page.set_input_files("#files", tmp_path / "words.png")
    (card,) = answered(page, 1)
    assert "cannot read it as a picture" in card.inner_text()


def test_the_keyboard_alone_is_enough(page: Any) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "files"
    for _ in range(9):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    (card,) = answered(page, 1)
    best, share = card.locator(".answer").inner_text(), card.locator(".value").first.inner_text()
    assert page.inner_text("#status") == f"sample ship.png: {best}, {share}."
    assert page.evaluate("[...document.images].every(image => image.alt)")


def test_drop_and_paste(page: Any) -> None:
    content = base64.b64encode(png(load("sample").x_test[0])).decode()
    make = """text => {
        const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
        const data = new DataTransfer();
        data.items.add(new File([bytes], "image.png", { type: "image/png" }));
        %s
    }"""
    dropped = page.evaluate_handle(make % "return data;", content)
    page.dispatch_event("h1", "drop", {"dataTransfer": dropped})
    answered(page, 1)
    paste = 'document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data }));'
    page.evaluate(make % paste, content)
    answered(page, 2)


def test_nothing_sticks_out_and_dark_is_dark(page: Any) -> None:
    width = 320
    page.set_viewport_size({"width": width, "height": 740})
    page.click("#samples button")
    answered(page, 1)
    page.click("summary")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.emulate_media(color_scheme="dark")
    color = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, color.removeprefix("rgb(").rstrip(")").split(","))) < 200


def test_the_camera_is_one_more_way(browser: Any, exported: Any) -> None:
    """A canvas in its place: what matters is what the page makes of it."""
    page = browser.new_page()
    page.add_init_script("""
        const canvas = document.createElement("canvas");
        canvas.getContext("2d").fillRect(0, 0, 9, 9);
        navigator.mediaDevices.enumerateDevices = async () => [{ kind: "videoinput" }];
        navigator.mediaDevices.getUserMedia = async () => canvas.captureStream();
    """)
    page.goto(exported.path.as_uri())
    page.click("#camera")
    page.click("#shoot")
    (card,) = answered(page, 1)
    assert card.locator("h3").inner_text() == "camera.png"
    page.click("#camera-off")
    assert page.locator("#camera-section").is_hidden()
    page.close()


@pytest.mark.soak
def test_a_page_that_answers_otherwise_is_not_written(
    run: normlab.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = web_page._template

    def negative(name: str) -> bytes:
        content = template(name)
        return content.replace(b"pixels[j++] = data[i]", b"pixels[j++] = 255 - data[i]")

    monkeypatch.setattr(web_page, "_template", negative)
    with pytest.raises(CertificateError, match="nothing was written"):
        export_run(run, tmp_path / "page", file_format="web")
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_fails_says_why(
    run: normlab.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web_page, "_packed", lambda content: base64.b64encode(b"x").decode())
    with pytest.raises(CertificateError, match=r"the page does not answer in .*chromium"):
        export_run(run, tmp_path / "page", file_format="web")


def test_mistakes_are_one_line(
    run: normlab.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "index.html").write_text("mine")
    (mine / "numbers").write_text(" ".join(map(str, range(100_000))))
    with tarfile.open(tmp_path / "flipped.tgz", "w:gz") as tar:
        tar.add(mine / "numbers", "package/dist/ort.wasm.min.js")
    flipped = bytearray((tmp_path / "flipped.tgz").read_bytes())
    flipped[50_000:53_000] = 3_000 * b"\xff"
    (tmp_path / "flipped.tgz").write_bytes(flipped)
    for words, told in (
        (["--out", str(mine)], "has files in it: choose a folder of its own"),
        (["--out", str(tmp_path / "p"), "--browser", "nowhere"], "browser 'nowhere' is no program"),
        (["--out", str(tmp_path / "p"), "--runtime", str(mine / "index.html")], "no tarball"),
        (["--out", str(tmp_path / "p"), "--runtime", str(tmp_path / "flipped.tgz")], "no tarball"),
    ):
        assert command(["export", str(run.path), "--format", "web", *words]) == 2
        error = capsys.readouterr().err
        assert told in error
        assert error.count("\n") == 1
    assert (mine / "index.html").read_text() == "mine"


def test_the_page_knows_its_size_and_where_its_runtime_is_from(exported: Any) -> None:
    text = (exported.path.parent / "model.js").read_text("utf-8")
    told = json.loads(text.removeprefix("const MODEL = ").rstrip(";\n"))
    assert told["name"] == "it's <b>"
    assert web_runtime.PACKAGE.sha256 in told["more"]["Runs on"]
    assert told["more"]["Size"].split()[0] == f"{sum(exported.files.values()) / 1e6:.1f}"
