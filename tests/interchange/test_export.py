"""Exported files answer as their run does, and a file that does not is never written."""

import json
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnxruntime import InferenceSession

import normlab
from normlab import UserError
from normlab.__main__ import run as command
from normlab.core.tensors import write_tensors
from normlab.data import load
from normlab.data.changes import Changes
from normlab.evaluation.forward import logits_of
from normlab.interchange import export_run, keras_file, onnx_graph
from normlab.interchange.certificate import CertificateError, certify
from normlab.interchange.folding import fold
from normlab.interchange.keras_layers import layers_of
from normlab.interchange.steps import Chain, Conv, Dense, GlobalMax, MaxPool, Norm, chain_of
from normlab.layers import BatchNorm
from normlab.models import FastNet, NotebookNet
from normlab.runs import Run, Start, Task

# Keras 3.15's own conversions on this backend, with NumPy 2.
pytestmark = [
    pytest.mark.usefixtures("undrawn"),
    pytest.mark.filterwarnings(
        "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
    ),
]


def scrambled(run: Run) -> Run:
    """Give the run statistics of many updates, and γ that are negative and zero."""
    model = run.model()
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.running_mean.normal_(0, 0.5, generator=generator)
            module.running_var.uniform_(0.2, 2, generator=generator)
            assert module.weight is not None
            with torch.no_grad():
                module.weight.normal_(0.5, 0.5, generator=generator)
                module.weight[:2] = torch.tensor([0.0, -0.8])
    write_tensors(run.path / "last.safetensors", model.state_dict())
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("runs")
    small: dict[str, Any] = {"data": "sample", "epochs": 1, "threads": 1}
    return {
        name: scrambled(normlab.train(recipe, out=folder / name, norm=norm, **small))
        for name, recipe, norm in (
            ("notebook", "notebook", "batch"),
            ("plain", "notebook", "none"),
            ("fast", "fast79", "batch"),
        )
    }


@pytest.mark.parametrize("name", ["notebook", "plain", "fast"])
def test_onnx_answers_as_the_run(runs: dict[str, Run], name: str, tmp_path: Path) -> None:
    exported = export_run(runs[name], tmp_path / "model.onnx")
    model = onnx.load(exported.path)
    onnx.checker.check_model(model, full_check=True)
    way = [node for node in model.graph.node if not node.name.startswith("familiarity")]
    kinds = {node.op_type for node in way}
    assert not kinds & {"BatchNormalization", "Dropout"}
    if name != "fast":
        assert not kinds & {"Sub", "Mul"}
    session = InferenceSession(exported.path, providers=["CPUExecutionProvider"])
    (taken,) = session.get_inputs()
    given, *more = session.get_outputs()
    # Fast recipes hold out nothing, and so tell no familiarity.
    assert [output.name for output in more] == ["familiarity"] * (name != "fast")
    assert (taken.name, taken.type, taken.shape) == ("images", "tensor(uint8)", ["N", "H", "W", 3])
    assert (given.name, given.shape) == ("probabilities", ["N", 10])
    expected = runs[name].evaluate()
    x = load("sample").x_test
    for n in (1, 7, 200):
        (answers,) = session.run(["probabilities"], {"images": x[:n]})
        np.testing.assert_allclose(answers, expected.probabilities[:n], rtol=0, atol=1e-5)
    metadata = session.get_modelmeta().custom_metadata_map
    assert tuple(json.loads(metadata["class_names"])) == expected.class_names
    certificate = json.loads(metadata["certificate"])
    assert certificate == exported.certificate.as_dict()
    assert certificate["test_images"] == 200
    assert certificate["run_accuracy"] == expected.accuracy
    written = sorted(p.name for p in tmp_path.iterdir())
    assert written == ["README.md", "model.onnx", "predict.py", "requirements.txt"]


