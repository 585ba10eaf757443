"""Eight bits: what they cost is measured and told, and too much of it is not written."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from scipy import stats

import normlab
from normlab.__main__ import run as command
from normlab.data import load
from normlab.errors import UserError
from normlab.formats.onnx_model import open_onnx
from normlab.interchange import export_run, onnx_graph, quantized
from normlab.interchange.certificate import CertificateError, Cost
from normlab.interchange.folding import fold
from normlab.interchange.steps import chain_of

# ONNX Runtime's quantiser recommends a preparation that folding has done.
pytestmark = [
    pytest.mark.usefixtures("undrawn"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> normlab.Run:
    folder = tmp_path_factory.mktemp("run") / "r"
    return normlab.train("fast79", out=folder, data="sample", epochs=1, threads=1)


@pytest.fixture(scope="module")
def exported(run: normlab.Run, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("int8") / "model.onnx"
    return export_run(run, out, int8=True, max_loss=0.2)


def test_the_file_holds_eight_bits_and_tells_its_cost(exported: Any, run: normlab.Run) -> None:
    model = onnx.load(exported.path)
    onnx.checker.check_model(model, full_check=True)
    kernels = [t for t in model.graph.initializer if len(t.dims) == 4]
    quantised = [t for t in kernels if t.data_type == onnx.TensorProto.INT8]
    cost = exported.certificate.cost
    assert len(kernels) - len(quantised) <= len(cost.kept_in_float)
    assert cost.bytes_of_int8 < 0.4 * cost.bytes_of_float
    served = open_onnx(exported.path)
    data = load("sample")
    answers = served.probabilities(data.x_test)
    expected = run.evaluate()
    right = (expected.predictions == data.y_test).mean()
    right_int8 = (answers.argmax(1) == data.y_test).mean()
    assert cost.accuracy == (right, right_int8)
    assert cost.loss == pytest.approx(right - right_int8)
    assert cost.changed_answers == (answers.argmax(1) != expected.predictions).mean()
    assert cost.calibration_error[0] == expected.calibration.error
    assert set(cost.milliseconds) == {"1", "256"}
    assert exported.certificate.reading.largest_difference == 0
    assert served.metadata["certificate"] == json.loads(exported.certificate.as_json())
    card = exported.card.read_text("utf-8")
    assert "eight bits lose" in card
    assert "McNemar" in card


def test_doubt_that_was_measured_in_float32_is_not_told(tmp_path: Path) -> None:
    run = normlab.train(
        "fast79", out=tmp_path / "r", data="sample", epochs=2, threads=1, validation=0.2
    )
    plain = export_run(run, tmp_path / "plain" / "model.onnx")
    eight = export_run(run, tmp_path / "eight" / "model.onnx", int8=True, max_loss=0.5)
    assert "doubt" in open_onnx(plain.path).metadata
    model = open_onnx(eight.path)
    assert not {"doubt", "rule"} & model.metadata.keys()
    assert [output.name for output in model.session.get_outputs()] == ["probabilities"]
    assert "was not measured in eight bits" in eight.card.read_text("utf-8")
    assert "was not measured" not in plain.card.read_text("utf-8")


def test_pictures_of_any_size_are_answered(exported: Any) -> None:
    model = open_onnx(exported.path)
    picture = np.random.default_rng(0).integers(0, 256, (1, 90, 41, 3), np.uint8)
    (answer,) = model.session.run(None, {"images": picture})
    assert answer.sum() == pytest.approx(1, abs=1e-5)


def test_above_the_loss_allowed_nothing_is_written(run: normlab.Run, tmp_path: Path) -> None:
    with pytest.raises(CertificateError, match="loses too much, nothing was written: eight bits"):
        export_run(run, tmp_path / "model.onnx", int8=True, max_loss=-1)
    assert list(tmp_path.iterdir()) == []


def test_layers_stay_in_float_where_that_is_worth_it(
    run: normlab.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = onnx_graph.build(fold(chain_of(run.model(), 32)), 10)
    first, last = "whitening", "output"
    tried: dict[tuple[str, ...], int] = {}

    def quantize(network: Any, _: Any, kept: tuple[str, ...]) -> Any:
        tried[kept] = len(tried)
        return kept

    def answers(network: Any, trial: np.ndarray) -> np.ndarray:
        wrong = {(): 30, (first,): 27, (last,): 20, (first, last): 18}
        changed = np.zeros(1000, int)
        changed[: wrong.get(network, 0) if isinstance(network, tuple) else 0] = 1
        return changed

    monkeypatch.setattr(quantized, "quantize", quantize)
    monkeypatch.setattr(quantized, "_answers", answers)
    kept, _ = quantized._decide(whole, np.zeros(1), np.zeros(1))
    assert set(tried) == {(), (first,), (last,), (first, last)}
    assert kept == (last,)  # 20 of 1,000 changed, and 18 are no more than 5 fewer


def test_the_paired_interval_is_that_of_differences() -> None:
    """Of the same size as a t interval of the 0, 1 and −1 of each image, which n makes normal."""
    generator = np.random.default_rng(0)
    first = generator.random(10_000) < 0.8
    second = np.where(generator.random(10_000) < 0.03, ~first, first)
    rest: dict[str, Any] = {
        **{"max_loss": 1, "kept_in_float": (), "changed_answers": 0, "milliseconds": {}},
        **{"processor": "", "calibration_error": (0, 0)},
    }
    cost = Cost.of(first, second, **rest)
    difference = first.astype(float) - second
    assert cost.loss == pytest.approx(difference.mean())
    expected = stats.norm.interval(0.95, difference.mean(), stats.sem(difference))
    assert cost.loss_interval == pytest.approx(expected, rel=1e-3)
    both = Cost.of(first, first, **rest)
    assert (both.loss, both.loss_interval, both.p_value) == (0, (0, 0), 1)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--int8", "--format", "web", "--out", "p"], "int8 is of format onnx, not web"),
        (["--max-loss", "1", "--out", "m.onnx"], "max_loss=0.01 is what int8 may cost: add int8"),
        (["--runtime", "r.tgz", "--out", "m.onnx"], "runtime is of format web, not onnx"),
        (["--browser", "b", "--format", "keras", "--out", "m.keras"], "browser is of format web"),
        (["--int8", "--max-loss", "-1", "--out", "m.onnx"], "-1"),
    ],
)
def test_mistakes(
    run: normlab.Run,
    in_tmp: Path,
    words: list[str],
    told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command(["export", str(run.path), *words]) == 2
    assert told in capsys.readouterr().err
    assert list(in_tmp.iterdir()) == []


def test_too_few_pictures_to_calibrate_with() -> None:
    with pytest.raises(UserError, match="19 training pictures are too few"):
        quantized._two_samples(np.zeros((19, 8, 8, 3), np.uint8))
