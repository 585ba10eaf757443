"""Read pickles without running anything in them.

Python's unpickler calls whatever a file tells it to call. This reader never calls anything: it
follows the opcodes (PEP 307, PEP 3154, PEP 574), keeps the mention of a function or class as a
`Name`, and keeps what should have been called or built as an `Unbuilt` with its arguments. A
dictionary stays a list of pairs, `Pairs`, so that no key is hashed. Memory is bounded by the bytes
of the file and by the number of opcodes.

`read_pickle` is for the batches of CIFAR-10: it refuses every name and opcode that they do not
have. PyTorch's files have a reader of their own in `normlab.formats.torch_files`.
"""

import io
import math
import pickletools
import warnings
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from normlab.errors import DataError

# A batch of 10,000 labels and file names takes about 50,000.
MAX_OPCODES = 250_000
MAX_KEY = 1_000  # characters of a name, or of a dictionary's key that is looked at
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
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG", "FLOAT", "BINFLOAT"),
    *("BINSTRING", "SHORT_BINSTRING", "STRING"),  # Python 2's bytes; pickletools gives latin-1
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUT = {"PUT", "BINPUT", "LONG_BINPUT"}
_GET = {"GET", "BINGET", "LONG_BINGET"}
_NO_BATCH_HAS = {
    *("INT", "LONG", "FLOAT", "BINFLOAT", "STRING", "UNICODE", "LIST", "DICT", "DUP", "POP"),
    *("POP_MARK", "PUT", "GET", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "PERSID", "BINPERSID"),
    *("EMPTY_SET", "FROZENSET", "ADDITEMS"),
}
_MARK = object()


@dataclass(frozen=True, slots=True)
class Name:
    """A function or class that the pickle mentions, as "module name"."""

    text: str


@dataclass(slots=True, eq=False)
class Unbuilt:
    """An object that the pickle describes and that is not made.

    Attributes:
        name: the function or class that would have made it, as "module name".
        state: what it would have been given after that.
        items, pairs: what would have been appended to it, or set in it by key.
    """

    name: str
    arguments: tuple[Any, ...]
    state: Any = None
    items: list[Any] | None = None
    pairs: "Pairs | None" = None


class Pairs(list[tuple[Any, Any]]):
    """A dictionary: keys and values in the order in which the file has them."""


def read_pickle(content: bytes) -> Any:
    """What is in a batch of CIFAR-10, its dictionary with strings for keys.

    Raises:
        DataError: the pickle is damaged, is too long, or mentions a function that no batch needs.
    """
    value = read_with(BatchReader(), io.BytesIO(content))
    if not isinstance(value, Pairs):
        return value
    return {_batch_key(key): item for key, item in value}


def _batch_key(key: Any) -> str:
    """A key of a batch; a long one is none, and is not copied for each time it is mentioned."""
    text = _encoded(key)
    if not isinstance(text, str | bytes | bytearray) or len(text) > MAX_KEY:
        raise DataError("the pickle has a key that no CIFAR-10 batch has")
    return as_bytes(text).decode("latin-1")


