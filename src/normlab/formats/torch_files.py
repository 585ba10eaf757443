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
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normlab.core.pickles import Pairs, PickledArray, read_with
from normlab.errors import DataError
from normlab.formats.torch_search import Part, Search, looks_like_weights
from normlab.formats.torch_tensors import DTYPES, Leaf, LegacyReader, Odd, TorchReader
from normlab.text import counted

Arrays = dict[str, NDArray[Any]]

BUDGET, ALWAYS = 8, 1 << 23  # times the file's bytes, and bytes that any file may take
MAX_PARTS = 1_000  # state dicts

_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."


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
                value = read_with(TorchReader(), io.BytesIO(storages.member("data.pkl")))
                return _read(value, storages, size)
        if begin[:1] == b"\x80":  # what pickle.dump wrote: arrays of NumPy can be in it
            return _read(read_with(TorchReader(), io.BytesIO(path.read_bytes())), _Storages(), size)
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
    file, reader = io.BytesIO(content), LegacyReader()
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


def _setting(value: Any, key: str) -> Any:
    return next((v for k, v in value if k == key), None) if isinstance(value, Pairs) else None


def _read(value: Any, storages: _Storages, size: int) -> TorchFile:
    search = Search()
    search.run(value)
    parts = [p for p in search.parts if looks_like_weights(p)] or search.parts
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


def _bytes(leaf: Leaf) -> int:
    return 0 if isinstance(leaf, Odd) else leaf.nbytes


def _state_dict(part: Part, storages: _Storages) -> StateDict:
    arrays: Arrays = {}
    unread: dict[str, str] = {}
    for name, leaf in part.entries.items():
        try:
            arrays[name] = _array(leaf, storages)
        except (DataError, zipfile.BadZipFile, OSError, EOFError, RuntimeError, ValueError) as e:
            unread[name] = str(e)
    return StateDict(part.place, arrays, unread, part.settings)


def _array(leaf: Leaf, storages: _Storages) -> NDArray[Any]:
    if isinstance(leaf, Odd):
        raise DataError(leaf.reason)
    if isinstance(leaf, PickledArray):
        return leaf.build()
    width, name = DTYPES[leaf.dtype]
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