def test_a_model_of_somebody_elses_is_not_written_over(
    runs: dict[str, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("my.onnx", "my.keras"):
        path = tmp_path / name
        path.write_bytes(b"mine")
        words = [
            "export",
            str(runs["notebook"].path),
            "--out",
            str(path),
            "--format",
            path.suffix[1:],
        ]
        assert command(words) == 2
        assert "without a card that says normlab wrote it" in capsys.readouterr().err
        assert path.read_bytes() == b"mine"


def test_a_file_for_others_names_no_place_of_this_machine(
    runs: dict[str, Run], tmp_path: Path
) -> None:
    run = runs["fast"]
    start = Start(
        run="/home/me/runs/0007-fast",
        weights_sha256="ab" * 32,
        head="kept",
        freeze=False,
        statistics="adapt",
    )
    changes = Changes(exclude=("patients/jane doe.png",))
    task = replace(run.task, data="/home/me/pets", start=start, changes=changes)
    told = task.published()
    assert Task.from_dict(told) == replace(
        task, data="pets", start=replace(start, run="0007-fast"), changes=None
    )
    path = export_run(run, tmp_path / "model.onnx").path
    metadata = InferenceSession(path).get_modelmeta().custom_metadata_map
    assert json.loads(metadata["recipe"]) == run.task.published()


@pytest.mark.parametrize("size", [17, 32, 33])
@pytest.mark.parametrize("bounded", [True, False])
def test_either_way_around_relu(bounded: bool, size: int) -> None:
    """One bound for all channels, or a convolution of each channel: ONNX Runtime computes both."""
    model = NotebookNet(image_size=size, seed=3).eval()
    generator = torch.Generator().manual_seed(2)
    for i, norm in enumerate((model.batch_normalization_1, model.batch_normalization_2)):
        assert isinstance(norm, BatchNorm)
        assert norm.weight is not None
        assert norm.bias is not None
        norm.running_mean.uniform_(0.1, 0.5, generator=generator)
        with torch.no_grad():
            norm.weight.normal_(0, 1, generator=generator)
            norm.weight[3] = 0
            norm.bias[i] = 0 if bounded else 5 * norm.weight[i].sign()
    pixels = np.random.default_rng(0).integers(0, 256, (20, size, size, 3), dtype=np.uint8)
    graph = onnx_graph.build(fold(chain_of(model, size)), 10)
    count = Counter(node.op_type for node in graph.graph.node)
    assert (count["Clip"], count["Conv"], count["Add"]) == ((2, 3, 0) if bounded else (0, 5, 0))
    assert not set(count) & {"Mul", "Sub", "BatchNormalization"}
    session = InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    (answers,) = session.run(None, {"images": pixels})
    expected = logits_of(model, pixels).double().softmax(1)
    np.testing.assert_allclose(answers, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("position", ["before", "after"])
def test_blocks_that_add_their_input(position: str) -> None:
    model = FastNet(stages=((8, 8, 8, 8), (12, 12, 12)), norm_position=position, seed=2)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    model.fit_to(pixels)
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.running_var.uniform_(0.2, 2, generator=torch.Generator().manual_seed(0))
    graph = onnx_graph.build(fold(chain_of(model, 32)), 10)
    assert sum(node.op_type == "Add" for node in graph.graph.node) >= 3
    session = InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    (answers,) = session.run(None, {"images": pixels})
    expected = logits_of(model, pixels).double().softmax(1)
    np.testing.assert_allclose(answers, expected, rtol=0, atol=2e-6)
    with pytest.raises(UserError, match="add their input cannot be written as Keras"):
        layers_of(model, 32)


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("pooled", [True, False])
def test_what_a_normalisation_adds_at_the_border(pooled: bool, size: int) -> None:
    """By a convolution of ones, as many images of them as there are pictures."""
    rng = np.random.default_rng(0)
    mean, std = rng.uniform(100, 150, 3), rng.uniform(50, 70, 3)
    chain = Chain(
        size,
        (
            Norm("norm", mean, std, *rng.normal(1, 0.1, (2, 3))),
            Conv("inner", rng.normal(size=(4, 3, 3, 3)), rng.normal(size=4), 1),
            *([MaxPool()] if pooled else []),
            Norm("norm2", *rng.uniform(0.5, 1, (4, 4))),
            Conv("outer", rng.normal(size=(5, 4, 3, 3)) / 10, rng.normal(size=5), 1),
            GlobalMax(),
            Dense("output", rng.normal(size=(4, 5)), np.zeros(4)),
        ),
    )
    folded = fold(chain)
    assert not any(isinstance(s, Norm) for s in folded.steps)
    assert [s.of_ones is not None for s in folded.steps if isinstance(s, Conv)] == [True, True]
    pixels = rng.integers(0, 256, (7, size, size, 3), dtype=np.uint8)
    answers = [
        InferenceSession(
            onnx_graph.build(c, 4).SerializeToString(), providers=["CPUExecutionProvider"]
        ).run(None, {"images": pixels})[0]
        for c in (folded, chain)
    ]
    np.testing.assert_allclose(*answers, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["notebook", "plain", "fast"])
def test_plain_keras_answers_as_the_run(runs: dict[str, Run], name: str, tmp_path: Path) -> None:
    exported = export_run(runs[name], tmp_path / "new" / "model.keras", file_format="keras")
    assert exported.certificate.checked_with.startswith("Keras ")
    model = keras.models.load_model(exported.path)
    answers = model.predict(load("sample").x_test, verbose=0)
    expected = runs[name].evaluate().probabilities
    np.testing.assert_allclose(answers, expected, rtol=0, atol=1e-5)
    with zipfile.ZipFile(exported.path) as z:
        metadata = json.loads(z.read("metadata.json"))
    assert metadata["certificate"] == exported.certificate.as_dict()


def test_a_corrupted_graph_fails_its_certificate(
    runs: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph is damaged between building and checking; all else is as in real life."""
    build = onnx_graph.build

    def damaged(*arguments: Any) -> onnx.ModelProto:
        model = build(*arguments)
        kernel = next(t for t in model.graph.initializer if t.name == "conv3.0")
        array = numpy_helper.to_array(kernel).copy()
        array[:8] *= -1
        kernel.CopyFrom(numpy_helper.from_array(array, kernel.name))
        return model

    monkeypatch.setattr(onnx_graph, "build", damaged)
    out = tmp_path / "model.onnx"
    with pytest.raises(CertificateError, match="nothing was written: largest difference"):
        export_run(runs["notebook"], out)
    assert list(tmp_path.iterdir()) == []
    assert command(["export", str(runs["notebook"].path), "--out", str(out)]) == 1
    assert list(tmp_path.iterdir()) == []


def certified(expected: list[list[float]], exported: list[list[float]]) -> Any:
    return certify(
        np.array(expected),
        np.array(exported),
        np.zeros(len(expected), np.int64),
        data="d",
        data_sha256="s",
        weights_sha256="w",
        checked_with="c",
    )


def test_what_a_certificate_demands() -> None:
    assert certified([[0.6, 0.4]], [[0.60009, 0.39991]]).passed
    assert not certified([[0.6, 0.4]], [[0.60011, 0.39989]]).passed
    tie = certified([[0.50005, 0.49995]], [[0.49998, 0.50002]])
    assert tie.passed
    assert (tie.ties, tie.other_answers) == (1, 0)
    assert (tie.run_accuracy, tie.exported_accuracy) == (1.0, 0.0)
    swapped = certified([[0.50012, 0.49988]], [[0.49998, 0.50002]])
    assert swapped.other_answers == 1
    nothing = certified([[0.6, 0.4]], [[float("nan"), 0.4]])
    assert nothing.largest_difference is None
    assert not nothing.passed
    assert json.loads(nothing.as_json())["largest_difference"] is None
    with pytest.raises(CertificateError, match=r"\(1, 3\) where the run answers \(1, 2\)"):
        certified([[0.6, 0.4]], [[0.5, 0.3, 0.2]])


def test_the_card_says_what_a_user_needs(runs: dict[str, Run], tmp_path: Path) -> None:
    exported = export_run(runs["notebook"], tmp_path / "model.onnx")
    text = exported.card.read_text(encoding="utf-8")
    evaluation = runs["notebook"].evaluate()
    for needed in (
        f"{evaluation.accuracy:.4f} (95 % interval {evaluation.interval[0]:.4f}",
        "near-duplicates",
        "learning_rate 0.001",
        "airplane",
        exported.certificate.data_sha256,
        str(exported.certificate),
    ):
        assert needed.lower() in text.lower()
    export_run(runs["notebook"], tmp_path / "model.onnx")  # its own card is no obstacle
    with pytest.raises(UserError, match=r"not the card of other\.onnx"):
        export_run(runs["notebook"], tmp_path / "other.onnx")
    exported.card.write_text("# My project\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"not the card of model\.onnx"):
        export_run(runs["notebook"], tmp_path / "model.onnx")
    assert exported.card.read_text(encoding="utf-8") == "# My project\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "tflite", "--out", "m.tflite"], "unknown format 'tflite'"),
        (["--out", "m.keras"], "name ends in .onnx"),
        (["--out", "/dev/null/m.onnx"], "'/dev/null/m.onnx' cannot be written"),
        (["--weights", "first", "--out", "m.onnx"], "weights 'first'"),
    ],
)
def test_mistakes_take_one_line(
    runs: dict[str, Run],
    in_tmp: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert command(["export", str(runs["fast"].path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(in_tmp.iterdir()) == []


def test_fast_networks_of_every_kind_are_written_as_keras() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 19, 19, 3), dtype=np.uint8)
    for norm, position in (("batch", "after"), ("none", None)):
        model = FastNet(image_size=19, norm=norm, norm_position=position, seed=1)
        model.fit_to(pixels)
        content = keras_file.model_file("fast", layers_of(model, 19), 19, {})
        answers = keras_file.keras_answers(content, pixels)[0]
        expected = logits_of(model, pixels).double().softmax(1)
        np.testing.assert_allclose(answers, expected, rtol=0, atol=1e-6)


def test_a_notebook_network_with_other_settings_is_written_as_it_is() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 9, 9, 3), dtype=np.uint8)
    settings: dict[str, Any] = {"norm_epsilon": 0.1, "norm_momentum": 0.8, "logit_scale": 3.0}
    model = NotebookNet(image_size=9, seed=1, **settings)
    layers = layers_of(model, 9)
    norms = [layer.config for layer in layers if layer.kind == "BatchNormalization"]
    assert [(norm["epsilon"], norm["momentum"]) for norm in norms] == [(0.1, 0.8)] * 5
    answers, _ = keras_file.keras_answers(keras_file.model_file("notebook", layers, 9, {}), pixels)
    expected = logits_of(model, pixels).double().softmax(1)
    np.testing.assert_allclose(answers, expected, rtol=0, atol=1e-6)


def test_other_normalisers_are_refused() -> None:
    with pytest.raises(UserError, match="normaliser GroupNorm cannot be exported"):
        layers_of(FastNet(norm="group"), 32)
    fast, notebook = FastNet(), NotebookNet()
    fast.blocks[1].norm = torch.nn.InstanceNorm2d(64)
    notebook.batch_normalization_4 = torch.nn.LayerNorm(512)
    for model, name in ((fast, "InstanceNorm2d"), (notebook, "LayerNorm")):
        with pytest.raises(UserError, match=f"normaliser {name} cannot be exported"):
            layers_of(model, 32)
    with pytest.raises(UserError, match="network Linear cannot be written as Keras"):
        layers_of(torch.nn.Linear(2, 2), 32)
    with pytest.raises(UserError, match="norm_position=before cannot be written as Keras"):
        layers_of(NotebookNet(norm_position="before"), 32)


def test_without_keras_only_the_notebook_can_be_checked(
    runs: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keras_file, "find_spec", lambda name: None)
    exported = export_run(runs["plain"], tmp_path / "model.keras", file_format="keras")
    assert exported.certificate.checked_with.startswith("normlab's own reader")
    with pytest.raises(UserError, match="checked by Keras, which is not installed: pip install"):
        export_run(runs["fast"], tmp_path / "model.keras", file_format="keras")
    options: dict[str, Any] = {"norm_epsilon": 0.1, "epochs": 1, "batch_size": 64, "threads": 1}
    other = normlab.train("notebook", data="sample", out=tmp_path / "other", **options)
    with pytest.raises(UserError, match="checked by Keras, which is not installed: pip install"):
        export_run(other, tmp_path / "own" / "model.keras", file_format="keras")


def test_an_unfinished_run_is_refused(runs: dict[str, Run], tmp_path: Path) -> None:
    folder = tmp_path / "unfinished"
    folder.mkdir()
    (folder / "recipe.json").write_bytes((runs["plain"].path / "recipe.json").read_bytes())
    with pytest.raises(UserError, match="unfinished: go on with `normlab train --resume"):
        export_run(normlab.open_run(folder), tmp_path / "model.onnx")


def test_a_missing_package_is_named_with_the_remedy(
    runs: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"package onnxruntime: pip install 'onnx.*' 'onnxruntime"):
        export_run(runs["plain"], tmp_path / "model.onnx")


def test_the_doctor_knows_that_an_export_is_folded(runs: dict[str, Run], tmp_path: Path) -> None:
    found = normlab.doctor(export_run(runs["fast"], tmp_path / "model.onnx").path)
    [finding] = [f for f in found.findings if f.rule == "no-normalizer"]
    assert finding.severity == "note"
    assert "normlab exported it" in finding.evidence


def test_the_scale_of_the_answers_is_exported(tmp_path: Path) -> None:
    """Of the notebook's network, too, whose own scale is 1."""
    run = normlab.train(
        "notebook", out=tmp_path / "r", data="sample", epochs=1, threads=1, logit_scale=0.5
    )
    exported = export_run(run, tmp_path / "model.onnx")
    assert exported.certificate.largest_difference < 1e-5
    plain = normlab.train("notebook", out=tmp_path / "p", data="sample", epochs=1, threads=1)
    assert plain.result is not None
    assert run.result is not None
    assert run.result["weights_sha256"] != plain.result["weights_sha256"]
