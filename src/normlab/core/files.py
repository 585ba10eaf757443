"""Files that are either whole or not there, and folders that one process writes to at a time.

A file is written under a temporary name, flushed, renamed, and the folder flushed.
"""

import glob
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from normlab.core.places import check_regular
from normlab.errors import UserError

LOCK = ".lock"


def write_atomic(path: Path, content: bytes, *, replace: bool = True) -> None:
    """Put `content` at `path` so that a reader finds the old file or the new one, never a part.

    Raises:
        FileExistsError: without `replace`, if there is a file already.
        OSError: it could not be written; `filename` is `path`, and what was there is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            if not _is_alive(leftover.name.split(".")[-2]):
                leftover.unlink(missing_ok=True)
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb") as f:  # never through a link that somebody put there
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        if replace:
            os.replace(temporary, path)
        else:
            os.link(temporary, path)
        flush_folder(path.parent)
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(path)) from e  # of the subclass that errno names
    finally:
        temporary.unlink(missing_ok=True)


def _is_alive(pid: str) -> bool:
    """Whether a process of this number may be writing still; where in doubt it may."""
    if os.name != "posix" or not pid.isdecimal():  # elsewhere signal 0 would end the process
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return True


def flush_folder(folder: Path) -> None:
    """Make the folder's entries survive a power cut, where the system can be asked to."""
    if os.name != "posix":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sweep(folder: Path, name: str = "*") -> None:
    """Remove what killed writers of the file `name` left; for whoever holds the folder's lock."""
    for leftover in folder.glob(f".{name}.*.tmp"):
        if leftover.name.split(".")[-2].isdecimal():
            leftover.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to `folder`; the system frees the lock of a dead process.

    Raises:
        UserError: another process is at work there.
    """
    from filelock import FileLock, Timeout

    if os.path.lexists(folder / LOCK):
        check_regular(folder / LOCK)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"another normlab is at work in {str(folder)!r}: wait for it, or choose another --out"
        ) from None
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        lock.release()


def write_json(path: Path, value: Any, *, replace: bool = True) -> None:
    """Write `value` as readable JSON, atomically; see `write_atomic`."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomic(path, text.encode(), replace=replace)
