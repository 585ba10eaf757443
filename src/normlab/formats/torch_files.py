"""Read the weights in a file that PyTorch wrote, without running code.

`torch.save` writes a zip: `data.pkl`, a pickle that mentions tensors, and one stored file for each
storage. TorchScript writes such a zip, too. Before PyTorch 1.6 the file was a row of pickles with
the storages behind them. The pickle goes through normlab's own reader, which makes no calls: what
is no tensor stays unbuilt, whatever it is, and the weights beside it are read. Nothing falls back
to `torch.load`.

First the file is searched for state dicts, then their bytes are added up, and only then is an array
made. The bytes may not exceed `BUDGET` times the file's: many tensors can share one storage.
"""

import io
import math
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normlab.core.pickles import (
    MAX_KEY,
    Name,
    Pairs,
    PickledArray,
    PickleReader,
    Unbuilt,
    array_in,
    read_with,
)
from normlab.core.text import counted
from normlab.errors import DataError

Arrays = dict[str, NDArray[Any]]

MAX_OPCODES = 2_000_000  # about 50,000 tensors
BUDGET, ALWAYS = 8, 1 << 23  # times the file's bytes, and bytes that any file may take
MAX_DEPTH = 100  # dictionaries in dictionaries, and modules in modules
MAX_PASSED_OVER = 20  # things beside the weights that are named
MAX_PARTS = 1_000  # state dicts
LARGEST = 1 << 60  # no size, stride or count of numbers is larger

