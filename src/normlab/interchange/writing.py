"""Export a run: build the file in memory, check it on the whole test set, only then write it."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from normlab.core.files import write_atomic
from normlab.core.tensors import digest
from normlab.data import ImageData
from normlab.errors import UserError, install
from normlab.evaluation import held_out
from normlab.evaluation.doubt import Doubt
from normlab.evaluation.evaluation import Evaluation, evaluate
from normlab.evaluation.held_out import Features
from normlab.interchange.card import NAME, card, check_place
from normlab.interchange.certificate import Certificate, Check, certify
from normlab.interchange.companions import companions
from normlab.runs import Run
from normlab.text import shell, utf8

MAX_LOSS = 0.005  # of accuracy, which eight bits may cost


@dataclass(frozen=True)
class Built:
    """What a format writes, certified.

    Attributes:
        files: contents by name; the first is the model, or the page to open.
        unfolded: normalisations that were not folded, and why.
    """

    files: dict[str, bytes]
    certificate: Certificate
    unfolded: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """A run's network to be exported with its data, and what its answers are compared with."""

    run: Run
    model: nn.Module
    images: ImageData
    evaluation: Evaluation
    check: Check
    learnt: tuple[Doubt, Features | None] | None
    name: str
    int8: bool
    max_loss: float
    runtime: Path | None
    browser: Path | None


def _onnx(job: Job) -> Built:
    from normlab.interchange import onnx_graph

    if job.int8:
        return _int8(job)
    content, certificate, unfolded = onnx_graph.certified(
        job.run, job.model, job.images.x_test, job.check, job.learnt
    )
    return Built({job.name: content, **companions(job.name)}, certificate, unfolded)


def _int8(job: Job) -> Built:
    from normlab.interchange import quantized

    content, certificate, unfolded = quantized.certified(
        job.run, job.model, job.images, job.evaluation, job.check, job.learnt, max_loss=job.max_loss
    )
    return Built({job.name: content, **companions(job.name)}, certificate, unfolded)


def _keras(job: Job) -> Built:
    from normlab.interchange import keras_file

    content, certificate = keras_file.certified(
        job.run, job.model, job.images.x_test, job.check, job.learnt
    )
    return Built({job.name: content}, certificate)


def _web(job: Job) -> Built:
    from normlab.interchange import web_page

    files, certificate, unfolded = web_page.certified(
        job.run,
        job.model,
        job.images.x_test,
        job.check,
        job.learnt,
        tarball=job.runtime,
        browser=job.browser,
    )
    return Built(files, certificate, unfolded)


@dataclass(frozen=True)
class Format:
    """A format of export.

    Attributes:
        suffix: the ending of the file's name; "" where a folder is written.
        modules: what it needs, which the extra `extra` installs.
        build: makes and certifies it.
    """

    suffix: str
    modules: tuple[str, ...]
    extra: str
    build: Callable[[Job], Built]


FORMATS = {
    "onnx": Format(".onnx", ("onnx", "onnxruntime"), "onnx", _onnx),
    "keras": Format(".keras", ("h5py",), "keras", _keras),
    "web": Format("", ("onnx", "onnxruntime"), "onnx", _web),
}

