"""Read a user's `.npz` with no pickles and no more memory than the file warrants."""

import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any

from numpy.lib import format as npy
from numpy.typing import NDArray

from normlab.core.places import check_regular
from normlab.data.images import ARRAYS, ImageData, from_mapping
from normlab.errors import DataError

# The arrays of a file may unpack, all together, to this many times their compressed bytes (deflate
# itself reaches 1,032), or to this many bytes: blank test pictures compress well, real ones by less
# than 2.
MAX_RATIO = 100
MAX_UNSUSPECTED = 256 << 20
MAX_ARRAYS = 10_000

# What zipfile and NumPy's header parser were seen to raise on damaged files.
_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, LookupError, TypeError),
    *(RuntimeError, SyntaxError, tokenize.TokenError, OverflowError, MemoryError),
)

_MAX_HEADER = 10_000  # bytes; what NumPy itself accepts from files it does not trust


def read_npz(path: Path) -> ImageData:
    """`x_train`, `y_train`, `x_test`, `y_test` and, if there, `x_val`, `y_val` and `class_names`.

    Other arrays in the file are not looked at. See `from_mapping` for what is checked.

    Raises:
        DataError: the file cannot be read, is damaged, needs pickle, would unpack to far more
            than it holds, or its arrays are not images and labels.
    """
    arrays = read_arrays(path, (*ARRAYS, "x_val", "y_val", "class_names"))
    return from_mapping(arrays, name=path.name)


def read_arrays(
    path: Path, names: Collection[str] | None = None, *, ratio: int = MAX_RATIO
) -> dict[str, NDArray[Any]]:
    """The arrays `names`, as far as they are there, of an `.npz` file; None for all of them.

    Args:
        ratio: in place of `MAX_RATIO`.

    Raises:
        DataError: as `read_npz` says.
    """
    try:
        check_regular(path, follow=True)
        size = path.stat().st_size
        with warnings.catch_warnings(), zipfile.ZipFile(path) as archive:
            warnings.simplefilter("ignore")  # NumPy on headers of Python 2
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            wanted = members if names is None else [name for name in names if name in members]
            _check_sum([members[name] for name in wanted], size, ratio)
            return {name: _read_array(archive, members[name]) for name in wanted}
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; give a .npz file") from error
    except _DAMAGE as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "damaged"
        raise DataError(f"{path}: {reason}; not a readable .npz file") from error


def _check_sum(wanted: Collection[zipfile.ZipInfo], size: int, ratio: int) -> None:
    """Refuse, before anything is unpacked, what all together would be too much."""
    if len(wanted) > MAX_ARRAYS:
        raise DataError(f"{len(wanted):,} arrays; at most {MAX_ARRAYS:,} are read")
    packed = sum(info.compress_size for info in wanted)
    unpacked = sum(info.file_size for info in wanted)
    if packed > size:
        raise DataError("its members claim more bytes than it has: they overlap, or it is damaged")
    if unpacked > max(MAX_UNSUSPECTED, ratio * packed):
        raise DataError(
            f"its arrays claim {unpacked:,} bytes out of {packed:,}; "
            "save them with numpy.savez, uncompressed, if that is true"
        )


def _read_array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> NDArray[Any]:
    name = info.filename
    stored = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    if not stored or info.flag_bits & 1:
        raise DataError(f"{name} is encrypted, damaged or packed by no method of NumPy's")
    with archive.open(info) as member:
        _check_header(member, info)
    with archive.open(info) as member:
        return npy.read_array(member, allow_pickle=False, max_header_size=_MAX_HEADER)


def _check_header(member: IO[bytes], info: zipfile.ZipInfo) -> None:
    """Refuse, before NumPy allocates anything, an array that is not the size of its member."""
    version = npy.read_magic(member)
    if version == (1, 0):
        shape, _, dtype = npy.read_array_header_1_0(member, max_header_size=_MAX_HEADER)
    elif version == (2, 0):
        shape, _, dtype = npy.read_array_header_2_0(member, max_header_size=_MAX_HEADER)
    else:
        raise DataError(f"{info.filename} has NumPy's format {version}; save it by numpy.savez")
    if dtype.hasobject or dtype.kind not in "iufbUS" or dtype.itemsize == 0:
        raise DataError(f"{info.filename} holds {dtype}; give uint8 pixels and whole-number labels")
    count = 1
    for length in shape:  # Python's integers: NumPy's would overflow
        count *= length
    if min(shape, default=0) < 0 or count * dtype.itemsize != info.file_size - member.tell():
        raise DataError(f"{info.filename} claims shape {shape} but has another number of bytes")