# PyTorch's name of a type of number → bytes, and NumPy's name where NumPy has the type.
_DTYPES = {
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
_STORAGES = {
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
_OLD_PARAMETERS = {"torch.nn.parameter Parameter", "torch.autograd.variable Variable"}
_OF_A_TYPE = "torch._tensor _rebuild_from_type_v2"
_TENSORS = {
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3",
}
_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
_PARAMETER_NAMES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class StateDict:
    """The weights of one network in a file.

    Attributes:
        place: the keys that lead to it, such as `model_ema`; empty where the file is nothing else.
        arrays: the tensors that could be read, by name.
        unread: the names of the others, each with the reason.
        settings: `eps`, `momentum` and others of each module, by its name, where the file has them:
            where a whole module was saved.
    """

    place: str
    arrays: Arrays
    unread: dict[str, str]
    settings: dict[str, dict[str, float | None]]


@dataclass(frozen=True)
class TorchFile:
    """What a file that PyTorch wrote holds.

    Attributes:
        passed_over: what lies beside the weights and was left unbuilt, such as
            `args (argparse.Namespace)`.
    """

    state_dicts: tuple[StateDict, ...]
    passed_over: tuple[str, ...]


def is_torch(path: Path) -> bool:
    """Whether the file begins as one of PyTorch's does, whatever it is called."""
    with open(path, "rb") as f:
        if f.read(len(_MAGIC)) == _MAGIC:
            return True
    try:
        with zipfile.ZipFile(path) as archive:
            return any(_inner(name) == "data.pkl" for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False


def read_torch(path: Path) -> TorchFile:
    """The state dicts in a file that `torch.save` or TorchScript wrote.

    Raises:
        DataError: it is damaged, holds no weights, or its tensors share bytes without measure.
    """
    size = path.stat().st_size
    try:
        with open(path, "rb") as f:
            begin = f.read(len(_MAGIC))
        if begin == _MAGIC:
            return _read(*_legacy(path.read_bytes()), size)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                storages = _ZipStorages(archive, size)
                value = read_with(_Reader(), io.BytesIO(storages.member("data.pkl")))
                return _read(value, storages, size)
        if begin[:1] == b"\x80":  # what pickle.dump wrote: arrays of NumPy can be in it
            return _read(read_with(_Reader(), io.BytesIO(path.read_bytes())), _Storages(), size)
    except (
        *(DataError, RuntimeError, EOFError, OSError, OverflowError, zipfile.BadZipFile),
        *(ValueError, NotImplementedError),
    ) as e:
        raise DataError(f"{path}: {e}") from None
    if tarfile.is_tarfile(path):
        raise DataError(f"{path} is a tar archive, no file of torch.save: unpack it")
    raise DataError(
        f"{path} is no zip and no older file of torch.save, or is cut off: save model.state_dict() "
        "with torch.save"
    )


@dataclass(frozen=True, slots=True)
class _Storage:
    """A storage that the pickle mentions; `start` is that of a view on another one."""

    key: str
    kind: str
    count: int
    start: int = 0


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor that the pickle mentions: nothing of it has been read."""

    storage: _Storage
    dtype: str
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the array that it becomes."""
        width, name = _DTYPES[self.dtype]
        return math.prod(self.size) * (width if name else 4)


@dataclass(frozen=True, slots=True)
class _Odd:
    """A tensor that cannot be read, and why."""

    reason: str


_Leaf = _Tensor | _Odd | PickledArray


class _Reader(PickleReader):
    """Keeps tensors and dictionaries; leaves everything else unbuilt."""

    limit = MAX_OPCODES

    def __init__(self) -> None:
        super().__init__()
        self.copied = 0

    def made(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        name = function.text if isinstance(function, Name) else ""
        if name in _DICTIONARIES:
            return self.pairs(arguments)
        if name in _PARAMETERS and arguments and isinstance(arguments[0], _Tensor | _Odd):
            return arguments[0]
        if name == _OF_A_TYPE and len(arguments) > 2 and isinstance(arguments[2], tuple):
            return self.made(arguments[0], arguments[2])
        if name in _TENSORS:
            return _tensor(arguments)
        if name.startswith("torch._utils _rebuild_"):
            return _Odd(f"it is a tensor of another kind ({name.rpartition('_rebuild_')[2][:40]})")
        return super().made(function, arguments)

    def reference(self, reference: Any) -> Any:
        match reference:
            case ("storage", Name(text), str(key), _, int(count), *rest):
                kind = text.rpartition(" ")[2]
                kind = kind if kind in _STORAGES else kind[:40]
                view = rest[0] if rest else None
                if not 0 <= count < LARGEST or len(key) > MAX_KEY:
                    return None
                if isinstance(view, tuple):  # PyTorch before 0.4: (key, start, count)
                    match view:
                        case (str(), int(start), int()) if 0 <= start < LARGEST:
                            return _Storage(key, kind, count, start)
                    return None
                return _Storage(key, kind, count)
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


def _tensor(arguments: tuple[Any, ...]) -> _Leaf:
    match arguments:
        case (_Storage() as storage, int(offset), tuple(size), tuple(stride), *rest):
            pass
        case _:
            return _Odd("its bytes are not where torch.save puts them: save it with torch.save")
    if len(size) != len(stride) or len(size) > 64:
        return _Odd("its sizes and strides do not fit together")
    if not all(type(n) is int and 0 <= n < LARGEST for n in (offset, *size, *stride)):
        return _Odd("its sizes or strides are no sizes")
    if storage.kind == "UntypedStorage":
        named = rest[2] if len(rest) > 2 else None
        dtype = named.text.rpartition(" ")[2] if isinstance(named, Name) else "?"
    else:
        dtype = _STORAGES.get(storage.kind, storage.kind)
    if dtype not in _DTYPES:
        return _Odd(f"its type of number, {dtype[:40]}, is not known")
    return _Tensor(storage, dtype, offset + storage.start, tuple(size), tuple(stride))


class _Storages:
    """The bytes of storages by key; here of a file that has none."""

    def content(self, key: str) -> memoryview:
        raise DataError(f"storage {key!r} is not in the file: it is cut off")


class _ZipStorages(_Storages):
    """Members `data/…` of the archive's one folder, each read once."""

    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        self.archive, self.size, self.left = archive, size, size
        self.members: dict[str, list[zipfile.ZipInfo]] = {}
        for info in archive.infolist():
            self.members.setdefault(_inner(info.filename), []).append(info)
        self.read: dict[str, memoryview] = {}

    def content(self, key: str) -> memoryview:
        if not self.read and "byteorder" in self.members and self.member("byteorder") != b"little":
            raise DataError("its numbers are big-endian: save it on another machine")
        if key not in self.read:
            self.read[key] = memoryview(self.member(f"data/{key}"))
        return self.read[key]

    def member(self, name: str) -> bytes:
        """A file of the archive, which is stored as it is."""
        found = self.members.get(name, [])
        if len(found) != 1:
            raise DataError(f"no {name!r} in the file, or several: torch.save did not write it")
        info = found[0]
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise DataError(f"{name!r} is compressed: torch.save did not write it")
        self.left -= info.file_size
        if self.left < 0:  # members may overlap
            raise DataError(f"its members claim more than its {self.size:,} bytes")
        return self.archive.read(info)


class _LegacyStorages(_Storages):
    """Storages one behind the other, each with its count of numbers before it."""

    def __init__(self, places: dict[str, memoryview]) -> None:
        self.places = places

    def content(self, key: str) -> memoryview:
        return self.places[key] if key in self.places else super().content(key)


def _inner(name: str) -> str:
    """The name of a member inside the one folder that torch.save makes."""
    folder, slash, inner = name.partition("/")
    return inner if slash else folder


def _legacy(content: bytes) -> tuple[Any, _Storages]:
    """The value of a file of PyTorch before 1.6, and where its storages lie."""
    file, reader = io.BytesIO(content), _LegacyReader()
    read_with(reader, file)  # the magic number
    read_with(reader, file)  # the version of the format
    if _setting(read_with(reader, file), "little_endian") is False:
        raise DataError("its numbers are big-endian: save it on another machine")
    value = read_with(reader, file)
    keys = read_with(reader, file)
    places: dict[str, memoryview] = {}
    whole, at = memoryview(content), file.tell()
    for key in keys if isinstance(keys, list) else []:
        width = reader.widths.get(key) if isinstance(key, str) else None
        count = int.from_bytes(whole[at : at + 8], "little")
        if width is None or at + 8 + count * width > len(whole):
            break  # from here on it is cut off
        places[key] = whole[at + 8 : at + 8 + count * width]
        at += 8 + count * width
    return value, _LegacyStorages(places)


class _LegacyReader(_Reader):
    """Also notes how many bytes a number has in each storage."""

    def __init__(self) -> None:
        super().__init__()
        self.widths: dict[str, int] = {}

    def reference(self, reference: Any) -> Any:
        found = super().reference(reference)
        if isinstance(found, _Storage):
            view = reference[5] if len(reference) > 5 else None
            key = view[0] if isinstance(view, tuple) else found.key
            width = _DTYPES.get(_STORAGES.get(found.kind, ""), (1, None))[0]
            self.widths[key] = width
            return _Storage(key, found.kind, found.count, found.start)
        return found


def _setting(value: Any, key: str) -> Any:
    return next((v for k, v in value if k == key), None) if isinstance(value, Pairs) else None


@dataclass(eq=False)
class _Part:
    """Weights that belong together, before any array is made."""

    place: str
    entries: dict[str, _Leaf]
    settings: dict[str, dict[str, float | None]] = field(default_factory=dict)


def _read(value: Any, storages: _Storages, size: int) -> TorchFile:
    search = _Search()
    search.run(value)
    parts = [p for p in search.parts if _looks_like_weights(p)] or search.parts
    chosen = {id(part) for part in parts}
    for part in search.parts:
        if id(part) not in chosen:
            search.pass_over(part.place, f"{counted(len(part.entries), 'tensor')} of no layer")
    if len(parts) > MAX_PARTS:
        raise DataError(f"it holds {len(parts):,} state dicts, more than {MAX_PARTS:,}")
    if not parts:
        raise DataError("it holds no weights, as far as it can be read: save model.state_dict()")
    wanted = sum(_bytes(leaf) for part in parts for leaf in part.entries.values())
    if wanted > BUDGET * size + ALWAYS:
        raise DataError(
            f"its tensors would take {wanted:,} bytes, the file has {size:,}: they share their "
            "storages; save model.state_dict() with clone() of each tensor"
        )
    found = tuple(_state_dict(part, storages) for part in parts)
    if not any(x.arrays for x in found):
        reason = next(reason for x in found for reason in x.unread.values())
        raise DataError(f"none of its tensors can be read: {reason}")
    return TorchFile(found, search.told())


def _bytes(leaf: _Leaf) -> int:
    return 0 if isinstance(leaf, _Odd) else leaf.nbytes


def _looks_like_weights(part: _Part) -> bool:
    """Whether the names are those of layers; a score beside the weights may be a tensor, too."""
    return bool(part.settings) or any(
        name in _PARAMETER_NAMES
        or name.endswith("running_var")
        or ("." in name and getattr(leaf, "size", None) != ())
        for name, leaf in part.entries.items()
    )


_Found = Iterator[tuple[str, Any]]


class _Search:
    """Looks for state dicts and modules in whatever lies in a file, each thing once."""

    def __init__(self) -> None:
        self.parts: list[_Part] = []
        self.passed_over: dict[str, str] = {}  # by place
        self.modules: dict[int, bool] = {}  # by the id of the state, which many objects may share
        self.more = 0
        self.seen: set[int] = set()

    def told(self) -> tuple[str, ...]:
        """What was passed over, in words."""
        more = [f"{self.more:,} more objects"] if self.more else []
        told = (
            f"{place or 'the file itself'} ({what})" for place, what in self.passed_over.items()
        )
        return (*told, *more)

    def pass_over(self, place: str, what: str) -> None:
        """Note something that stays unbuilt, and not what lies inside it."""
        if any(place == p or place.startswith(f"{p}.") for p in self.passed_over):
            return
        if len(self.passed_over) < MAX_PASSED_OVER:
            self.passed_over[place] = what
        else:
            self.more += 1

    def run(self, value: Any) -> None:
        path: list[_Found] = [iter([("", value)])]  # iterators: only one line of places is kept
        while path:
            place, item = next(path[-1], (None, None))
            if place is None:
                path.pop()
            elif id(item) not in self.seen and isinstance(item, list | tuple | Unbuilt):
                if len(path) > MAX_DEPTH:
                    self.pass_over(place, f"more than {MAX_DEPTH} levels deep")
                    continue
                self.seen.add(id(item))
                path.append(self.look(place, item))

    def look(self, place: str, item: Any) -> _Found:
        """Note what `item` is; what it holds that may hold weights in its turn."""
        if isinstance(item, Unbuilt):
            if self.is_module(item):
                part = self.module(place, item)
                self.parts += [part] if part.entries else []
                return
            if _leaf(item) is None:
                self.pass_over(place, item.name.replace(" ", "."))
                yield from (
                    (place, x) for x in (item.arguments, item.state, item.items, item.pairs)
                )
        elif isinstance(item, Pairs):
            known = {key: x for key, x in item if isinstance(key, str) and len(key) <= MAX_KEY}
            if {"state", "param_groups"} <= known.keys():
                self.pass_over(place, "an optimiser's state")
                return
            entries = {key: leaf for key, x in known.items() if (leaf := _leaf(x))}
            if entries:
                self.parts.append(_Part(place, entries))
            for i, (key, x) in enumerate(item):
                yield _joined(place, key if isinstance(key, str) and key in known else str(i)), x
        else:
            yield from ((_joined(place, str(i)), x) for i, x in enumerate(item))

    def module(self, place: str, root: Unbuilt) -> _Part:
        """The weights in a module and the modules inside it, by their names in a state dict."""
        part = _Part(place, {})
        waiting = [("", root, 0)]
        while waiting:
            name, module, depth = waiting.pop()
            if depth > MAX_DEPTH:
                self.pass_over(_joined(place, name), f"more than {MAX_DEPTH} levels deep")
                continue
            self.seen.add(id(module))
            inside = []
            for key, x in self.attributes(module):
                leaf = _leaf(x)
                if leaf is not None:
                    part.entries[_joined(name, key)] = leaf
                elif isinstance(x, Unbuilt) and self.is_module(x) and id(x) not in self.seen:
                    inside.append((_joined(name, key), x, depth + 1))
                elif x is None or (type(x) in (int, float, bool) and abs(x) < LARGEST):
                    part.settings.setdefault(name, {})[key] = x
            waiting += reversed(inside)
        return part

    def is_module(self, item: Unbuilt) -> bool:
        """Whether it is a `torch.nn.Module` or one of TorchScript."""
        if item.name.startswith("__torch__"):
            return True
        state = item.state
        if not isinstance(state, Pairs):
            return False
        if id(state) not in self.modules:
            names = {key for key, _ in state if isinstance(key, str)}
            self.modules[id(state)] = {"_parameters", "_buffers", "_modules"} <= names
        return self.modules[id(state)]

    def attributes(self, module: Unbuilt) -> _Found:
        """Parameters, buffers, modules and settings; TorchScript keeps them all side by side.

        A dictionary that belongs to several modules is looked through once.
        """
        for key, x in self.once(module.state):
            if key in ("_parameters", "_buffers", "_modules") and isinstance(x, Pairs):
                yield from self.once(x)
            else:
                yield key, x

    def once(self, pairs: Any) -> _Found:
        if isinstance(pairs, Pairs) and id(pairs) not in self.seen:
            self.seen.add(id(pairs))
            yield from ((k, v) for k, v in pairs if isinstance(k, str) and len(k) <= MAX_KEY)


def _leaf(value: Any) -> _Leaf | None:
    """A tensor or an array, if it is one."""
    if isinstance(value, _Tensor | _Odd):
        return value
    if isinstance(value, Unbuilt):
        if value.name in _OLD_PARAMETERS and isinstance(value.state, tuple) and value.state:
            return value.state[0] if isinstance(value.state[0], _Tensor | _Odd) else None
        return array_in(value)
    return None


def _joined(place: str, key: str) -> str:
    """
    Raises:
        DataError: such a name is no network's, and many of them would fill the memory.
    """
    if len(place) + len(key) > MAX_KEY:
        raise DataError(f"a name in it has more than {MAX_KEY:,} characters")
    return f"{place}.{key}" if place else key


def _state_dict(part: _Part, storages: _Storages) -> StateDict:
    arrays: Arrays = {}
    unread: dict[str, str] = {}
    for name, leaf in part.entries.items():
        try:
            arrays[name] = _array(leaf, storages)
        except (DataError, zipfile.BadZipFile, OSError, EOFError, RuntimeError, ValueError) as e:
            unread[name] = str(e)
    return StateDict(part.place, arrays, unread, part.settings)


def _array(leaf: _Leaf, storages: _Storages) -> NDArray[Any]:
    if isinstance(leaf, _Odd):
        raise DataError(leaf.reason)
    if isinstance(leaf, PickledArray):
        return leaf.build()
    width, name = _DTYPES[leaf.dtype]
    content = storages.content(leaf.storage.key)
    if leaf.storage.kind != "UntypedStorage" and len(content) < leaf.storage.count * width:
        raise DataError(
            f"storage {leaf.storage.key!r} has not the {leaf.storage.count} values that it should "
            "have"
        )
    last = leaf.offset + sum((n - 1) * step for n, step in zip(leaf.size, leaf.stride, strict=True))
    if 0 in leaf.size:
        return np.zeros(leaf.size, name or "<f4")
    if last >= len(content) // width:
        raise DataError(f"a tensor of size {leaf.size} does not fit into its storage")
    numbers = np.frombuffer(content, name or f"<u{width}", count=len(content) // width)
    strides = [step * width for step in leaf.stride]
    view = np.lib.stride_tricks.as_strided(
        numbers[leaf.offset :], leaf.size, strides, writeable=False
    )
    return view if name else _widened(view, leaf.dtype)


def _widened(raw: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Numbers of a type that NumPy lacks, given as whole numbers, as float32."""
    import torch  # which knows them

    tensor = torch.from_numpy(np.ascontiguousarray(raw).astype(f"i{raw.itemsize}"))
    widened: NDArray[np.float32] = tensor.view(getattr(torch, dtype)).float().numpy()
    return widened.reshape(raw.shape)
