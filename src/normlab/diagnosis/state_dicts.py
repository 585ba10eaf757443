"""Describe a state dict: names and arrays, without the network that they belong to."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from normlab.core import files
from normlab.diagnosis.patient import Normalizer, Patient
from normlab.errors import DataError

TORCH_EPS, TORCH_OLD_WEIGHT = 1e-5, 0.9


def read_safetensors(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays in a safetensors file; types that NumPy lacks are widened to float32.

    Raises:
        DataError: the file is cut off, or is none.
    """
    try:
        tensors, _ = files.read_safetensors(path)
    except (SafetensorError, OSError) as e:
        raise DataError(f"{path} is not a whole safetensors file ({e})") from None
    from normlab.diagnosis.modules import array

    return {name: array(tensor) for name, tensor in tensors.items()}


def from_arrays(path: str, kind: str, arrays: Mapping[str, NDArray[Any]]) -> Patient:
    """Describe a state dict by the names that PyTorch gives: each `running_var` is a normaliser's.

    It says neither momentum nor ε, so PyTorch's defaults are taken for granted and said to be.
    """
    prefixes = [name.removesuffix("running_var") for name in arrays if _is_variance(name)]
    found = [_normalizer(prefix, arrays) for prefix in prefixes]
    return Patient(
        path=path,
        kind=kind,
        normalizers=tuple(found),
        tensors=arrays,
        assumes=" (taking PyTorch's defaults, momentum 0.1 and eps 1e-5, for granted)",
    )


def _is_variance(name: str) -> bool:
    return name == "running_var" or name.endswith(".running_var")


def _normalizer(prefix: str, arrays: Mapping[str, NDArray[Any]]) -> Normalizer:
    steps = arrays.get(prefix + "num_batches_tracked")
    return Normalizer(
        name=prefix.removesuffix(".") or "model",
        running_mean=_vector(arrays.get(prefix + "running_mean")),
        running_var=_vector(arrays[prefix + "running_var"]),
        weight=_vector(arrays.get(prefix + "weight")),
        eps=TORCH_EPS,
        old_weight=TORCH_OLD_WEIGHT,
        steps=int(steps) if steps is not None and steps.size == 1 else None,
    )


def _vector(values: NDArray[Any] | None) -> NDArray[np.float64] | None:
    return None if values is None else np.asarray(values, np.float64).reshape(-1)
