"""From held-out pictures to the run's folder, and from there to every place that answers."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.special import softmax

import normlab
from normlab.__main__ import run as command
from normlab.api.run import Run, open_run
from normlab.core.tensors import read_tensors, write_tensors
from normlab.data import load
from normlab.data.batches import split_images
from normlab.errors import DataError, UserError
from normlab.evaluation import held_out
from normlab.evaluation.familiarity import answers_of, familiarity
from normlab.evaluation.heat import heat_of, overlay
from normlab.evaluation.sureness import sureness
from normlab.formats.onnx_model import open_onnx
from normlab.interchange import export_run

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Trained on 300 pictures of CIFAR-10; 100 are held out."""
    folder = tmp_path_factory.mktemp("doubt") / "run"
    return normlab.train(
        "fast79", out=folder, data="sample", epochs=4, batch_size=50, validation=0.25, threads=1
    )


@pytest.fixture(scope="module")
def pictures(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The twelve test pictures that are most familiar to the run, and the three that are least."""
    folder = tmp_path_factory.mktemp("pictures")
    near = run.evaluate().familiarity
    assert near is not None
    order = np.argsort(-near)
    for name, indices in (("known", order[:12]), ("strange", order[-3:])):
        for i, pixels in enumerate(load("sample").x_test[indices]):
            Image.fromarray(pixels).save(folder / f"{name}{i:02}.png")
    return folder


def said(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> tuple[str, str]:
    assert command([str(word) for word in words]) == code
    out, err = capsys.readouterr()
    return out, err


def test_it_comes_from_the_held_out_pictures_alone(run: Run) -> None:
    learnt = held_out.read(run)
    assert learnt is not None
    doubt, means = learnt
    images = run.task.load()
    _, held = split_images(images, 0.25)
    assert doubt.label == tuple(held.labels)
    logits, features = answers_of(run.model(), held.images)
    p = softmax(logits.double().numpy() / doubt.temperature, axis=1)
    np.testing.assert_allclose(doubt.probability, p.max(1), atol=1e-6)
    np.testing.assert_allclose(doubt.of_label, p[np.arange(100), held.labels], atol=1e-6)
    assert means is not None
    assert features is not None
    np.testing.assert_allclose(doubt.familiarity, familiarity(features, means), atol=1e-6)
    # Its own tenth and more: 5 of 101.
    assert sum(f < doubt.least_familiarity for f in doubt.familiarity) == 4


def test_the_result_has_both_calibrations_and_its_loss_is_the_trained_one(run: Run) -> None:
    result = run.finished()["evaluation"]
    logits, _ = answers_of(run.model(), run.task.load().x_test)
    labels = run.task.load().y_test
    z = logits.double().numpy()
    log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
    loss = -log_p[np.arange(len(labels)), labels].mean()
    assert result["test_loss"] == pytest.approx(loss, abs=1e-6)
    assert result["calibration"]["before"]["loss"] == pytest.approx(loss, abs=1e-6)
    learnt = held_out.read(run)
    assert learnt is not None
    assert result["calibration"]["temperature"] == pytest.approx(learnt[0].temperature, abs=1e-9)
    assert 0 < result["sure"]["right"] <= result["sure"]["answered"] <= 200


def test_predict_says_when_it_is_not_sure(
    run: Run, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = said(capsys, "predict", run.path, pictures, "--json", "--top", 2)
    rows = [json.loads(line) for line in out.splitlines()]
    assert {tuple(row) for row in rows} == {("path", "predictions", "doubt", "familiarity")}
    doubts = {Path(row["path"]).name: row["doubt"] for row in rows}
    assert [doubts[f"strange{i:02}.png"] for i in range(3)] == ["unlike"] * 3
    assert "unlike" not in [doubts[f"known{i:02}.png"] for i in range(12)]
    unsure = sum(d is not None for d in doubts.values())
    assert f"Not sure of {unsure} of 15" in err
    for row in rows:
        top = row["predictions"][0]["probability"]
        assert (row["doubt"] == "undecided") <= (top < 0.5)
    out, _ = said(capsys, "predict", run.path, pictures)
    assert ".png: not sure, unlike the pictures it was trained on; if any: " in out
    assert ("not sure, no class stands out: " in out) is ("undecided" in doubts.values())


def test_always_is_as_it_was(run: Run, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = said(capsys, "predict", run.path, pictures, "--always", "--json")
    assert {tuple(json.loads(line)) for line in out.splitlines()} == {("path", "predictions")}
    assert err == ""
    out, _ = said(capsys, "predict", run.path, pictures, "--always", "--csv", "--top", 1)
    assert out.splitlines()[0] == "path,class_1,p_1"
    assert "not sure" not in said(capsys, "predict", run.path, pictures, "--always")[0]


def test_sets_in_every_form(run: Run, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["predict", run.path, pictures, "--sets", 80]
    rows = [json.loads(line) for line in said(capsys, *words, "--json")[0].splitlines()]
    for row in rows:
        assert row["set"][0] == row["predictions"][0]["class"]
    sizes = [len(row["set"]) for row in rows]
    assert max(sizes) > 1
    table = list(csv.reader(io.StringIO(said(capsys, *words, "--csv")[0])))
    assert table[0][-3:] == ["doubt", "familiarity", "set"]
    assert [row[-1] for row in table[1:]] == ["|".join(row["set"]) for row in rows]
    text = said(capsys, *words)[0].splitlines()
    known = [(line, row) for line, row in zip(text, rows, strict=True) if row["doubt"] is None]
    assert all(line.endswith(": " + " or ".join(row["set"])) for line, row in known)
    wide = said(capsys, *words, "--per-class", "--json")[0].splitlines()
    assert np.mean([len(json.loads(line)["set"]) for line in wide]) >= np.mean(sizes)


def test_a_rate_is_kept_or_refused(
    run: Run, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, err = said(capsys, "predict", run.path, pictures, "--abstain-at", 99, code=2)
    assert "cannot be shown on 100 pictures held out" in err
    assert len(err.splitlines()) == 1
    _, err = said(capsys, "predict", run.path, pictures, "--abstain-at", 20)
    assert "Sure if a class has a probability of" in err
    found = sureness(run.evaluate(), 20, 80)
    assert found.answered is not None
    assert found.answered.threshold is not None
    assert found.sets is not None
    assert 0.6 < found.sets.covered <= 1
    for words in (
        ["--always", "--abstain-at", "50"],
        ["--always", "--sets", "90"],
        ["--per-class"],
        ["--abstain-at", "0.95"],
        ["--sets", "100"],
    ):
        assert command(["predict", str(run.path), str(pictures), *words]) == 2


def test_the_export_has_it_all(
    run: Run, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same temperature, familiarity and rule, from the file alone."""
    exported = export_run(run, tmp_path / "out" / "model.onnx")
    near = exported.certificate.familiarity_difference
    assert near is not None
    assert near < 1e-5
    p, found = open_onnx(exported.path).answers(load("sample").x_test)
    expected = run.evaluate()
    np.testing.assert_allclose(p, expected.probabilities, atol=1e-5)
    assert found is not None
    assert expected.familiarity is not None
    np.testing.assert_allclose(found, expected.familiarity, atol=1e-5)
    answers = [
        said(capsys, "predict", model, pictures, "--sets", 80)[0]
        for model in (run.path, exported.path)
    ]
    assert answers[0] == answers[1]
    alone = subprocess.run(
        [sys.executable, str(tmp_path / "out" / "predict.py"), str(pictures)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "not sure, unlike" in alone.stdout
    assert alone.stdout == said(capsys, "predict", run.path, pictures)[0]
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    before, after = (run.finished()["evaluation"]["calibration"][k] for k in ("before", "after"))
    assert f"| {before['error']:.4f} without the temperature " in card
    assert f", {after['error']:.4f} with it |" in card
    assert "always answers" not in card


@pytest.mark.soak
@pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
def test_familiarity_is_exported_whatever_was_folded(tmp_path: Path) -> None:
    """The notebook's last normalisation goes into its output layer; features come after it."""
    run = normlab.train("notebook", out=tmp_path / "run", data="sample", epochs=1, threads=1)
    for kind in ("onnx", "keras"):
        exported = export_run(run, tmp_path / kind / f"model.{kind}", file_format=kind)
        assert exported.certificate.passed
    near = export_run(run, tmp_path / "m.onnx").certificate.familiarity_difference
    assert near is not None
    assert near < 1e-5


def test_a_run_that_held_out_nothing_says_how(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = normlab.train("fast79", out=tmp_path / "run", data="sample", epochs=1, threads=1)
    assert held_out.read(run) is None
    assert run.evaluate().temperature == 1
    out, err = said(capsys, "predict", run.path, pictures)
    assert "not sure" not in out
    assert "--validation 0.1" in err
    _, err = said(capsys, "predict", run.path, pictures, "--sets", 90, code=2)
    assert "--validation 0.1" in err
    _, err = said(capsys, "calibrate", run.path, code=2)
    assert "--on FOLDER" in err
    # Labelled pictures from elsewhere do as well, but not those of its training and test.
    with pytest.raises(UserError, match="all 600 pictures"):
        held_out.relearn(run, "sample")
    seen = load("sample")
    other = {
        "x_train": 255 - seen.x_train,
        "y_train": seen.y_train,
        "x_test": seen.x_test,
        "y_test": seen.y_test,
        "class_names": seen.class_names,
    }
    doubt = held_out.relearn(run, other)
    assert doubt.total == 400
    assert run.evaluate().temperature == pytest.approx(doubt.temperature)


def test_a_foreign_or_damaged_file_is_one_line(run: Run, tmp_path: Path) -> None:
    path = run.path / held_out.FILE
    content = path.read_bytes()
    tensors, document = read_tensors(path)
    try:
        for change in ({"temperature": -1}, {"label": "x"}, {"right": []}):
            write_tensors(path, tensors, {**document, **change})
            with pytest.raises(DataError, match="not as normlab wrote it"):
                held_out.read(run)
        write_tensors(path, {held_out.FEATURES: tensors[held_out.FEATURES][:3]}, document)
        with pytest.raises(DataError, match="other classes"):
            held_out.read(run)
        write_tensors(path, {held_out.FEATURES: tensors[held_out.FEATURES][:, :3]}, document)
        with pytest.raises(DataError, match="another network"):
            run.evaluate()
        path.write_bytes(content[:-10])
        with pytest.raises(DataError, match="safetensors"):
            open_run(run.path).evaluate()
    finally:
        path.write_bytes(content)
    assert held_out.read(run, "best") is None


def test_heat_is_where_a_network_looks() -> None:
    """One that looks at a corner alone: there is the heat, with its sign, and nowhere else."""

    def probabilities(images: np.ndarray) -> np.ndarray:
        bright = images[:, :6, :6].mean((1, 2, 3)) / 255
        return np.stack([bright, 1 - bright], 1)

    picture = np.zeros((32, 32, 3), np.uint8)
    picture[:8, :8] = 230
    heat = heat_of(probabilities, picture, 0)
    assert np.unravel_index(heat.drop.argmax(), (8, 8)) in [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert (heat.drop[3:] == 0).all()
    assert (heat.drop[:, 3:] == 0).all()
    assert heat.least < 0.5 < heat.whole
    other = heat_of(probabilities, picture, 1)
    np.testing.assert_allclose(other.drop, -heat.drop, atol=1e-6)
    red, blue = overlay(picture, heat), overlay(picture, other)
    assert red.shape == (128, 128, 3)
    assert red[8, 8, 0] > red[8, 8, 2]
    assert blue[8, 8, 0] < blue[8, 8, 2]
    assert (red[100, 100] == red[100, 100, 0]).all()


@pytest.mark.usefixtures("browser")
def test_numbers_of_the_confusion_matrix_lead_to_their_pictures(run: Run, browser: Any) -> None:
    evaluation = run.evaluate()
    page = browser.new_page(viewport={"width": 390, "height": 800})
    asked: list[str] = []
    page.on("request", lambda r: asked.append(r.url))
    page.goto((run.path / "report.html").as_uri())
    cells = page.locator(".matrix a")
    counts = evaluation.confusion[evaluation.confusion > 0]
    assert [int(text) for text in cells.all_inner_texts()] == counts.tolist()
    assert page.locator(".cell:visible").count() == 0
    i, j = np.argwhere(evaluation.confusion == evaluation.confusion.max())[0]
    page.click(f".matrix a[href='#c-{i}-{j}']")
    shown = page.locator(".cell:visible")
    assert shown.count() == 1
    names = evaluation.class_names
    assert shown.locator("h3").inner_text() == f"{names[i]} answered {names[j]}: {counts.max()}"
    assert 0 < shown.locator("img").count() <= counts.max()
    assert page.locator(".heat").count() >= 8
    # A phone does not scroll sideways, and nothing is fetched.
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert all(url.startswith(("file:", "data:")) for url in asked)
    page.close()
