"""Describe state dicts: names and arrays, without the network that they belong to."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from normlab.core import tensors as tensor_files
from normlab.diagnosis.network import Network, Normalizer
from normlab.errors import DataError
from normlab.formats.torch_files import StateDict, TorchFile

Arrays = dict[str, NDArray[Any]]
Settings = Mapping[str, float | None]

TORCH_EPS, TORCH_OLD_WEIGHT = 1e-5, 0.9
ASSUMED = "PyTorch's defaults, momentum 0.1 and eps 1e-5"
# How a running variance may be called, and with it the mean and γ.
_NAMES = {
    "running_var": ("running_mean", "weight"),
    "moving_variance": ("moving_mean", "gamma"),
    "moving_var": ("moving_mean", "gamma"),
}


def read_safetensors(path: Path) -> Arrays:
    """The arrays in a safetensors file; types that NumPy lacks are widened to float32.

    Raises:
        DataError: the file is cut off, or is none.
    """
    try:
        tensors, _ = tensor_files.read_safetensors(path)
    except (SafetensorError, OSError) as e:
        raise DataError(f"{path} is not a whole safetensors file ({e})") from None
    from normlab.diagnosis.modules import array

    return {name: array(tensor) for name, tensor in tensors.items()}


def from_torch_file(path: str, file: TorchFile) -> tuple[Network, ...]:
    """Describe each state dict in a file that PyTorch wrote."""
    return tuple(
        _patient(path, "PyTorch state dict", found, file.passed_over) for found in file.state_dicts
    )


def from_arrays(path: str, kind: str, arrays: Arrays) -> Network:
    """Describe a state dict by the names that PyTorch gives."""
    return _patient(path, kind, StateDict("", arrays, {}, {}), ())


def _patient(path: str, kind: str, found: StateDict, passed_over: tuple[str, ...]) -> Network:
    """Each running variance is a normaliser's.

    A state dict says neither momentum nor ε, so PyTorch's defaults are taken for granted and said
    to be. A whole module that was saved says both.
    """
    normalizers: list[Normalizer] = []
    unread: dict[str, str] = {}
    broken: list[str] = []  # prefixes
    assumes = ""
    for prefix, variance in _places((*found.arrays, *found.unread)).items():
        layer = prefix.rstrip("._/") or "model"
        settings = found.settings.get(layer if prefix else "", {})
        if {"eps", "momentum"} <= settings.keys():
            said: Settings = settings
        elif variance == "running_var":
            said, assumes = {"eps": TORCH_EPS, "momentum": 1 - TORCH_OLD_WEIGHT}, ASSUMED
        else:
            said = {}
        try:
            normalizers.append(_normalizer(layer, prefix, variance, found, said))
        except DataError as e:
            unread[layer] = str(e)
            broken.append(prefix)
    homes = {prefix.rstrip(".") for prefix in broken}
    return Network(
        path=path,
        kind=kind,
        normalizers=tuple(normalizers),
        tensors=found.arrays,
        assumes=f" (taking {assumes}, for granted)" if assumes else "",
        part=found.place,
        unread=unread,
        unread_tensors={k: v for k, v in found.unread.items() if k.rpartition(".")[0] not in homes},
        passed_over=passed_over,
    )


def _places(names: Iterable[str]) -> dict[str, str]:
    """The beginnings of names that a running variance or mean goes on from, with its name."""
    found: dict[str, str] = {}
    for name in names:
        for variance, (mean, _) in _NAMES.items():
            for end in (variance, mean):
                if name.endswith(end):
                    found.setdefault(name.removesuffix(end), variance)
    return found


def _normalizer(
    layer: str, prefix: str, variance: str, found: StateDict, settings: Settings
) -> Normalizer:
    """
    Raises:
        DataError: a vector of it could not be read, or does not fit the others.
    """
    mean_name, scale_name = _NAMES[variance]
    var = _vector(prefix + variance, found)
    mean = _vector(prefix + mean_name, found)
    weight = _vector(prefix + scale_name, found)
    if var is None or mean is None:
        raise DataError(f"it has no {variance if var is None else mean_name}")
    sizes = [v.size for v in (var, mean, weight) if v is not None]
    if len(set(sizes)) > 1:
        raise DataError(f"its vectors have {', '.join(map(str, sizes))} channels")
    if not var.size:
        raise DataError("it has no channels")
    momentum = settings.get("momentum")
    return Normalizer(
        name=layer,
        running_mean=mean,
        running_var=var,
        weight=weight,
        eps=settings.get("eps"),
        decay=None if momentum is None else 1 - momentum,
        steps=_steps(found.arrays.get(prefix + "num_batches_tracked")),
    )


def _steps(count: NDArray[Any] | None) -> int | None:
    """The counter of batches, where it is one."""
    if count is None or count.size != 1 or count.dtype.kind not in "iuf":
        return None
    value = float(count.reshape(()))
    return int(value) if np.isfinite(value) and value >= 0 else None


def _vector(name: str, found: StateDict) -> NDArray[np.float64] | None:
    if name in found.unread:
        raise DataError(f"{name.rpartition('.')[2]}: {found.unread[name]}")
    values = found.arrays.get(name)
    if values is None:
        return None
    if values.dtype.kind not in "iufb":
        raise DataError(f"{name.rpartition('.')[2]} holds numbers of type {values.dtype}")
    return np.asarray(values, np.float64).reshape(-1)
