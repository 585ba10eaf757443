"""`normlab.doctor`: from a model, in whatever form, to a diagnosis."""

import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from normlab.core.sandbox import LimitError, limited
from normlab.data import ImageData, load
from normlab.data.cifar10.cache import read_cache
from normlab.diagnosis.findings import SEVERITIES, Diagnosis, Finding
from normlab.diagnosis.modules import Samples, from_module, from_run
from normlab.diagnosis.network import FACTS, Batches, Network
from normlab.diagnosis.rules import RULES
from normlab.errors import DataError, UserError
from normlab.evaluation.population import evenly
from normlab.runs import Run, open_run

SECONDS = 30.0  # that reading one file may take


def doctor(
    subject: nn.Module | Run | str | Path,
    data: Any = None,
    *,
    weights: str = "kept",
    batch_size: int | None = None,
    accumulation: int | None = None,
) -> Diagnosis:
    """Name what is wrong with a batch-normalised model; docs/doctor.md lists the rules.

        normlab.doctor(model, data=(images, labels))

    Args:
        subject: a live module, which is left as it was; a run or its folder; or a file: of
            `torch.save` or TorchScript, safetensors, of Keras, an ONNX graph. Files are read, never
            executed.
        data: for a module or a run: what `normlab.load` takes, whose training images give
            statistics and whose test images are scored; None for a run's own, if they are at hand
            as they were. For a module also `(images, labels)`:
            a tensor (N, C, *) as the network takes it, or a dictionary of its keyword arguments,
            and labels (N,) or None.
        weights: of a run: `last`, `best` or `recalibrated`.
        batch_size: of a module: how many images are normalised together in training.
        accumulation: of a module: how many batches' gradients make one update.

    Raises:
        UserError: nothing there, of no known form, or damaged; data that do not fit.
    """
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size={batch_size}: choose 1 or more")
    if isinstance(subject, nn.Module):
        samples, count = _samples(data)
        last = None
        if batch_size is not None and count is not None:
            last = count % batch_size or batch_size
        batches = Batches(size=batch_size, last=last, accumulation=accumulation)
        return examine(from_module(subject, samples, batches))
    if not isinstance(subject, Run | str | Path):
        raise UserError(
            f"a {type(subject).__name__} cannot be examined: give a torch.nn.Module, a run or a "
            "file's name"
        )
    if isinstance(subject, Run) or Path(subject).is_dir():
        run = subject if isinstance(subject, Run) else open_run(subject)
        return examine(from_run(run, weights, _own_data(run) if data is None else load(data)))
    if data is not None:
        raise UserError(
            f"data with {str(subject)!r}: a file's network cannot be run; give a run, or call "
            "normlab.doctor(model, data=…) in Python"
        )
    return examine_all(read(Path(subject)))


def _own_data(run: Run) -> ImageData | None:
    """The data that a run was trained on, if they are at hand and unchanged; nothing is fetched."""
    if run.task.data == "cifar10" and read_cache() is None:
        return None
    try:
        images = run.task.load()
    except UserError:
        return None
    return images if images.sha256 == run.task.data_sha256 else None


def _samples(data: Any) -> tuple[Samples | None, int | None]:
    """Images to run through a module, and how many there are to train on."""
    if data is None:
        return None, None
    if isinstance(data, tuple):
        if len(data) != 2:
            raise UserError(f"data of {len(data)} parts: give (images, labels); labels may be None")
        images, labels = data
        inputs = list(images.values()) if isinstance(images, Mapping) else [images]
        if not inputs or not all(isinstance(x, Tensor) and x.ndim for x in inputs):
            raise UserError(
                f"data=({type(images).__name__}, …): give images as a torch.Tensor, or a "
                "dictionary of tensors that the network takes as keyword arguments"
            )
        if len({len(x) for x in inputs}) > 1:
            raise UserError(f"images of {[len(x) for x in inputs]} rows: give each the same number")
        if any(x.is_floating_point() and not x.isfinite().all() for x in inputs):
            raise UserError("the images hold NaN or infinite values: leave these images out")
        return Samples(images, images, labels), len(inputs[0])
    found: ImageData = load(data)
    return Samples(evenly(found.x_train), found.x_test, found.y_test), len(found.x_train)


