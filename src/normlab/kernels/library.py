"""The compiled library: which variant is loaded, and whether it is to be used."""

import ctypes
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from struct import Struct
from typing import Any, NamedTuple

import torch

INTERFACE = 13  # as in kernels.c: raised there and here whenever a signature changes or is added


class _Off(threading.local):
    depth = 0  # how many blocks of `disabled` this thread is in


_off = _Off()


class Call(NamedTuple):
    """A call of a kernel that can be made again: it keeps the tensors whose addresses it has."""

    name: str
    values: list[Any]
    tensors: list[torch.Tensor]

    def __call__(self) -> None:
        self.ready()()

    def ready(self) -> Callable[[], None]:
        """The same call, with its values as they are now."""
        kernel, pack = _kernel(self.name)
        once = (
            partial(kernel, *self.values) if pack is None else partial(kernel, pack(*self.values))
        )

        def again() -> None:
            if once():
                raise MemoryError(f"normlab_{self.name}")

        return again


class _Noting(threading.local):
    calls: list[Call] | None = None  # that this thread makes inside of `noted`


_noting = _Noting()
_PLAIN = {int, float, bytes}  # a set is asked faster than isinstance

_POINTER, _INT, _LONG, _FLOAT, _DOUBLE = (
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_int64,
    ctypes.c_float,
    ctypes.c_double,
)
_DROPS = [ctypes.c_uint64, _LONG, ctypes.c_int32, _FLOAT]
_SHAPE = [_LONG, _LONG, _LONG]
_CONV = [*[_POINTER] * 3, *[_LONG] * 5, _INT, *[_POINTER] * 2, _INT]
_CONV_GRADIENT = [*[_POINTER] * 3, *[_LONG] * 5, *[_POINTER] * 2, _INT]
_STRUCTS = {  # the arguments of those that get them as one struct, as `struct` writes it
    "forward": "PP Qqif PPf qqqi PPddP PPP i",
    "gradient": "PPPPPPf if qqq PPP i",
}
_SIGNATURES: dict[str, list[Any]] = {
    "flush": [_INT, _INT],
    "relu_dropout": [_POINTER, *_DROPS, _LONG, _POINTER, _INT],
    "relu_dropout_gradient": [*[_POINTER] * 2, _FLOAT, _LONG, _POINTER, _INT],
    "normalize": [*[_POINTER] * 5, _FLOAT, *_SHAPE, _INT, _POINTER, _INT],
    "moments": [*[_POINTER] * 2, *_DROPS, *_SHAPE, *[_POINTER] * 2, _INT],
    "part_sums": [*[_POINTER] * 6, _FLOAT, _INT, *_SHAPE, *[_POINTER] * 3, _INT],
    "part_gradient": [
        *[*[_POINTER] * 6, _FLOAT, _INT, _FLOAT, *_SHAPE],
        *[_POINTER, _DOUBLE, _POINTER, _INT],
    ],
    "conv3x3_by2": _CONV,
    "conv3x3_by4": _CONV,
    "conv3x3_by2_gradient": _CONV_GRADIENT,
    "conv3x3_by4_gradient": _CONV_GRADIENT,
    "conv3x3_pooled_gradients": [*[_POINTER] * 4, *[_LONG] * 5, *[_POINTER] * 3, _INT],
    "conv_pixels": [*[_POINTER] * 5, *[_LONG] * 4, _POINTER, _INT],
    "conv_pixels_gradient": [*[_POINTER] * 5, *[_LONG] * 4, *[_POINTER] * 4, _INT],
    "adam": [ctypes.c_char_p, _LONG, *[_DOUBLE] * 3, _FLOAT, _INT],
    "dense": [*[_POINTER] * 3, *[_LONG] * 3, _POINTER, _INT],
    "dense_gradients": [*[_POINTER] * 3, *[_LONG] * 3, *[_POINTER] * 3, _INT],
    "small_dense": [*[_POINTER] * 3, *[_LONG] * 3, _POINTER, _INT],
    "small_dense_gradients": [*[_POINTER] * 3, *[_LONG] * 3, *[_POINTER] * 3, _INT],
    "right": [*[_POINTER] * 2, *[_LONG] * 2, _POINTER, _INT],
    "whiten": [*[_POINTER] * 3, *[_LONG] * 4, _POINTER, _INT],
    "read": [*[_POINTER] * 4, *[_LONG] * 3, _POINTER, _INT],
    "pool": [_POINTER, *[_LONG] * 4, *[_POINTER] * 2, _INT],
    "pool_gradient": [*[_POINTER] * 2, *[_LONG] * 4, _POINTER, _INT],
}
# What not every processor has, by the function that says whether this one does.
_SOME: dict[str, dict[str, list[Any]]] = {
    products: {
        f"conv3x3_by{side}_{products}{end}": types
        for side in (2, 4)
        for end, types in (("", _CONV), ("_gradient", _CONV_GRADIENT))
    }
    for products in ("bfloat16", "amx")
}


