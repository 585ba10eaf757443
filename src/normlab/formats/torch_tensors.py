"""What PyTorch's pickles say of tensors, as descriptions: no bytes are read here, and none made."""

import math
from dataclasses import dataclass
from typing import Any

from normlab.core.pickles import MAX_KEY, Name, Pairs, PickledArray, PickleReader
from normlab.errors import DataError

MAX_OPCODES = 2_000_000  # about 50,000 tensors
LARGEST = 1 << 60  # no size, stride or count of numbers is larger

# PyTorch's name of a type of number → bytes, and NumPy's name where NumPy has the type.
DTYPES = {
    "float64": (8, "<f8"),
    "float32": (4, "<f4"),
    "float16": (2, "<f2"),
    "bfloat16": (2, None),
    "int64": (8, "<i8"),
    "int32": (4, "<i4"),
    "int16": (2, "<i2"),
    "int8": (1, "<i1"),
    "uint64": (8, "<u8"),
    "uint32": (4, "<u4"),
    "uint16": (2, "<u2"),
    "uint8": (1, "<u1"),
    "bool": (1, "?"),
    "complex64": (8, "<c8"),
    "complex128": (16, "<c16"),
    "float8_e4m3fn": (1, None),
    "float8_e4m3fnuz": (1, None),
    "float8_e5m2": (1, None),
    "float8_e5m2fnuz": (1, None),
}
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "bytes",
}
_DICTIONARIES = {"collections OrderedDict", "builtins dict", "__builtin__ dict"}
_PARAMETERS = {
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_parameter_with_state",
}
_OF_A_TYPE = "torch._tensor _rebuild_from_type_v2"
_TENSORS = {
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3",
}


@dataclass(frozen=True, slots=True)
class Storage:
    """A storage that the pickle mentions; `start` is that of a view on another one."""

    key: str
    kind: str
    count: int
    start: int = 0


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor that the pickle mentions: nothing of it has been read."""

    storage: Storage
    dtype: str
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the array that it becomes."""
        width, name = DTYPES[self.dtype]
        return math.prod(self.size) * (width if name else 4)


@dataclass(frozen=True, slots=True)
class Odd:
    """A tensor that cannot be read, and why."""

    reason: str


Leaf = Tensor | Odd | PickledArray


class TorchReader(PickleReader):
    """Keeps tensors and dictionaries; leaves everything else unbuilt."""

    limit = MAX_OPCODES

    def __init__(self) -> None:
        super().__init__()
        self.copied = 0

    def made(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        name = function.text if isinstance(function, Name) else ""
        if name in _DICTIONARIES:
            return self.pairs(arguments)
        if name in _PARAMETERS and arguments and isinstance(arguments[0], Tensor | Odd):
            return arguments[0]
        if name == _OF_A_TYPE and len(arguments) > 2 and isinstance(arguments[2], tuple):
            return self.made(arguments[0], arguments[2])
        if name in _TENSORS:
            return _tensor(arguments)
        if name.startswith("torch._utils _rebuild_"):
            return Odd(f"it is a tensor of another kind ({name.rpartition('_rebuild_')[2][:40]})")
        return super().made(function, arguments)

    def reference(self, reference: Any) -> Any:
        match reference:
            case ("storage", Name(text), str(key), _, int(count), *rest):
                kind = text.rpartition(" ")[2]
                kind = kind if kind in STORAGES else kind[:40]
                view = rest[0] if rest else None
                if not 0 <= count < LARGEST or len(key) > MAX_KEY:
                    return None
                if isinstance(view, tuple):  # PyTorch before 0.4: (key, start, count)
                    match view:
                        case (str(), int(start), int()) if 0 <= start < LARGEST:
                            return Storage(key, kind, count, start)
                    return None
                return Storage(key, kind, count)
            case ("module", value, *_):  # with its source code, which older PyTorch noted
                return value
        return None

    def pairs(self, arguments: tuple[Any, ...]) -> Pairs:
        """The dictionary of these arguments: nothing, or Python 2's list of pairs."""
        given = arguments[0] if arguments else []
        if not isinstance(given, list):
            return Pairs()
        self.copied += len(given)  # the same list can be given again and again
        if self.copied > self.limit:
            raise DataError("its dictionaries repeat the same list without measure")
        return Pairs((x[0], x[1]) for x in given if isinstance(x, list | tuple) and len(x) == 2)


def _tensor(arguments: tuple[Any, ...]) -> Leaf:
    match arguments:
        case (Storage() as storage, int(offset), tuple(size), tuple(stride), *rest):
            pass
        case _:
            return Odd("its bytes are not where torch.save puts them: save it with torch.save")
    if len(size) != len(stride) or len(size) > 64:
        return Odd("its sizes and strides do not fit together")
    if not all(type(n) is int and 0 <= n < LARGEST for n in (offset, *size, *stride)):
        return Odd("its sizes or strides are no sizes")
    if storage.kind == "UntypedStorage":
        named = rest[2] if len(rest) > 2 else None
        dtype = named.text.rpartition(" ")[2] if isinstance(named, Name) else "?"
    else:
        dtype = STORAGES.get(storage.kind, storage.kind)
    if dtype not in DTYPES:
        return Odd(f"its type of number, {dtype[:40]}, is not known")
    return Tensor(storage, dtype, offset + storage.start, tuple(size), tuple(stride))


class LegacyReader(TorchReader):
    """Also notes how many bytes a number has in each storage."""

    def __init__(self) -> None:
        super().__init__()
        self.widths: dict[str, int] = {}

    def reference(self, reference: Any) -> Any:
        found = super().reference(reference)
        if isinstance(found, Storage):
            view = reference[5] if len(reference) > 5 else None
            key = view[0] if isinstance(view, tuple) else found.key
            width = DTYPES.get(STORAGES.get(found.kind, ""), (1, None))[0]
            self.widths[key] = width
            return Storage(key, found.kind, found.count, found.start)
        return found
