"""The model that is served: an exported file as it is, or a run exported in memory.

From several views, and where it cannot be exported, a run answers itself, exactly as `normlab
predict` has it answer.
"""

import hashlib
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from normlab.data import load
from normlab.data.cifar10.cache import read_cache
from normlab.data.cifar10.layouts import CLASS_NAMES
from normlab.data.images import Labels, Pixels
from normlab.data.pictures.reading import to_square
from normlab.errors import DataError, UnexportableError, UserError, install
from normlab.evaluation.prediction import (
    Predictor,
    onnx_predictor,
    require_single,
    run_predictor,
)
from normlab.formats.onnx_model import OnnxModel, open_onnx

if TYPE_CHECKING:  # with PyTorch, which an ONNX file does not need
    from normlab.runs import Run

_SAMPLES = 64


@dataclass(frozen=True)
class ServedModel:
    """What answers.

    Attributes:
        name: of the file or the run's folder.
        task: the run's `recipe.json`, as far as a file has it.
        checked: one sentence on how the model was compared with its run.
        sha256: of the ONNX file's content; None where the run itself answers.
        certificate: of the comparison with its run on all test images; None if there was none.
        views: of each picture, see `normlab.evaluation.prediction.run_predictor`.
        reason: why the run itself answers, or there was no comparison on all test images; it may
            name places of this machine.
    """

    name: str
    predictor: Predictor
    task: Any
    checked: str
    sha256: str | None = None
    certificate: dict[str, Any] | None = None
    views: str = "single"
    reason: str = ""

    def answers(self, images: Pixels) -> list[tuple[NDArray[np.floating], float | None]]:
        """Probabilities (K,) and familiarity, if it is known, of each of N images."""
        rows, near = self.predictor.answers(images)
        known: list[float | None] = [None] * len(rows) if near is None else near.tolist()
        return list(zip(rows, known, strict=True))


def open_served(path: str | Path | None, views: str = "single") -> ServedModel:
    """Open the model at `path`: a run's folder, an exported ONNX file; by default the latest run.

    Args:
        views: of each picture, by a run; see `normlab.evaluation.prediction.run_predictor`.

    Raises:
        UserError: there is none, it is of another kind, has no such views, or a package is missing.
        CertificateError: a run's export does not answer as the run does.
    """
    if path is not None and Path(path).suffix.lower() == ".onnx":
        require_single(path, views)
        return _from_file(Path(path))
    from normlab.runs import open_run

    run = open_run(path)
    if views != "single":
        return _run_itself(run, views)
    if find_spec("onnx") is None:
        raise UserError(f"serving a run needs the package onnx: {install('serve')}")
    try:
        return _exported(run)
    except UnexportableError as error:
        return _run_itself(run, views, reason=error.what)


def _run_itself(run: "Run", views: str, reason: str = "") -> ServedModel:
    predictor, checked = run_predictor(run, views=views), "the run itself answers"
    task = run.task.published()
    return ServedModel(_name(run), predictor, task, checked, views=views, reason=reason)


def _from_file(path: Path) -> ServedModel:
    onnx = open_onnx(path)
    certificate = onnx.metadata.get("certificate")
    if not isinstance(certificate, dict):
        certificate = None
    checked = "not known to have been compared with its run: it holds no certificate"
    if certificate is not None:
        checked = "compared with its run on all its test images when it was exported"
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    task = onnx.metadata.get("recipe")
    predictor = onnx_predictor(onnx, path)
    return ServedModel(path.name, predictor, task, checked, sha256, certificate)


def _exported(run: "Run") -> ServedModel:
    """Export in memory, with the whole certificate if the run's test images are at hand."""
    from normlab.core.tensors import digest
    from normlab.evaluation import held_out
    from normlab.interchange.onnx_graph import certified, described
    from normlab.interchange.writing import checked_against

    model, learnt, reason = run.model(), held_out.read(run), ""
    try:
        images = _test_images_at_hand(run)
        _, check = checked_against(run, images, run.kept, digest(model.state_dict()))
    except DataError as error:
        graph, _ = described(run, model, learnt)
        content = graph.SerializeToString()
        onnx = open_onnx(content)
        checked = f"{_compared_on_samples(run, onnx)}; its test images are not at hand"
        certificate, reason = None, str(error)
    else:
        content, found, _ = certified(run, model, images.x_test, check, learnt)
        onnx, certificate = open_onnx(content), found.as_dict()
        checked = f"compared with its run on all {found.test_images:,} test images: {found}"
    sha256, predictor = hashlib.sha256(content).hexdigest(), onnx_predictor(onnx, run.path)
    return ServedModel(
        *(_name(run), predictor, run.task.published(), checked, sha256, certificate), reason=reason
    )


def _name(run: "Run") -> str:
    return os.path.basename(os.path.abspath(run.path))


def _test_images_at_hand(run: "Run") -> Any:
    """The run's data, without fetching anything.

    Raises:
        DataError: they are elsewhere, or not those of the run.
    """
    if run.task.data == "cifar10" and read_cache() is None:
        raise DataError("CIFAR-10 is not in the cache (`normlab data fetch` brings it)")
    images = run.task.load()
    if images.sha256 != run.task.data_sha256:
        raise DataError(f"data {run.task.data!r} have changed since the training")
    return images


def _compared_on_samples(run: "Run", onnx: OnnxModel) -> str:
    from normlab.interchange.certificate import TOLERANCE, CertificateError

    size = onnx.image_size
    images = np.stack([to_square(p, size) for p in samples()[0][:_SAMPLES]])
    expected = run_predictor(run).answers(images)[0]
    difference = float(np.abs(onnx.probabilities(images) - expected).max())
    if not difference <= TOLERANCE:
        raise CertificateError(
            f"the exported model disagrees with its run: probabilities differ by {difference:.1e}"
        )
    return f"compared with its run on {_SAMPLES} samples, probabilities within {difference:.1e}"


def samples() -> tuple[Pixels, Labels]:
    """Pictures of CIFAR-10 that come with the package, (N, 32, 32, 3), and their labels (N,)."""
    data = load("sample")
    return data.x_test, data.y_test


def one_of_each_class() -> list[tuple[str, Pixels]]:
    """The first sample of each of CIFAR-10's classes: its name and pixels (32, 32, 3)."""
    pictures, labels = samples()
    return [(name, pictures[int(np.argmax(labels == k))]) for k, name in enumerate(CLASS_NAMES)]
