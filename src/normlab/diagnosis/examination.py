"""`normlab.doctor`: from a model, in whatever form, to a diagnosis."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from normlab.core.sandbox import LimitError, limited
from normlab.data import ImageData, load
from normlab.diagnosis.findings import SEVERITIES, Diagnosis, Finding
from normlab.diagnosis.modules import Samples, from_module, from_run
from normlab.diagnosis.patient import FACTS, Batches, Patient
from normlab.diagnosis.rules import RULES
from normlab.errors import DataError, UserError
from normlab.evaluation.population import evenly
from normlab.runs.run import Run, open_run

SECONDS = 30.0  # that reading one file may take


def doctor(
    subject: nn.Module | Run | str | Path,
    data: Any = None,
    *,
    weights: str = "last",
    batch_size: int | None = None,
    accumulation: int | None = None,
) -> Diagnosis:
    """Name what is wrong with a batch-normalised model; docs/doctor.md lists the rules.

        normlab.doctor(model, data=(images, labels))

    Args:
        subject: a live module, which is left as it was; a run or its folder; or a file: a
            safetensors or PyTorch state dict, a `.keras` file, an ONNX graph. Files are read,
            never executed.
        data: for a module or a run: what `normlab.load` takes, whose training images give
            statistics and whose test images are scored; for a module also `(images, labels)`:
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
        return examine(from_run(run, weights, None if data is None else load(data)))
    if data is not None:
        raise UserError(
            f"data with {str(subject)!r}: a file's network cannot be run; give a run, or call "
            "normlab.doctor(model, data=…) in Python"
        )
    return examine(read(Path(subject)))


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


def read(path: Path) -> Patient:
    """Describe the model in a file, by its suffix.

    Raises:
        UserError: no such file, an unknown suffix, or a damaged file.
    """
    from normlab.diagnosis import keras_files, onnx_files, state_dicts
    from normlab.formats import torch_files

    if not path.is_file():
        raise DataError(f"{path} does not exist: name a run's folder or a model's file")
    match path.suffix.lower():
        case ".safetensors":
            arrays = state_dicts.read_safetensors(path)
            return state_dicts.from_arrays(str(path), "safetensors state dict", arrays)
        case ".pt" | ".pth" | ".bin" | ".ckpt":
            arrays = torch_files.read_torch(path)
            return state_dicts.from_arrays(str(path), "PyTorch state dict", arrays)
        case ".keras":
            return _limited(keras_files.read_keras, path)
        case ".onnx":
            return _limited(onnx_files.read_onnx, path)
    raise UserError(
        f"{path} is of no known form: give a run's folder, .safetensors, .pt, .pth, .keras or .onnx"
    )


def _limited(reader: Callable[[Path], Patient], path: Path) -> Patient:
    """What `reader` makes of a file whose format a library in C reads."""
    memory = (1 << 30) + 16 * path.stat().st_size
    try:
        return limited(reader, path, memory=memory, seconds=SECONDS)
    except LimitError as e:
        raise LimitError(f"{path}: {e}") from None


def _assumption(patient: Patient) -> tuple[str, ...]:
    assumed = patient.assumes.strip(" ()")
    return (f"Examined {assumed}",) if assumed else ()


def examine(patient: Patient) -> Diagnosis:
    """Check every rule for which there is what it needs."""
    findings: list[Finding] = []
    checked: list[str] = []
    not_checked: dict[str, str] = {}
    known = patient.facts
    for rule in RULES:
        missing = [need for need in rule.needs if need not in known]
        if missing:
            not_checked[rule.id] = FACTS[missing[0]]
            continue
        checked.append(rule.id)
        findings += [
            Finding(rule.id, s.where, s.severity, s.evidence, rule.remedy, rule.source)
            for s in rule.check(patient)
        ]
    findings.sort(key=lambda f: -SEVERITIES.index(f.severity))
    return Diagnosis(
        path=patient.path,
        kind=patient.kind,
        normalizers=len(patient.normalizers),
        findings=tuple(findings),
        checked=tuple(checked),
        not_checked=not_checked,
        caveats=(*_assumption(patient), *patient.caveats),
    )
