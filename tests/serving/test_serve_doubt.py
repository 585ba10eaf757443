"""The server says when it is not sure, and shows where the network looked."""

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import normlab
from normlab.__main__ import run as command
from normlab.api.run import Run
from normlab.data import load
from normlab.evaluation import held_out
from normlab.evaluation.prediction import run_predictor
from normlab.serving.model import open_served
from servers import Server, running

SELF = "the run itself answers"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("served") / "run"
    return normlab.train(
        "fast79", out=folder, data="sample", epochs=4, batch_size=50, validation=0.25, threads=1
    )


@pytest.fixture(scope="module")
def pictures(run: Run, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The test picture that is most familiar to the run, and the one that is least."""
    folder = tmp_path_factory.mktemp("pictures")
    near = run.evaluate().familiarity
    assert near is not None
    paths = [folder / "known.png", folder / "strange.png"]
    for path, index in zip(paths, (near.argmax(), near.argmin()), strict=True):
        Image.fromarray(load("sample").x_test[index]).save(path)
    return paths


@pytest.fixture(scope="module")
def server(run: Run) -> Iterator[Server]:
    with running(str(run.path)) as server:
        yield server


def test_doubt_stands_beside_the_answer(run: Run, server: Server, pictures: list[Path]) -> None:
    known, strange = pictures
    assert any(line.startswith("Sure: if a class has a probability of 50") for line in server.said)
    (answer,) = server.post(strange.read_bytes()).json()["results"]
    assert answer["doubt"] == "unlike"
    assert len(answer["predictions"]) == 5
    assert answer["familiarity"] < server.get("/model").json()["doubt"]["least_familiarity"]
    (answer,) = server.post(known.read_bytes()).json()["results"]
    sure = answer["predictions"][0]["probability"] >= 0.5
    assert answer["doubt"] == (None if sure else "undecided")
    told, learnt = server.get("/model").json()["doubt"], held_out.read(run)
    assert learnt is not None
    assert learnt[0].before is not None
    assert told["error_before"] == pytest.approx(learnt[0].before["error"])
    assert 0 <= told["error_after"] <= 1
    with running(str(run.path), "--always") as other:
        (answer,) = other.post(strange.read_bytes()).json()["results"]
        assert answer["doubt"] is None
        assert other.get("/model").json()["doubt"] is None


def test_a_run_that_cannot_be_exported_answers_itself(tmp_path: Path) -> None:
    options: dict[str, Any] = {"norm": "rms", "validation": 0.25, "threads": 1}
    run = normlab.train("fast79", out=tmp_path / "r", data="sample", **options)
    served, pixels = open_served(run.path), load("sample").x_test[:5]
    assert (served.checked, served.sha256, served.certificate) == (SELF, None, None)
    assert served.reason == "normaliser RMSNorm cannot be exported, only batch and none can"
    expected, near = run_predictor(run).answers(pixels)
    assert near is not None
    for (p, familiarity), row, known in zip(served.answers(pixels), expected, near, strict=True):
        assert np.array_equal(p, row)
        assert familiarity == known


@pytest.mark.parametrize("views", ["flip", "shift", "unsure"])
def test_views_answer_as_predict_does(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], views: str
) -> None:
    paths = [tmp_path / f"{i:02}.png" for i in range(24)]
    for path, pixels in zip(paths, load("sample").x_test, strict=False):
        Image.fromarray(pixels).save(path)
    words = [str(run.path), str(tmp_path), "--top", "10", "--json"]
    said = {}
    for name in (views, "single"):
        assert command(["predict", *words, "--views", name]) == 0
        lines = capsys.readouterr().out.splitlines()
        said[name] = [json.loads(line)["predictions"] for line in lines]
    with running(str(run.path), "--views", views) as server:
        told = server.get("/model").json()
        contents = [path.read_bytes() for path in paths]
        together = server.post(*contents, query="?top=10").json()["results"]
        alone = [server.post(c, query="?top=10").json()["results"][0] for c in contents]
    assert f"Views: {views}." in server.said
    assert (told["views"], told["checked"]) == (views, SELF)
    assert told["sha256"] is told["certificate"] is told["doubt"]["error_after"] is None
    for expected, *answers in zip(said[views], together, alone, strict=True):
        for answer in answers:
            assert _by_class(answer["predictions"]) == pytest.approx(_by_class(expected), abs=1e-6)
    changed = sum(a != b for a, b in zip(said[views], said["single"], strict=True))
    assert 0 < changed < 24 if views == "unsure" else changed == 24


def _by_class(predictions: list[dict[str, Any]]) -> dict[str, float]:
    return {p["class"]: p["probability"] for p in predictions}


def test_heat_is_of_one_picture_alone(server: Server, pictures: list[Path]) -> None:
    content = pictures[0].read_bytes()
    (answer,) = server.post(content, query="?heat=true").json()["results"]
    kind, _, text = answer["heat"].partition(",")
    assert kind == "data:image/png;base64"
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))
    assert pixels.shape == (256, 256, 3)
    assert (pixels.max(2).astype(int) - pixels.min(2)).max() > 60  # somewhere it is coloured
    (answer,) = server.post(content).json()["results"]
    assert answer["heat"] is None
    refused = server.post(content, content, query="?heat=true")
    assert refused.status_code == 422
    assert "one picture alone" in refused.json()["detail"]


def test_the_page_says_it_in_words(browser: Any, server: Server, pictures: list[Path]) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.goto(server.url)
    page.wait_for_selector("#samples button:nth-child(10)")
    page.set_input_files("#files", pictures[1])
    page.wait_for_selector(".unsure")
    assert page.inner_text(".answer") == "Not sure"
    assert "unlike those it was trained on" in page.inner_text(".doubt")
    assert page.inner_text("#status").startswith("strange.png: not sure. ")
    assert "cannot know every strange picture" in page.inner_text("footer")
    page.click(".look")
    page.wait_for_selector(".heat img[src^='data:']")
    assert page.locator(".heat img").evaluate("image => image.naturalWidth") == 256
    assert page.get_by_role("img", name="strange.png: where the network looked").count() == 1
    assert not page.is_visible(".look")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()


def test_a_rate_that_cannot_be_kept_is_no_server(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["serve", str(run.path), "--port", "0", "--abstain-at", "99"]) == 2
    assert "cannot be shown on 100 pictures held out" in capsys.readouterr().err
