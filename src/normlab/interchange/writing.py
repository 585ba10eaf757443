"""Export a run: build the file in memory, check it on the whole test set, only then write it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normlab.core.files import write_atomic
from normlab.core.tensors import digest
from normlab.data import ImageData
from normlab.errors import UserError
from normlab.evaluation.evaluation import Evaluation, evaluate
from normlab.interchange.card import NAME, card, check_place
from normlab.interchange.certificate import Certificate, Check, certify
from normlab.interchange.companions import companions
from normlab.runs import Run
from normlab.text import shell, utf8

# Each format's ending and the modules it needs, which the extra of the same name installs.
FORMATS = {"onnx": (".onnx", ("onnx", "onnxruntime")), "keras": (".keras", ("h5py",))}


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
        unfolded: normalisations that were not folded, and why; one sentence each.
    """

    path: Path
    card: Path
    certificate: Certificate
    unfolded: tuple[str, ...]


def export_run(
    run: Run,
    out: str | Path,
    *,
    file_format: str = "onnx",
    weights: str = "kept",
    data: str | Path | Mapping[str, Any] | ImageData | None = None,
) -> Exported:
    """Write `run` as the file `out`, with a model card `README.md` beside it.

    The file's answers are first compared with the run's on all its test images.

    Args:
        data: where the run's data are now, if not where they were.

    Raises:
        UserError: an unknown format, an unfinished run, a network that cannot be exported, a place
            that cannot be written to or holds somebody's README, or a missing package.
        CertificateError: the answers differ; nothing was written.
    """
    path = Path(out)
    _check_request(run, path, file_format)
    model = run.model(weights)
    images = run.task.load(data)
    evaluation, check = checked_against(run, images, weights, digest(model.state_dict()))
    if file_format == "onnx":
        from normlab.interchange import onnx_graph

        content, certificate, unfolded = onnx_graph.certified(run, model, images.x_test, check)
    else:
        from normlab.interchange import keras_file

        content, certificate = keras_file.certified(run, model, images.x_test, check)
        unfolded = ()
    return _write(path, content, run, evaluation, certificate, unfolded)


def checked_against(
    run: Run, images: ImageData, weights: str, weights_sha256: str
) -> tuple[Evaluation, Check]:
    """The run's scores on its test images, and what certifies an exported model's answers there.

    Raises:
        UserError: these are not the images that the run was trained and tested on.
    """
    if images.sha256 != run.task.data_sha256:
        raise UserError(
            f"data {run.task.data!r} are not those that run {str(run.path)!r} was trained on "
            f"({images.sha256[:12]}… now, {run.task.data_sha256[:12]}… then): bring those back"
        )
    evaluation = evaluate(run, images, weights=weights)

    def check(exported: NDArray[np.floating], checked_with: str) -> Certificate:
        certificate = certify(
            evaluation.probabilities,
            exported,
            evaluation.labels,
            data=images.name,
            data_sha256=images.sha256,
            weights_sha256=weights_sha256,
            checked_with=checked_with,
        )
        certificate.require()
        return certificate

    return evaluation, check


def _check_request(run: Run, path: Path, file_format: str) -> None:
    if file_format not in FORMATS:
        raise UserError(f"unknown format {file_format!r}: choose one of {', '.join(FORMATS)}")
    suffix, modules = FORMATS[file_format]
    if path.suffix != suffix:
        raise UserError(f"out {str(path)!r}: a {file_format} file's name ends in {suffix}")
    if run.result is None:
        raise UserError(
            f"run {str(run.path)!r} is unfinished: go on with "
            f"`{shell(['normlab', 'train', '--resume', str(run.path)])}` first"
        )
    for module in modules:
        try:
            import_module(module)
        except ImportError:
            raise UserError(
                f"format {file_format} needs the package {module}: "
                f"pip install 'normlab[{file_format}]'"
            ) from None
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"out {str(path)!r} cannot be written: name a file in a folder of yours")
    check_place(path)


def _write(
    path: Path,
    content: bytes,
    run: Run,
    evaluation: Evaluation,
    certificate: Certificate,
    unfolded: tuple[str, ...],
) -> Exported:
    text = card(path, run, evaluation, certificate, unfolded)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content)
    for beside, text_of_it in (companions(path) if path.suffix == ".onnx" else {}).items():
        write_atomic(beside, text_of_it)
    beside = path.with_name(NAME)
    write_atomic(beside, utf8(text))
    return Exported(path, beside, certificate, unfolded)