_OF = {"int8": "onnx", "runtime": "web", "browser": "web"}  # options that one format alone has


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
        path: the model's file, or the page to open.
        files: all that was written, the card too, with the bytes of each.
        unfolded: normalisations that were not folded, and why; one sentence each.
    """

    path: Path
    card: Path
    files: dict[Path, int]
    certificate: Certificate
    unfolded: tuple[str, ...]


def export_run(
    run: Run,
    out: str | Path,
    *,
    file_format: str = "onnx",
    weights: str = "kept",
    data: str | Path | Mapping[str, Any] | ImageData | None = None,
    int8: bool = False,
    max_loss: float | None = None,
    runtime: Path | None = None,
    browser: Path | None = None,
) -> Exported:
    """Write `run` as the file `out`, or with format web as the folder, with a card `README.md`.

    The file's answers are first compared with the run's on all its test images.

    Args:
        data: where the run's data are now, if not where they were.
        int8: with format onnx, in eight bits, unless that loses more than `max_loss` (a fraction;
            None for 0.005) of accuracy on the test images.
        runtime: with format web, the tarball of ONNX Runtime Web; by default npm gets it.
        browser: with format web, the program of a browser; by default Chromium or Chrome.

    Raises:
        UserError: an unknown format, an option of another one, an unfinished run, a network that
            cannot be exported, a place that cannot be written to or holds somebody's README, or a
            missing package.
        CertificateError: the answers differ; nothing was written.
    """
    own = {"int8": int8, "runtime": runtime, "browser": browser}
    path = _check_request(run, Path(out), file_format, own)
    if max_loss is not None and not int8:
        raise UserError(f"max_loss={max_loss:g} is what int8 may cost: add int8, or leave it out")
    model = run.model(weights)
    images = run.task.load(data)
    evaluation, check = checked_against(run, images, weights, digest(model.state_dict()))
    learnt = held_out.read(run, weights)
    job = Job(
        run=run,
        model=model,
        images=images,
        evaluation=evaluation,
        check=check,
        learnt=learnt,
        name=path.name,
        int8=int8,
        max_loss=MAX_LOSS if max_loss is None else max_loss,
        runtime=runtime,
        browser=browser,
    )
    built = FORMATS[file_format].build(job)
    text = card(path, run, evaluation, built.certificate, built.unfolded)
    path.parent.mkdir(parents=True, exist_ok=True)
    files = {path.with_name(NAME): utf8(text)}  # first: it says that the others are ours
    files |= {path.with_name(name): content for name, content in built.files.items()}
    for place, content in files.items():
        write_atomic(place, content)
    sizes = {place: len(content) for place, content in files.items()}
    return Exported(path, path.with_name(NAME), sizes, built.certificate, built.unfolded)


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

    def check(
        exported: NDArray[np.floating],
        checked_with: str,
        chosen: NDArray[np.integer] | None = None,
        familiarity: NDArray[np.floating] | None = None,
        *,
        agreeing: bool = True,
    ) -> Certificate:
        which = slice(None) if chosen is None else chosen
        near = evaluation.familiarity
        certificate = certify(
            evaluation.probabilities[which],
            exported,
            evaluation.labels[which],
            data=images.name,
            data_sha256=images.sha256,
            weights_sha256=weights_sha256,
            checked_with=checked_with,
            familiarity=None if near is None or familiarity is None else (near[which], familiarity),
        )
        if agreeing:
            certificate.require()
        return certificate

    return evaluation, check


def _check_request(run: Run, out: Path, file_format: str, own: Mapping[str, object]) -> Path:
    """The model's file.

    own: the options that one format alone has.
    """
    if file_format not in FORMATS:
        raise UserError(f"unknown format {file_format!r}: choose one of {', '.join(FORMATS)}")
    for name, value in own.items():
        if value and file_format != _OF[name]:
            raise UserError(f"{name} is of format {_OF[name]}, not {file_format}: leave it out")
    wanted = FORMATS[file_format]
    if wanted.suffix and out.suffix != wanted.suffix:
        raise UserError(f"out {str(out)!r}: a {file_format} file's name ends in {wanted.suffix}")
    if run.result is None:
        raise UserError(
            f"run {str(run.path)!r} is unfinished: go on with "
            f"`{shell(['normlab', 'train', '--resume', str(run.path)])}` first"
        )
    for module in wanted.modules:
        try:
            import_module(module)
        except ImportError:
            raise UserError(
                f"format {file_format} needs the package {module}: {install(wanted.extra)}"
            ) from None
    path = out if wanted.suffix else out / "index.html"
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"out {str(out)!r} cannot be written: name a file in a folder of yours")
    check_place(path)
    return path
