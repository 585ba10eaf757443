"""From a folder of pictures to a run, and from a run to answers, as people do it."""

import contextlib
import csv
import io
import json
import os
import shutil
import subprocess
from pathlib import Path
from unittest.mock import patch

import numpy as np
import onnx
import pytest
from PIL import Image

from normlab.__main__ import run
from normlab.api.run import open_run
from normlab.core.tensors import read_tensors, write_tensors
from normlab.data.pictures.decoding import Readers
from normlab.errors import DataError, UserError
from normlab.evaluation import held_out
from normlab.evaluation.forward import logits_of
from normlab.evaluation.prediction import Predictor, open_predictor, predict, run_predictor
from normlab.formats.onnx_model import open_onnx


def normlab(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command, in this process: fifteen starts of Python would take half a minute."""
    out, error = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(cwd),
        patch.dict(os.environ, NORMLAB_CACHE=str(cwd / "cache")),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(error),
    ):
        code = run(list(words))
    return subprocess.CompletedProcess(words, code, out.getvalue(), error.getvalue())


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Red and blue pictures of 24 to 40 pixels, one of them broken, and a run trained on them."""
    folder = tmp_path_factory.mktemp("project")
    rng = np.random.default_rng(0)
    for name, channel in (("red", 0), ("blue", 2)):
        (folder / "colours" / name).mkdir(parents=True)
        for i in range(20):
            picture = rng.integers(0, 80, (24 + i % 16, 40, 3), np.uint8)
            picture[..., channel] += 150
            Image.fromarray(picture).save(folder / "colours" / name / f"{i:02}.png")
    (folder / "colours" / "red" / "broken.png").write_bytes(b"x")
    words = ["train", "notebook", "--data", "colours", "--image-size", "16", "--threads", "1"]
    words += ["--epochs", "1", "--batch-size", "8", "--validation", "0.25"]
    refused = normlab(*words, cwd=folder)
    assert refused.returncode == 2, refused.stderr
    assert "red/broken.png: not a picture" in refused.stderr
    assert not (folder / "runs").exists()
    done = normlab(*words, "--skip-bad", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout, encoding="utf-8")
    return folder


def test_training_ends_beside_simple_answers(project: Path) -> None:
    text = (project / "stdout").read_text(encoding="utf-8")
    for name in ("this network", "majority class", "logistic regression"):
        assert f"  {name}" in text
    assert "macro-F1" in text
    assert "# the recipe for own pictures" not in text  # all 8 test pictures are right
    result = open_run(project / "runs" / "0001-notebook").result
    assert result is not None
    assert result["baselines"]["majority class"]["balanced_accuracy"] == 0.5
    assert result["baselines"]["logistic regression"]["test_accuracy"] == 1


def test_a_run_is_evaluated_with_its_own_size_and_omissions(project: Path) -> None:
    done = normlab("evaluate", "--json", cwd=project)
    assert done.returncode == 0, done.stderr
    result = open_run(project / "runs" / "0001-notebook").result
    assert result is not None
    accuracy = json.loads(done.stdout.splitlines()[-1])["test_accuracy"]
    assert accuracy == result["test_accuracy"]


def test_answers_are_those_of_the_evaluation(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Predicting the files gives, picture by picture, what the test images gave."""
    monkeypatch.chdir(project)
    monkeypatch.setenv("NORMLAB_CACHE", str(project / "cache"))
    run = open_run()
    predictor = run_predictor(run)
    answers = [a for a in predict(predictor, ["colours"]) if a.probabilities is not None]
    evaluation, images = run.evaluate(), run.task.load()
    assert len(answers) == 40
    found = np.stack([a.probabilities for a in answers])
    for expected in evaluation.probabilities:
        assert np.abs(found - expected).max(1).min() < 1e-6
    assert images.x_test.shape == (8, 16, 16, 3)


def test_a_bad_file_is_reported_and_the_rest_go_on(project: Path) -> None:
    done = normlab("predict", "runs/0001-notebook", "colours", "nowhere.png", cwd=project)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert len(lines) == 40
    assert lines[0].startswith("colours/blue/00.png: ")
    assert sorted(word.split()[0] for word in lines[0].split(": ")[1].split(", ")) == [
        "blue",
        "red",
    ]
    errors = done.stderr.splitlines()
    assert len(errors) == 2
    assert errors[0].startswith("colours/red/broken.png: not a picture")
    assert errors[1].startswith("nowhere.png: ")


def test_json_and_csv(project: Path) -> None:
    done = normlab("predict", "colours/blue", "--json", "--top", "1", cwd=project)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["path"] for row in rows] == [f"colours/blue/{i:02}.png" for i in range(20)]
    (answer,) = rows[0]["predictions"]
    assert answer["class"] in ("red", "blue")
    assert 0.5 <= answer["probability"] <= 1
    done = normlab("predict", "colours/blue", "--csv", cwd=project)
    table = list(csv.reader(io.StringIO(done.stdout)))
    assert table[0] == ["path", "class_1", "p_1", "class_2", "p_2", "doubt", "familiarity"]
    assert table[1][:2] == ["colours/blue/00.png", answer["class"]]
    assert float(table[1][2]) == answer["probability"]


def test_weights_of_a_run_are_chosen(project: Path) -> None:
    folder = project / "other"
    shutil.copytree(project / "runs" / "0001-notebook", folder)
    tensors, _ = read_tensors(folder / "last.safetensors")
    write_tensors(folder / "best.safetensors", {k: abs(v) for k, v in tensors.items()})
    run, picture = open_run(folder), "colours/red/00.png"
    tops = {}
    for name in ("last", "best"):
        (answer,) = predict(run_predictor(run, name), [project / picture])
        done = normlab("predict", "other", picture, "--weights", name, "--json", cwd=project)
        tops[name] = json.loads(done.stdout)["predictions"][0]["probability"]
        assert answer.probabilities is not None
        assert tops[name] == pytest.approx(answer.probabilities.max(), abs=1e-6)
    assert tops["last"] != tops["best"]
    with pytest.raises(UserError, match="one set of weights"):
        open_predictor("model.onnx", "best")


@pytest.mark.parametrize("views", ["flip", "shift", "unsure"])
def test_answers_from_several_views(project: Path, views: str) -> None:
    run = open_run(project / "runs" / "0001-notebook")
    found = list(predict(run_predictor(run, views=views), [project / "colours" / "blue"]))
    single = list(predict(run_predictor(run), [project / "colours" / "blue"]))
    with Readers() as readers:
        read = [pixels for pixels, *_ in readers.read([answer.path for answer in found], 16)]
    pixels = np.stack([p for p in read if p is not None])
    learnt = held_out.read(run, "kept")
    assert learnt is not None
    temperature = learnt[0].temperature
    most = "shift" if views == "unsure" else views
    expected = (logits_of(run.model(), pixels, views=most) / temperature).softmax(1)
    unsure = np.ones(20, bool)
    if views == "unsure":  # less sure than three quarters of the held-out pictures
        plain = (logits_of(run.model(), pixels) / temperature).softmax(1)
        unsure = plain.amax(1).numpy() < np.quantile(learnt[0].probability, 0.25)
        expected[~unsure] = plain[~unsure]
    moved = 0
    for answer, alone, row in zip(found, single, expected, strict=True):
        assert answer.probabilities is not None
        assert alone.probabilities is not None
        np.testing.assert_allclose(answer.probabilities, row, atol=1e-6)
        assert answer.familiarity == alone.familiarity  # told by the single view
        moved += not np.allclose(answer.probabilities, alone.probabilities, atol=1e-7)
    assert moved == unsure.sum() > 0
    one = predict(run_predictor(run, views=views), [found[int(unsure.argmax())].path])
    for answer in one:  # as beside the others
        np.testing.assert_allclose(answer.probabilities, expected[unsure][0], atol=1e-6)


def test_views_are_refused_where_they_cannot_be(project: Path) -> None:
    picture = "colours/red/00.png"
    done = normlab("predict", picture, "--views", "flip", "--sets", "90", cwd=project)
    assert done.returncode == 2
    assert "hold for single views: leave out --views" in done.stderr
    done = normlab("predict", picture, "--views", "unsure", "--weights", "best", cwd=project)
    assert done.returncode == 2
    assert "by its best weights are unsure: choose views flip or shift" in done.stderr
    with pytest.raises(UserError, match="answers single views"):
        open_predictor("model.onnx", views="flip")


def test_an_exported_file_answers_as_its_run(project: Path) -> None:
    done = normlab("export", "--out", "exported/model.onnx", cwd=project)
    assert done.returncode == 0, done.stderr
    answers = []
    for model in ("runs/0001-notebook", "exported/model.onnx"):
        done = normlab("predict", model, "colours", "--json", "--top", "2", cwd=project)
        assert done.returncode == 1  # red/broken.png
        answers.append([json.loads(line) for line in done.stdout.splitlines()])
    assert len(answers[0]) == 40
    for mine, its in zip(*answers, strict=True):
        assert mine["path"] == its["path"]
        ours = {p["class"]: p["probability"] for p in mine["predictions"]}
        for answer in its["predictions"]:
            assert answer["probability"] == pytest.approx(ours[answer["class"]], abs=1e-5)


def graph(
    *,
    taken: tuple[str, int, list[object]] = ("images", onnx.TensorProto.UINT8, ["N", 8, 8, 3]),
    given: tuple[str, int] = ("probabilities", 2),
    class_names: str | None = '["a", "b"]',
) -> bytes:
    """A graph that averages the pixels of each of the first channels, with chosen faults."""
    name, dtype, shape = taken
    nodes = [
        onnx.helper.make_node("Cast", [name], ["x"], to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("ReduceMean", ["x"], ["m"], axes=[1, 2], keepdims=0),
        onnx.helper.make_node("Slice", ["m", "from", "to", "axis"], [given[0]]),
    ]
    numbers = {"from": 0, "to": given[1], "axis": 1}
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            nodes,
            "means",
            [onnx.helper.make_tensor_value_info(name, dtype, shape)],
            [onnx.helper.make_tensor_value_info(given[0], onnx.TensorProto.FLOAT, ["N", given[1]])],
            [onnx.numpy_helper.from_array(np.array([v]), k) for k, v in numbers.items()],
        ),
        opset_imports=[onnx.helper.make_opsetid("", 17)],
        ir_version=8,
    )
    if class_names is not None:
        model.metadata_props.add(key="class_names", value=class_names)
    return bytes(model.SerializeToString())


def test_an_onnx_model_is_asked_in_batches() -> None:
    model = open_onnx(graph())
    assert (model.class_names, model.image_size) == (("a", "b"), 8)
    images = np.random.default_rng(0).integers(0, 256, (600, 8, 8, 3), np.uint8)
    expected = images.mean((1, 2))[:, :2]
    np.testing.assert_allclose(model.probabilities(images), expected, rtol=1e-5)


UINT8, FLOAT = onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (graph(taken=("input", UINT8, ["N", 8, 8, 3])), "takes `input`, tensor(uint8)"),
        (graph(taken=("images", FLOAT, ["N", 8, 8, 3])), "takes `images`, tensor(float)"),
        (graph(taken=("images", UINT8, ["N", 8, 9, 3])), "['N', 8, 9, 3]"),
        (graph(taken=("images", UINT8, [1, 8, 8, 3])), "[1, 8, 8, 3]"),
        (graph(given=("y", 2)), "gives `y`, tensor(float)"),
        (graph(class_names=None), "no `class_names`"),
        (graph(class_names="{"), "no `class_names`"),
        (graph(class_names="[1, 2]"), "no `class_names`"),
        (graph(class_names='["a"]'), "names 1 classes but gives 2"),
        (b"", "no ONNX model"),
    ],
)
def test_an_onnx_file_of_another_kind_is_refused_by_name(content: bytes, named: str) -> None:
    with pytest.raises(DataError) as error:
        open_onnx(content)
    assert named in str(error.value)
    assert "normlab export --format onnx" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["empty"], "empty"),
        (["nowhere.png"], "nowhere.png"),
        (["runs/0001-notebook"], "runs/0001-notebook"),
        (["nowhere.onnx", "colours"], "nowhere.onnx is not a file"),
        (["broken.onnx", "colours"], "broken.onnx is no ONNX model"),
        (["colours", "--json", "--csv"], "--csv"),
        (["colours", "--top", "0"], "0"),
    ],
)
def test_no_picture_at_all_is_a_mistake(project: Path, words: list[str], value: str) -> None:
    (project / "empty").mkdir(exist_ok=True)
    (project / "broken.onnx").write_bytes(b"x" * 100)
    done = normlab("predict", *words, cwd=project)
    assert done.returncode == 2
    assert done.stdout == ""
    assert value in done.stderr.splitlines()[-1]


def test_an_answer_that_is_no_number_is_a_problem(tmp_path: Path) -> None:
    for name in ("a", "b"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.bmp")
    rows = np.array([[0.25, 0.75], [np.nan, np.nan]])
    found = list(predict(Predictor(lambda images: (rows, None), ("a", "b"), 8), [tmp_path]))
    assert [answer.problem for answer in found] == [None, "the network answers with NaN"]
    assert found[1].probabilities is None


def test_files_stream_in_order_a_batch_at_a_time(tmp_path: Path) -> None:
    """Of 300 files no more than a batch is decoded before answers are taken."""
    for i in range(300):
        Image.new("RGB", (8, 8), (i % 256, i // 256, 0)).save(tmp_path / f"{i:03}.bmp")
    batches: list[int] = []

    def answers_of(images: np.ndarray) -> tuple[np.ndarray, None]:
        batches.append(len(images))
        return images[:, 0, 0, :2].astype(float), None

    predictor = Predictor(answers_of, ("a", "b"), 8)
    answers = predict(predictor, [tmp_path], batch_size=64)
    assert next(answers).path.name == "000.bmp"
    assert batches == [64]
    rest = list(answers)
    assert batches == [64, 64, 64, 64, 44]
    for i, answer in enumerate(rest, start=1):
        assert answer.path.name == f"{i:03}.bmp"
        assert answer.probabilities is not None
        assert answer.probabilities.tolist() == [i % 256, i // 256]