def read_with(reader: "PickleReader", file: BinaryIO) -> Any:
    """What `reader` makes of the pickle that begins here; what is wrong is a `DataError`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pickletools on bad escapes in strings
            return reader.read(file)
    except (ValueError, LookupError, TypeError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError("a damaged pickle") from error


class PickleReader:
    """The stack and memo of the pickle machine.

    limit: opcodes that are followed at most.
    """

    limit = MAX_OPCODES

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def name(self, text: str) -> Any:
        """What stands for the mention of a function or class, "module name"."""
        return Name(text)

    def made(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        """What stands for the result of a call."""
        if isinstance(function, Unbuilt):
            return Unbuilt(function.name, (function, arguments))
        return Unbuilt(function.text if isinstance(function, Name) else "?", arguments)

    def reference(self, reference: Any) -> Any:
        """What stands for something outside the pickle."""
        raise DataError("the pickle refers to something outside it; not read")

    def read(self, file: BinaryIO) -> Any:
        """The value of the pickle that begins here; the file then stands behind it."""
        self.stack, self.memo = [], {}
        for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if count >= self.limit:
                raise DataError(f"a pickle of more than {self.limit:,} steps is not read")
            self.step(opcode.name, argument)
        (result,) = self.stack
        return result

    def step(self, name: str, argument: Any) -> None:
        if name in _ARGUMENT_IS_VALUE:
            if isinstance(argument, int) and abs(argument) > MAX_INTEGER:
                raise DataError("the pickle has a number of more than 1,024 bits; not read")
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            self.stack.append(tuple(self.pop(_TUPLES[name])))
        elif name in _PUT:
            self.memo[argument] = self.stack[-1]
        elif name in _GET:
            self.stack.append(self.memo[argument])
        else:
            self.step_structure(name, argument)

    def step_structure(self, name: str, argument: Any) -> None:
        match name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                self.stack.append(_MARK)
            case "EMPTY_TUPLE":
                self.stack.append(())
            case "EMPTY_LIST":
                self.stack.append([])
            case "EMPTY_DICT":
                self.stack.append(Pairs())
            case "EMPTY_SET":
                self.stack.append(Unbuilt("builtins set", ()))
            case "TUPLE":
                self.stack.append(tuple(self.pop_to_mark()))
            case "LIST":
                self.stack.append(self.pop_to_mark())
            case "FROZENSET":
                self.stack.append(Unbuilt("builtins frozenset", (self.pop_to_mark(),)))
            case "DICT":
                pairs = self.pop_to_mark()
                self.stack.append(Pairs())
                self.update(pairs)
            case "APPEND":
                self.extend(self.pop(1))
            case "APPENDS" | "ADDITEMS":
                self.extend(self.pop_to_mark())
            case "SETITEM":
                self.update(self.pop(2))
            case "SETITEMS":
                self.update(self.pop_to_mark())
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "DUP":
                self.stack.append(self.stack[-1])
            case "POP":
                self.stack.pop()
            case "POP_MARK":
                self.pop_to_mark()
            case _:
                self.step_call(name, argument)

    def step_call(self, name: str, argument: Any) -> None:
        match name:
            case "GLOBAL":
                if len(argument) > MAX_KEY:
                    raise ValueError
                self.stack.append(self.name(argument))
            case "STACK_GLOBAL":
                module, attribute = self.pop(2)
                if not isinstance(module, str) or not isinstance(attribute, str):
                    raise ValueError
                if len(module) + len(attribute) >= MAX_KEY:  # else each mention would copy it
                    raise ValueError
                self.stack.append(self.name(f"{module} {attribute}"))
            case "REDUCE" | "NEWOBJ":
                self.call(*self.pop(2))
            case "NEWOBJ_EX":
                function, arguments, _keywords = self.pop(3)
                self.call(function, arguments)
            case "INST":
                arguments = tuple(self.pop_to_mark())
                if len(argument) > MAX_KEY:
                    raise ValueError
                self.call(self.name(argument), arguments)
            case "OBJ":
                function, *rest = self.pop_to_mark()
                self.call(function, tuple(rest))
            case "BUILD":
                (state,) = self.pop(1)
                if isinstance(self.stack[-1], Unbuilt):
                    self.stack[-1].state = state
            case "PERSID":
                self.stack.append(self.reference(argument))
            case "BINPERSID":
                self.stack.append(self.reference(*self.pop(1)))
            case _:
                raise DataError(f"the pickle uses {name}, which is not read")

    def call(self, function: Any, arguments: Any) -> None:
        if not isinstance(arguments, tuple):
            raise ValueError
        self.stack.append(self.made(function, arguments))

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
        target = self.stack[-1]
        if isinstance(target, Unbuilt):
            target.items = target.items or []
            target = target.items
        if type(target) is not list:
            raise ValueError
        target.extend(items)

    def update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Unbuilt):
            target.pairs = target.pairs if target.pairs is not None else Pairs()
            target = target.pairs
        if not isinstance(target, Pairs) or len(items) % 2:
            raise ValueError
        target.extend(zip(items[::2], items[1::2], strict=True))


class BatchReader(PickleReader):
    """Follows only what a batch of CIFAR-10 has, and knows only the functions that it needs."""

    def step(self, name: str, argument: Any) -> None:
        if name in _NO_BATCH_HAS:
            raise DataError(f"the pickle uses {name}, which no CIFAR-10 batch does; not read")
        super().step(name, argument)

    def name(self, text: str) -> Any:
        if text not in _ALLOWED:
            called = text.replace(" ", ".")[:80]
            raise DataError(f"the pickle asks to call {called!r}; refused, nothing was run")
        return Name(text)

    def call(self, function: Any, arguments: Any) -> None:
        if not isinstance(function, Name):
            raise ValueError
        super().call(function, arguments)


def _encoded(value: Any) -> Any:
    """The string in a call of `_codecs.encode`; anything else as it is."""
    if isinstance(value, Unbuilt) and value.name == _ENCODE and value.arguments:
        return value.arguments[0]
    return value


def as_bytes(value: Any) -> bytes:
    """The bytes of a string in a pickle, however Python 2 or 3 wrote it."""
    value = _encoded(value)
    if isinstance(value, str):
        try:
            return value.encode("latin-1")
        except UnicodeEncodeError:
            raise DataError("the pickle has letters where bytes belong") from None
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    raise DataError(f"the pickle has a {type(value).__name__} where a string belongs")


@dataclass(frozen=True, slots=True)
class PickledArray:
    """A NumPy array as a pickle describes it: a string of bytes with a type and a shape."""

    raw: Any
    dtype: str
    shape: tuple[int, ...]
    order: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def build(self) -> NDArray[Any]:
        """The array; allocates nothing beyond the pickle's own bytes.

        Raises:
            DataError: its shape and its bytes disagree.
        """
        content = as_bytes(self.raw)
        if self.nbytes != len(content):
            raise DataError(
                f"the pickle's array has {len(content)} bytes and shape {self.shape[:4]}"
            )
        values = np.frombuffer(content, self.dtype)
        return values.reshape(self.shape, order=self.order)  # type: ignore[call-overload,no-any-return]


def array_in(value: Any) -> PickledArray | None:
    """The array of numbers that `value` describes; None where it is something else."""
    match value:
        case Unbuilt(name=function, state=(int(), shape, dtype, fortran, raw)) if (
            function in _RECONSTRUCT
        ):
            order = "F" if fortran else "C"
        case Unbuilt(name=function, arguments=(raw, dtype, shape, order)) if (
            function in _FROM_BUFFER
        ):
            pass
        case _:
            return None
    kind = _dtype(dtype)
    if kind is None or order not in ("C", "F") or not isinstance(shape, tuple) or len(shape) > 16:
        return None
    if not all(type(size) is int and 0 <= size < 1 << 48 for size in shape):
        return None
    return PickledArray(raw, kind, shape, order)


def _dtype(value: Any) -> str | None:
    """The type of numbers that a call of `numpy.dtype` names, with its order of bytes."""
    match value:
        case Unbuilt(name=name, arguments=(str() | bytes() as code, *_), state=state) if (
            name == _DTYPE
        ):
            text = code[:8].decode("latin-1") if isinstance(code, bytes) else code
        case _:
            return None
    if len(text) > 4:
        return None
    order = state[1] if isinstance(state, tuple) and len(state) > 1 else "|"
    big = order in (">", b">")
    return (">" if big else "<") + text if text in _NUMBERS else None


_NUMBERS = {*(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)), "f2", "f4", "f8", "b1"}


def as_array(value: Any) -> NDArray[np.uint8]:
    """The array of bytes that a pickle describes; allocates nothing beyond the pickle's own bytes.

    Raises:
        DataError: it is no array of uint8, or its shape and its bytes disagree.
    """
    found = array_in(value)
    if found is None:
        raise DataError("the pickle has no array where pixels belong")
    if np.dtype(found.dtype) != np.uint8:
        raise DataError("the pickle's pixels are not uint8")
    return found.build()
