"""Read known members of an archive or folder as bytes; nothing is ever extracted.

A member's own path plays no part: only its last component is compared with the names asked for.
Links, devices and sparse files are passed over. Unpacking stops at a bound on each member and on
the whole, so that a small file cannot ask for much.
"""

import gzip
import stat
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO, cast

from normlab.core.places import check_regular
from normlab.errors import DataError

# Any real archive of CIFAR-10 unpacks to less than 190 MB.
MAX_UNPACKED = 256 << 20
MAX_MEMBERS = 1000
# Of a header at a time; tarfile copies what a global one says into every member behind it.
MAX_HEADER = 64 << 10

_DAMAGE = (tarfile.TarError, zlib.error, EOFError, OSError, ValueError, LookupError, RecursionError)


def read_members(path: Path, sizes: Mapping[str, int]) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the members in `sizes`, each at most that many bytes, in stored order.

    path: a folder (its files, not those of folders below), or a tar archive, gzipped or plain.

    Raises:
        DataError: the path cannot be read, a member is too large, or the archive is damaged.
    """
    if path.is_dir():
        yield from _folder_members(path, sizes)
        return
    try:
        check_regular(path, follow=True)
        with path.open("rb") as file:
            compressed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            yield from _tar_members(file, compressed, sizes)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except _DAMAGE as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "damaged"
        raise DataError(f"{path}: {reason}; not a readable tar archive of CIFAR-10") from error


def _folder_members(folder: Path, sizes: Mapping[str, int]) -> Iterator[tuple[str, bytes]]:
    for name, size in sizes.items():
        path = folder / name
        try:
            # A link to a file is the user's own doing; a pipe or device would block for ever.
            if not stat.S_ISREG(path.stat().st_mode):
                continue
            with path.open("rb") as file:
                content = file.read(size + 1)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from error
        if len(content) > size:
            raise DataError(f"{path} is larger than the {size:,} bytes it can have")
        yield name, content


def _tar_members(
    file: BinaryIO, compressed: bool, sizes: Mapping[str, int]
) -> Iterator[tuple[str, bytes]]:
    plain = gzip.GzipFile(fileobj=file) if compressed else file
    bounded = _Bounded(plain)
    with tarfile.open(fileobj=cast(IO[bytes], bounded), mode="r:") as archive:
        for count, member in enumerate(archive):
            # Or it keeps every member, with its copy of the headers.
            archive.members.clear()  # type: ignore[attr-defined]
            if count == MAX_MEMBERS:
                raise DataError(f"more than {MAX_MEMBERS} members; not CIFAR-10")
            name = member.name.rpartition("/")[2]
            regular = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE)
            if name not in sizes or not regular or member.issparse():
                continue
            if member.size > sizes[name]:
                raise DataError(f"{name} is larger than the {sizes[name]:,} bytes it can have")
            content = archive.extractfile(member)
            if content is None:
                continue
            with bounded.reading(member.size):
                data = content.read()
            if len(data) != member.size:
                raise DataError("the archive ends too early")
            yield name, data


class _Bounded:
    """The part of a binary file that tarfile uses; stops where `MAX_UNPACKED` is passed."""

    def __init__(self, file: BinaryIO | gzip.GzipFile) -> None:
        self._file = file
        self._largest_read = MAX_HEADER

    @contextmanager
    def reading(self, size: int) -> Iterator[None]:
        """Allow reads of `size` bytes, a member's content."""
        self._largest_read = max(size, MAX_HEADER)
        try:
            yield
        finally:
            self._largest_read = MAX_HEADER

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self._largest_read:  # a header's claim
            raise DataError(f"a part of {size:,} bytes; not CIFAR-10")
        self._check(self._file.tell() + size)
        return self._file.read(size)

    def seek(self, position: int) -> int:
        self._check(position)
        return self._file.seek(position)

    def tell(self) -> int:
        return self._file.tell()

    def _check(self, position: int) -> None:
        if position > MAX_UNPACKED:
            raise DataError(f"unpacks to more than {MAX_UNPACKED >> 20} MiB; not CIFAR-10")
