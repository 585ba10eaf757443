"""The compiled library: which variant is loaded, and whether it is to be used."""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

INTERFACE = 4  # as in kernels.c: raised there and here whenever a signature changes

_off = threading.local()
_VALUES = {int, float, type(None)}  # what C gets as it is; a set is asked faster than isinstance

_POINTER, _INT, _LONG, _FLOAT, _DOUBLE = (
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_int64,
    ctypes.c_float,
    ctypes.c_double,
)
_SHAPE = [_LONG, _LONG, _LONG]
_SIGNATURES = {
    "normlab_forward": [
        *[*[_POINTER] * 3, ctypes.c_int32, _FLOAT],  # x, z, draws, threshold, scale
        *[_POINTER, _POINTER, _FLOAT, *_SHAPE, _INT],  # weight, bias, eps, relu
        *[_POINTER, _POINTER, _DOUBLE, _DOUBLE, _POINTER],  # running statistics, see `Running`
        *[_POINTER, _POINTER, _POINTER, _INT],  # mean, variance, y
    ],
    "normlab_relu_dropout": [*[_POINTER] * 2, ctypes.c_int32, _FLOAT, _LONG, _POINTER, _INT],
    "normlab_relu_dropout_gradient": [*[_POINTER] * 2, _FLOAT, _LONG, _POINTER, _INT],
    "normlab_normalize": [*[_POINTER] * 5, _FLOAT, *_SHAPE, _INT, _POINTER, _INT],
    "normlab_gradient": [
        *[*[_POINTER] * 6, _FLOAT],  # x, g, mean, var, weight, bias, eps
        *[_INT, _FLOAT, *_SHAPE, *[_POINTER] * 3, _INT],  # relu, keep_scale
    ],
    "normlab_conv3x3": [*[_POINTER] * 3, *[_LONG] * 5, _INT, *[_POINTER] * 2, _INT],
    "normlab_conv3x3_gradient": [*[_POINTER] * 3, *[_LONG] * 5, *[_POINTER] * 2, _INT],
    "normlab_conv_pixels": [*[_POINTER] * 3, *[_LONG] * 4, _POINTER, _INT],
    "normlab_conv_pixels_gradient": [*[_POINTER] * 2, *[_LONG] * 4, *[_POINTER] * 2, _INT],
    "normlab_pool": [_POINTER, *[_LONG] * 4, *[_POINTER] * 2, _INT],
    "normlab_pool_gradient": [*[_POINTER] * 2, *[_LONG] * 4, _POINTER, _INT],
}


@cache
def _kernel(name: str) -> Any:
    library = _library()
    if library is None:
        raise ValueError(f"no kernels here for {name}: ask `layout` first")
    return getattr(library, f"normlab_{name}")


@cache
def _library() -> ctypes.CDLL | None:
    """Load the variant for this processor, or None where none was built or it does not load."""
    variant = torch.backends.cpu.get_cpu_capability().lower()
    if variant not in ("avx512", "avx2"):
        variant = "default"
    for path in sorted(Path(__file__).parent.glob(f"_{variant}.*")):
        try:
            library = ctypes.CDLL(str(path))
            if library.normlab_interface() != INTERFACE:
                continue
            for name, argtypes in _SIGNATURES.items():
                getattr(library, name).argtypes = argtypes
        except (OSError, AttributeError):  # another platform's file, or an older build's
            continue
        return library
    return None


def available() -> bool:
    """Whether compiled kernels were built, load here, and are not disabled."""
    return not getattr(_off, "depth", 0) and _library() is not None


@contextmanager
def disabled() -> Iterator[None]:
    """Use PyTorch alone inside the block, in this thread."""
    _off.depth = getattr(_off, "depth", 0) + 1
    try:
        yield
    finally:
        _off.depth -= 1


def call(name: str, *arguments: Any) -> None:
    """Call the kernel `name`; a tensor stands for the address of its values.

    Raises:
        MemoryError: it could not get the memory it works in.
    """
    values = [a if type(a) in _VALUES else a.data_ptr() for a in arguments]
    if _kernel(name)(*values, torch.get_num_threads()):
        raise MemoryError(f"normlab_{name}")
