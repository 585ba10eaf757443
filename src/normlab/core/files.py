"""Tensors and a small JSON document in one file that is either whole or refused.

The format is safetensors, which holds no code. The document and a SHA-256 of everything else stand
in its metadata. Files are written under a temporary name, flushed, renamed, and the folder flushed.
"""

import glob
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from normlab.core.places import check_regular
from normlab.errors import DataError, UserError

Tensors = dict[str, Tensor]
LOCK = ".lock"

MOST_TENSORS = 100_000  # in a file; each takes a kilobyte, however small it is


def digest(tensors: Mapping[str, Tensor], document: str = "") -> str:
    """SHA-256 of names, types, shapes and bytes, in order of the names, and of `document`."""
    h = hashlib.sha256(document.encode())
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        h.update(f"{name} {t.dtype} {tuple(t.shape)}\n".encode())
        h.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()


def is_finite(tensors: Mapping[str, Tensor]) -> bool:
    """Whether every value of every tensor is a finite number."""
    return all(t.isfinite().all() for t in tensors.values())


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


def write_tensors(path: Path, tensors: Mapping[str, Tensor], document: Any = None) -> None:
    """Write tensors and a JSON document as one file, atomically, with the hash of both."""
    plain = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}
    text = json.dumps(document, sort_keys=True, allow_nan=False)
    # One key only: safetensors writes several in no fixed order, and equal files are a promise.
    envelope = json.dumps({"document": text, "sha256": digest(plain, text)})
    write_atomic(path, save(plain, metadata={"normlab": envelope}))


def read_safetensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors and the metadata of any safetensors file; together they are as large as it is.

    Raises:
        DataError: it holds more tensors than any network.
        SafetensorError, OSError: it is damaged, or cannot be read.
    """
    with safe_open(path, framework="pt") as f:
        names = f.keys()
        if len(names) > MOST_TENSORS:
            raise DataError(
                f"{path} holds {len(names):,} tensors; at most {MOST_TENSORS:,} are read"
            )
        return {name: f.get_tensor(name) for name in names}, f.metadata() or {}


def read_tensors(path: Path) -> tuple[Tensors, Any]:
    """Read what `write_tensors` wrote.

    Raises:
        DataError: the file is missing, cut off, altered, or not one of these.
    """
    try:
        check_regular(path)
        tensors, metadata = read_safetensors(path)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: name a run that has it") from None
    except (SafetensorError, OSError) as e:
        raise DataError(f"{path} is not a whole safetensors file ({e})") from None
    try:
        envelope = json.loads(metadata["normlab"])
        text, expected = envelope["document"], envelope["sha256"]
        altered = expected != digest(tensors, text)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise DataError(f"{path} is not a file that normlab wrote") from None
    if altered:
        raise DataError(f"{path} does not match its own SHA-256: it was altered")
    return tensors, json.loads(text)