def read(path: Path) -> tuple[Network, ...]:
    """Describe the models in a file: by what it holds, whatever it is called.

    Raises:
        UserError: no such file, one of no known form, or a damaged one.
    """
    from normlab.diagnosis import keras_files, onnx_files, state_dicts
    from normlab.formats import torch_files

    if not path.is_file():
        raise DataError(f"{path} does not exist: name a run's folder or a model's file")
    suffix = path.suffix.lower()
    if torch_files.is_torch(path) or suffix in (".pt", ".pth", ".bin", ".ckpt", ".tar", ".pkl"):
        return state_dicts.from_torch_file(str(path), torch_files.read_torch(path))
    if suffix in (".keras", ".h5", ".hdf5") or _begins_as_keras(path):
        return (_limited(keras_files.read_keras, path),)
    if suffix == ".onnx":
        return (_limited(onnx_files.read_onnx, path),)
    if suffix == ".safetensors":
        arrays = state_dicts.read_safetensors(path)
        return (state_dicts.from_arrays(str(path), "safetensors state dict", arrays),)
    raise UserError(
        f"{path} is of no known form: give a run's folder, .safetensors, a file of torch.save or "
        "TorchScript (.pt, .pth), of Keras (.keras, .h5), or .onnx"
    )


def _begins_as_keras(path: Path) -> bool:
    """Whether it is HDF5, or a zip with a description of layers."""
    with open(path, "rb") as f:
        if f.read(8) == b"\x89HDF\r\n\x1a\n":
            return True
    try:
        with zipfile.ZipFile(path) as archive:
            return "config.json" in archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False


def _limited(reader: Callable[[Path], Network], path: Path) -> Network:
    """What `reader` makes of a file whose format a library in C reads."""
    memory = (1 << 30) + 16 * path.stat().st_size
    try:
        return limited(reader, path, memory=memory, seconds=SECONDS)
    except LimitError as e:
        raise LimitError(f"{path}: {e}") from None


def examine_all(networks: Sequence[Network]) -> Diagnosis:
    """One diagnosis of all that lies in a file; a finding names the part that it is in.

    A part without a normaliser, such as a head, is no fault beside one that has some.
    """
    diagnoses = [examine(network) for network in networks]
    if len(diagnoses) == 1:
        return diagnoses[0]
    found_some = any(p.normalizers or p.unread for p in networks)
    findings = [
        replace(f, where=f"{network.part or 'the file'}: {f.where}")
        for network, diagnosis in zip(networks, diagnoses, strict=True)
        for f in diagnosis.findings
        if f.rule != "no-normalizer" or not found_some
    ]
    checked = [rule.id for rule in RULES if any(rule.id in d.checked for d in diagnoses)]
    missing = {rule: need for d in diagnoses for rule, need in d.not_checked.items()}
    return replace(
        diagnoses[0],
        normalizers=sum(d.normalizers for d in diagnoses),
        findings=_sorted(findings),
        checked=tuple(checked),
        not_checked={rule: need for rule, need in missing.items() if rule not in checked},
        parts={network.part or "the file": len(network.normalizers) for network in networks},
        assumes=next((d.assumes for d in diagnoses if d.assumes), ""),
    )


def _sorted(findings: list[Finding]) -> tuple[Finding, ...]:
    return tuple(sorted(findings, key=lambda f: -SEVERITIES.index(f.severity)))


def examine(network: Network) -> Diagnosis:
    """Check every rule for which there is what it needs."""
    findings: list[Finding] = []
    checked: list[str] = []
    not_checked: dict[str, str] = {}
    known = network.facts
    for rule in RULES:
        missing = [need for need in rule.needs if need not in known]
        if missing:
            not_checked[rule.id] = FACTS[missing[0]]
            continue
        checked.append(rule.id)
        findings += [
            Finding(rule.id, s.where, s.severity, s.evidence, rule.remedy, rule.source)
            for s in rule.check(network)
        ]
    return Diagnosis(
        path=network.path,
        kind=network.kind,
        normalizers=len(network.normalizers),
        findings=_sorted(findings),
        checked=tuple(checked),
        not_checked=not_checked,
        parts={network.part: len(network.normalizers)} if network.part else {},
        passed_over=network.passed_over,
        assumes=network.assumes.removeprefix(" (taking ").removesuffix(", for granted)"),
        caveats=network.caveats,
    )
