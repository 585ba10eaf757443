"""Read the pickles of CIFAR-10 without running anything in them.

Python's unpickler calls whatever a file tells it to call. This reader never calls anything: it
follows the opcodes of protocols 2 to 5 that a batch file consists of, keeps the mention of a
function as a `Call` with its arguments, and lets NumPy arrays be rebuilt from their raw bytes by
`as_array`. Any other function, and any other opcode, is refused. Memory is bounded by the bytes
of the file and by `MAX_OPCODES`.
"""

import math
import pickletools
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normlab.errors import DataError

# A batch of 10,000 labels and file names takes about 50,000.
MAX_OPCODES = 250_000
# A key is copied each time that it is mentioned, and a pickle mentions one thing in two bytes.
MAX_KEY = 1_000
# Numbers of any length can be written; products of them take any time. Generators have 128 bits.
MAX_INTEGER = 1 << 1024

_RECONSTRUCT = {
    "numpy.core.multiarray _reconstruct",
    "numpy._core.multiarray _reconstruct",
}
_FROM_BUFFER = {"numpy.core.numeric _frombuffer", "numpy._core.numeric _frombuffer"}
_DTYPE = "numpy dtype"
_ENCODE = "_codecs encode"  # how Python 3 writes bytes in protocol 2
_ALLOWED = _RECONSTRUCT | _FROM_BUFFER | {_DTYPE, _ENCODE, "numpy ndarray"}

_ARGUMENT_IS_VALUE = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4"),
    *("BINSTRING", "SHORT_BINSTRING"),  # Python 2's bytes; pickletools gives them as latin-1
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()


@dataclass(frozen=True)
class Name:
    """A function or class that the pickle mentions, as "module name"."""

    text: str


@dataclass
class Call:
    """A call that the pickle asks for, and that is not made; `state` is what it would set."""

    function: str
    arguments: tuple[Any, ...]
    state: Any = None


def read_pickle(content: bytes) -> Any:
    """The dictionaries, lists, numbers and strings in a pickle, with calls left as `Call`.

    Raises:
        DataError: the pickle is damaged, is too long, or mentions a function that no batch needs.
    """
    return read_with(PickleReader(), content)


def read_with(reader: "PickleReader", content: bytes) -> Any:
    """What `reader` makes of a pickle; whatever is wrong with it is a `DataError`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pickletools on bad escapes in opcodes we refuse
            return reader.read(content)
    except (ValueError, LookupError, TypeError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError("a damaged pickle") from error


class PickleReader:
    """The stack and memo of the pickle machine (PEP 307, PEP 3154, PEP 574)."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.result: Any = None

    def read(self, content: bytes) -> Any:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
            if count >= MAX_OPCODES:
                raise DataError(f"a pickle of more than {MAX_OPCODES:,} steps is not read")
            self.step(opcode.name, argument)
        return self.result

    def step(self, name: str, argument: Any) -> None:
        if name in _ARGUMENT_IS_VALUE:
            if isinstance(argument, int) and abs(argument) > MAX_INTEGER:
                raise DataError("the pickle has a number of more than 1,024 bits; not read")
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            self.stack.append(tuple(self.pop(_TUPLES[name])))
        else:
            self.step_structure(name, argument)

    def step_structure(self, name: str, argument: Any) -> None:
        match name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                (self.result,) = self.stack
            case "MARK":
                self.stack.append(_MARK)
            case "EMPTY_TUPLE":
                self.stack.append(())
            case "EMPTY_LIST":
                self.stack.append([])
            case "EMPTY_DICT":
                self.stack.append({})
            case "TUPLE":
                self.stack.append(tuple(self.pop_to_mark()))
            case "APPEND":
                self.extend(self.pop(1))
            case "APPENDS":
                self.extend(self.pop_to_mark())
            case "SETITEM":
                self.update(self.pop(2))
            case "SETITEMS":
                self.update(self.pop_to_mark())
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                self.stack.append(self.memo[argument])
            case _:
                self.step_call(name, argument)

    def step_call(self, name: str, argument: Any) -> None:
        match name:
            case "GLOBAL":
                self.stack.append(_allowed(argument))
            case "STACK_GLOBAL":
                module, attribute = self.pop(2)
                self.stack.append(_allowed(f"{module} {attribute}"))
            case "REDUCE":
                function, arguments = self.pop(2)
                if not isinstance(function, Name) or not isinstance(arguments, tuple):
                    raise ValueError
                self.stack.append(Call(function.text, arguments))
            case "BUILD":
                (state,) = self.pop(1)
                if not isinstance(self.stack[-1], Call):
                    raise ValueError
                self.stack[-1].state = state
            case _:
                raise DataError(f"the pickle uses {name}, which no CIFAR-10 batch does; not read")

    def pop(self, count: int) -> list[Any]:
        items = self.stack[-count:]
        if len(items) < count or any(item is _MARK for item in items):
            raise ValueError
        del self.stack[-count:]
        return items

    def pop_to_mark(self) -> list[Any]:
        items = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def extend(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError
        self.stack[-1].extend(items)

    def update(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict) or len(items) % 2:
            raise ValueError
        keys = [_key(key) for key in items[::2]]
        self.stack[-1].update(zip(keys, items[1::2], strict=True))


def _key(value: Any) -> str:
    content = as_bytes(value)
    if len(content) > MAX_KEY:
        raise DataError(f"a key of {len(content):,} bytes; no batch has one of over {MAX_KEY:,}")
    return content.decode("latin-1")


def _allowed(function: str) -> Name:
    if function not in _ALLOWED:
        called = function.replace(" ", ".")[:80]
        raise DataError(f"the pickle asks to call {called!r}; refused, nothing was run")
    return Name(function)


def as_bytes(value: Any) -> bytes:
    """The bytes of a string in a pickle, however Python 2 or 3 wrote it."""
    if isinstance(value, Call) and value.function == _ENCODE and value.arguments:
        value = value.arguments[0]
    if isinstance(value, str):
        return value.encode("latin-1")
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    raise DataError(f"the pickle has a {type(value).__name__} where a string belongs")


def as_array(value: Any) -> NDArray[np.uint8]:
    """The array of bytes that a `Call` describes; allocates nothing beyond the pickle's own bytes.

    Raises:
        DataError: it is no array of uint8, or its shape and its bytes disagree.
    """
    match value:
        case Call(function=function, state=(int(), shape, dtype, fortran, raw)) if (
            function in _RECONSTRUCT
        ):
            order = "F" if fortran else "C"
        case Call(function=function, arguments=(raw, dtype, shape, order)) if (
            function in _FROM_BUFFER
        ):
            pass
        case _:
            raise DataError("the pickle has no array where pixels belong")
    match dtype:
        case Call(function=function, arguments=("u1" | b"u1", *_)) if function == _DTYPE:
            pass
        case _:
            raise DataError("the pickle's pixels are not uint8")
    content = as_bytes(raw)
    if not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in shape):
        raise DataError("the pickle's array has no valid shape")
    if len(shape) > 4 or math.prod(shape) != len(content) or order not in ("C", "F"):
        raise DataError(f"the pickle's array has {len(content)} bytes and shape {shape[:4]}")
    return np.frombuffer(content, np.uint8).reshape(shape, order=order)  # type: ignore[call-overload,no-any-return]
