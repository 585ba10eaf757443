"""An ONNX file in eight bits: quantised after folding, calibrated on training pictures.

ONNX Runtime's own static quantisation (QDQ): weights int8 for each output channel, activations
uint8.
"""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from torch import nn

from normlab.core.machine import cpu_name
from normlab.data import ImageData
from normlab.errors import UserError
from normlab.evaluation.calibration import calibrate
from normlab.evaluation.doubt import Doubt
from normlab.evaluation.evaluation import Evaluation
from normlab.evaluation.held_out import Features
from normlab.formats.onnx_model import OnnxModel, open_onnx
from normlab.interchange import onnx_graph
from normlab.interchange.certificate import Certificate, Check, Cost
from normlab.interchange.reading_graph import with_reading
from normlab.runs import Run

CALIBRATION = 1000  # training pictures
TRIAL = 1000  # others of them, on which it is decided which layers stay as they are
# A layer stays in float32 if that changes fewer answers of the trial by more than this share.
WORTH_A_LAYER = 0.005
_BATCH = 100


def certified(
    run: Run,
    model: nn.Module,
    images: ImageData,
    evaluation: Evaluation,
    check: Check,
    learnt: tuple[Doubt, Features | None] | None,
    *,
    max_loss: float,
) -> tuple[bytes, Certificate, tuple[str, ...]]:
    """The file's content, its certificate, and which normalisations were not folded and why.

    Args:
        evaluation: of the run on the test images of `images`.
        max_loss: of accuracy on the test images, as a fraction.

    Raises:
        UserError: there are too few training pictures to calibrate with.
        CertificateError: it loses more accuracy, or reads pictures otherwise than training does.
    """
    size = run.task.image_size
    # Its temperature, but nothing of when to doubt: that was measured of answers in float32.
    whole, unfolded = onnx_graph.network(run, model, learnt and (learnt[0], None))
    calibration, trial = _two_samples(images.x_train)
    kept, network = _decide(whole, calibration, trial)
    before, graph = (
        onnx_graph.described_as(run, with_reading(g, size), unfolded, None)
        for g in (whole, network)
    )
    plain, eight = (open_onnx(g.SerializeToString(), threads=1) for g in (before, graph))
    answers = eight.probabilities(images.x_test)
    certificate = check(answers, f"ONNX Runtime {version('onnxruntime')}", agreeing=False)
    cost = _cost(evaluation, answers, plain, eight, images.x_test, kept, max_loss)
    sizes = [len(g.SerializeToString()) for g in (before, graph)]
    certificate = replace(
        certificate,
        reading=onnx_graph.check_reading(graph, images.x_test),
        cost=replace(cost, bytes_of_float=sizes[0], bytes_of_int8=sizes[1]),
    )
    certificate.require()
    graph.metadata_props.add(key="certificate", value=certificate.as_json())
    return graph.SerializeToString(), certificate, unfolded


def quantize(
    network: onnx.ModelProto,
    calibration: NDArray[np.uint8],
    kept: tuple[str, ...] = (),
) -> onnx.ModelProto:
    """`network` in eight bits but for the nodes `kept`; its ranges are those on `calibration`."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Batches(CalibrationDataReader):  # type: ignore[misc]  # without types
        def __init__(self) -> None:
            self.batches = _batches(calibration)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.batches, None)

    given = onnx.ModelProto()
    given.CopyFrom(network)  # what it is given, it changes
    # Otherwise it warns that its own folding has not been done.
    given.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        quantize_static(
            given,
            str(path),
            Batches(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            weight_type=QuantType.QInt8,
            activation_type=QuantType.QUInt8,
            nodes_to_exclude=[*kept, *_tail(network)],
        )
        quantised = onnx.load(path)
    del quantised.metadata_props[:]
    return quantised


def _tail(network: onnx.ModelProto) -> list[str]:
    """The softmax: its results would be steps of 1/255."""
    return [node.name for node in network.graph.node if "probabilities" in node.output]


def _batches(images: NDArray[np.uint8]) -> Iterator[dict[str, Any]]:
    for i in range(0, len(images), _BATCH):
        yield {"images": np.ascontiguousarray(images[i : i + _BATCH])}


def _two_samples(images: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Training pictures to calibrate with, and others to decide on; the same at every export."""
    if len(images) < 20:
        raise UserError(
            f"{len(images)} training pictures are too few to calibrate eight bits with: "
            "export without --int8"
        )
    order = np.random.default_rng(0).permutation(len(images))
    first = min(CALIBRATION, len(images) // 2)
    return images[np.sort(order[:first])], images[np.sort(order[first : first + TRIAL])]


def _decide(
    whole: onnx.ModelProto, calibration: NDArray[np.uint8], trial: NDArray[np.uint8]
) -> tuple[tuple[str, ...], onnx.ModelProto]:
    """Which of the first and the last layer stay in float32, and the network so quantised.

    None, unless that changes more answers of the trial, by `WORTH_A_LAYER`, than the best choice.
    """
    layers = [n.name for n in whole.graph.node if n.op_type in ("Conv", "Gemm")]
    expected = _answers(whole, trial)
    tried = []
    for first, last in product((False, True), repeat=2):
        kept = tuple(dict.fromkeys(layers[:1] * first + layers[-1:] * last))
        network = quantize(whole, calibration, kept)
        tried.append((kept, network, float((_answers(network, trial) != expected).mean())))
    best = min(changed for _, _, changed in tried)
    tried.sort(key=lambda choice: len(choice[0]))
    kept, network, _ = next(t for t in tried if t[2] <= best + WORTH_A_LAYER)
    return kept, network


def _answers(network: onnx.ModelProto, images: NDArray[np.uint8]) -> NDArray[np.integer]:
    import onnxruntime

    session = onnxruntime.InferenceSession(
        network.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    parts = [session.run(None, batch)[0].argmax(1) for batch in _batches(images)]
    return np.concatenate(parts)


def _cost(
    evaluation: Evaluation,
    answers: NDArray[np.floating],
    plain: OnnxModel,
    eight: OnnxModel,
    images: NDArray[np.uint8],
    kept: tuple[str, ...],
    max_loss: float,
) -> Cost:
    labels = evaluation.labels
    return Cost.of(
        evaluation.predictions == labels,
        answers.argmax(1) == labels,
        changed_answers=float((answers.argmax(1) != evaluation.predictions).mean()),
        max_loss=max_loss,
        kept_in_float=kept,
        calibration_error=(
            evaluation.calibration.error,
            calibrate(answers.astype(np.float64), labels).error,
        ),
        milliseconds={
            str(batch): (_milliseconds(plain, images, batch), _milliseconds(eight, images, batch))
            for batch in (1, 256)
        },
        processor=cpu_name(),
    )


def _milliseconds(model: OnnxModel, images: NDArray[np.uint8], batch: int) -> float:
    """The median time of a batch, on one thread."""
    part = np.ascontiguousarray(images[np.arange(batch) % len(images)])
    model.probabilities(part)
    times = []
    for _ in range(200 if batch == 1 else 9):
        started = time.perf_counter()
        model.probabilities(part)
        times.append(time.perf_counter() - started)
    return 1000 * float(np.median(times))