@cache
def _kernel(name: str) -> tuple[Callable[..., int], Callable[..., bytes] | None]:
    """The kernel, and what makes one struct of its arguments if it wants that."""
    library = _library()
    if library is None:
        raise ValueError(f"no kernels here for {name}: ask `layout` first")
    struct = _STRUCTS.get(name)
    return getattr(library, f"normlab_{name}"), Struct(f"@{struct}").pack if struct else None


@cache
def _library() -> ctypes.CDLL | None:
    """Load the variant for this processor, or None where none was built or it does not load."""
    variant = torch.backends.cpu.get_cpu_capability().lower()
    if variant not in ("avx512", "avx2"):
        variant = "default"
    if sys.platform == "darwin":  # where a library's symbols are hidden from others; not run yet
        for runtime in (Path(torch.__file__).parent / "lib").glob("lib*omp*.dylib"):
            ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)  # the one that PyTorch has loaded
    # The shortest name first: older builds have Python's version in theirs.
    for path in sorted(Path(__file__).parent.glob(f"_{variant}.*"), key=lambda p: len(p.name)):
        try:
            library = ctypes.CDLL(str(path))
            if library.normlab_interface() != INTERFACE:
                continue
            signatures = dict(_SIGNATURES)
            for has, types in _SOME.items():
                if getattr(library, f"normlab_{has}")():
                    signatures |= types
            for name, argtypes in signatures.items():
                getattr(library, f"normlab_{name}").argtypes = argtypes
            for name in _STRUCTS:
                getattr(library, f"normlab_{name}").argtypes = [ctypes.c_char_p]
        except (OSError, AttributeError):  # another platform's file, or an older build's
            continue
        return library
    return None


def enabled() -> bool:
    """Whether this thread is outside of `disabled`, and no compiler or tracer looks on."""
    return not (
        _off.depth
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call, unused-ignore]
        or torch.compiler.is_compiling()
    )


def available() -> bool:
    """Whether compiled kernels were built, load here, and are not disabled."""
    return not _off.depth and _library() is not None


@cache
def has_bfloat16() -> bool:
    """Whether the kernels were compiled with, and this processor has, products of bfloat16."""
    library = _library()
    return library is not None and bool(library.normlab_bfloat16())


@cache
def has_amx() -> bool:
    """Whether the same holds for AMX, whose products of bfloat16 are more at a time."""
    library = _library()
    return library is not None and bool(library.normlab_amx())


@contextmanager
def disabled() -> Iterator[None]:
    """Use PyTorch alone inside the block, in this thread."""
    _off.depth += 1
    try:
        yield
    finally:
        _off.depth -= 1


def call(name: str, *arguments: Any) -> None:
    """Call the kernel `name`; a tensor stands for the address of its values, None for no address.

    Raises:
        MemoryError: it could not get the memory it works in.
    """
    kernel, pack = _kernel(name)
    values = [a if type(a) in _PLAIN else 0 if a is None else a.data_ptr() for a in arguments]
    values.append(torch.get_num_threads())
    if _noting.calls is not None:
        tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
        _noting.calls.append(Call(name, values, tensors))
    if kernel(*values) if pack is None else kernel(pack(*values)):
        raise MemoryError(f"normlab_{name}")


@contextmanager
def noted() -> Iterator[list[Call]]:
    """Note the calls of kernels that this thread makes inside the block."""
    before, _noting.calls = _noting.calls, []
    try:
        yield _noting.calls
    finally:
        _noting.calls = before
