"""Read a PyTorch file without running code: its pickle is followed, never executed.

`torch.save` writes a zip: `data.pkl`, a pickle that mentions tensors, and one stored file for each
storage. The pickle goes through normlab's own reader, which makes no calls; the few functions that
a state dict needs are known by name and done here, on NumPy arrays. Whole modules, and files older
than PyTorch 1.6, are refused; nothing falls back to `torch.load`.
"""

import math
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normlab.core.pickles import PickleReader, read_with
from normlab.errors import DataError

Arrays = dict[str, NDArray[Any]]

_STORAGES = {
    "torch DoubleStorage": "<f8",
    "torch FloatStorage": "<f4",
    "torch HalfStorage": "<f2",
    "torch BFloat16Storage": "bfloat16",
    "torch LongStorage": "<i8",
    "torch IntStorage": "<i4",
    "torch ShortStorage": "<i2",
    "torch CharStorage": "<i1",
    "torch ByteStorage": "<u1",
    "torch BoolStorage": "?",
}
_DICT = "collections OrderedDict"
_TENSOR = "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"
_KNOWN = {*_STORAGES, _DICT, _TENSOR, _PARAMETER}
# Where training scripts put the state dict, in the order in which they are looked up.
_PLACES = ("state_dict", "model_state_dict", "model", "net", "weights")


def read_torch(path: Path) -> Arrays:
    """The tensors of the state dict in a file that `torch.save` wrote, by name.

    Raises:
        DataError: it is damaged, too old, not a state dict, or asks for anything else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            value = read_with(_StateDictReader(archive), _member(archive, "data.pkl"))
    except zipfile.BadZipFile:
        raise DataError(
            f"{path} is no zip: PyTorch before 1.6 wrote other files; load it where you trust it "
            "and save its state_dict() again"
        ) from None
    except (*(DataError, RuntimeError, EOFError, OSError), *(ValueError, NotImplementedError)) as e:
        raise DataError(f"{path}: {e}") from None
    arrays = _find_state_dict(value)
    if arrays is None:
        raise DataError(f"{path} holds no state dict: save model.state_dict()")
    return arrays


def _find_state_dict(value: Any) -> Arrays | None:
    if not isinstance(value, Mapping):
        return None
    if any(isinstance(v, np.ndarray) for v in value.values()):
        return {str(k): v for k, v in value.items() if isinstance(v, np.ndarray)}
    return next((a for p in _PLACES if (a := _find_state_dict(value.get(p)))), None)


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    """The file `name` in the archive's one folder; stored as it is, so no larger than it looks."""
    found = [i for i in archive.infolist() if i.filename.partition("/")[2] == name]
    if len(found) != 1:
        raise DataError(f"no {name!r} in the file, or several: torch.save did not write it")
    info, whole = found[0], os.fstat(archive.fp.fileno()).st_size if archive.fp else 0
    if info.compress_type != zipfile.ZIP_STORED or max(info.file_size, info.compress_size) > whole:
        raise DataError(f"{name!r} is compressed: torch.save did not write it")
    return archive.read(info)


class _StateDictReader(PickleReader):
    """Rebuilds dictionaries and tensors; refuses every other name."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        super().__init__()
        self.archive = archive
        self.storages: dict[str, NDArray[Any]] = {}

    def step_call(self, name: str, argument: Any) -> None:
        match name:
            case "GLOBAL":
                self.stack.append(_known(argument))
            case "STACK_GLOBAL":
                module, attribute = self.pop(2)
                self.stack.append(_known(f"{module} {attribute}"))
            case "BINPERSID":
                (reference,) = self.pop(1)
                self.stack.append(self.storage(reference))
            case "REDUCE":
                function, arguments = self.pop(2)
                self.stack.append(_rebuild(function, arguments))
            case "BINFLOAT":
                self.stack.append(argument)
            case "BUILD":  # attributes of a dictionary, such as a state dict's _metadata
                self.pop(1)
                if not isinstance(self.stack[-1], dict):
                    raise ValueError
            case _:
                raise DataError(f"the pickle uses {name}, which no state dict does; not read")

    def update(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict) or len(items) % 2:
            raise ValueError
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def storage(self, reference: Any) -> NDArray[Any]:
        """The flat array that `('storage', type, key, device, count)` refers to."""
        match reference:
            case ("storage", str(kind), str(key), str(), int(count)) if kind in _STORAGES:
                pass
            case _:
                raise DataError("the pickle refers to a storage in an unknown way")
        if key not in self.storages:
            names = {name.partition("/")[2] for name in self.archive.namelist()}
            if "byteorder" in names and _member(self.archive, "byteorder") != b"little":
                raise DataError("its numbers are big-endian: save it on another machine")
            self.storages[key] = _numbers(_member(self.archive, f"data/{key}"), _STORAGES[kind])
        if len(self.storages[key]) != count:
            raise DataError(f"storage {key!r} has not the {count} values that it should have")
        return self.storages[key]


def _numbers(content: bytes, dtype: str) -> NDArray[Any]:
    if dtype != "bfloat16":
        return np.frombuffer(content, dtype)
    return (np.frombuffer(content, "<u2").astype("<u4") << 16).view("<f4")


def _known(name: str) -> str:
    if name not in _KNOWN:
        called = name.replace(" ", ".")[:80]
        raise DataError(
            f"the pickle asks for {called!r}, which no state dict needs; refused, nothing was "
            "run: save model.state_dict()"
        )
    return name


def _rebuild(function: Any, arguments: Any) -> Any:
    match function, arguments:
        case (str() as name, ()) if name == _DICT:
            return {}
        case (str() as name, (np.ndarray() as data, *_)) if name == _PARAMETER:
            return data
        case (str() as name, (np.ndarray() as data, int(start), tuple(size), tuple(stride), *_)):
            if name == _TENSOR:
                return _tensor(data, start, size, stride)
    raise ValueError


def _tensor(
    data: NDArray[Any], start: int, size: tuple[int, ...], stride: tuple[int, ...]
) -> NDArray[Any]:
    """A view of the storage, which must hold all of it."""
    whole = [*size, *stride]
    if len(size) != len(stride) or not all(type(n) is int and n >= 0 for n in [start, *whole]):
        raise ValueError
    last = start + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    count = math.prod(size)
    if count > len(data) or (count and last >= len(data)):
        raise DataError(f"a tensor of size {size} does not fit into its storage")
    strides = [step * data.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(data[start:], size, strides, writeable=False)
