"""Make the n-th write, flush or rename of this process fail, or die in the middle of it.

Python's `open`, `os.fsync`, `os.replace`, `os.rename` and `os.link` are replaced while `Faults` is
entered, so that whatever the package writes is counted, in the order in which it happens. A write
that fails has written its first half before: that is how a disk fills.
"""

import builtins
import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy.lib._format_impl as npy

KILL = "kill"
_RENAMES = ("replace", "rename", "link")


class Faults:
    """Counts events below `folder`; from the n-th on (from 1; 0 for never) they fail.

    Attributes:
        fault: an errno, or `KILL` to end this process by SIGKILL.
        lasting: whether all later events of the kind fail, too, as on a full disk.
        events: (kind, file's name) of all events so far.
    """

    def __init__(
        self, folder: Path, n: int = 0, fault: int | str = KILL, *, lasting: bool = False
    ) -> None:
        self.folder, self.n, self.fault, self.lasting = folder.resolve(), n, fault, lasting
        self.events: list[tuple[str, str]] = []
        self.failing: str | None = None
        self._undo: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> "Faults":
        self._replace(builtins, "open", self._open)
        self._replace(io, "open", self._open)
        self._replace(os, "fsync", self._fsync)
        for name in _RENAMES:
            self._replace(os, name, self._moving(name, getattr(os, name)))
        # NumPy hands arrays to C's stdio where it sees a real file; here it shall use `write`.
        self._replace(npy, "isfileobj", lambda _: False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, t: TracebackType | None
    ) -> None:
        for owner, name, original in reversed(self._undo):
            setattr(owner, name, original)

    def _replace(self, owner: Any, name: str, new: Any) -> None:
        self._undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, new)

    def event(self, kind: str, path: Path, before: Callable[[], None] | None = None) -> None:
        """Note an event and fail if it is its turn, after having done `before`.

        Raises:
            OSError: this event fails.
        """
        if not path.resolve().is_relative_to(self.folder):
            return
        self.events.append((kind, path.name))
        if len(self.events) != self.n and not (self.lasting and self.failing == kind):
            return
        self.failing = kind
        if before is not None:
            before()
        if self.fault == KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        assert isinstance(self.fault, int)
        raise OSError(self.fault, os.strerror(self.fault))

    def _open(self, file: Any, mode: str = "r", *arguments: Any, **keywords: Any) -> Any:
        if isinstance(file, int) or not set(mode) & set("wax+"):
            return _OPEN(file, mode, *arguments, **keywords)
        raw = _Raw(self, file, mode.replace("b", "").replace("t", ""))
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding="utf-8")

    def _fsync(self, fd: int) -> None:
        self.event("flush", Path(os.readlink(f"/proc/self/fd/{fd}")))
        _FSYNC(fd)

    def _moving(self, name: str, original: Callable[..., None]) -> Callable[..., None]:
        def move(source: Any, target: Any, *arguments: Any, **keywords: Any) -> None:
            self.event("rename", Path(target))
            original(source, target, *arguments, **keywords)

        return move


_OPEN, _FSYNC = builtins.open, os.fsync


class _Raw(io.FileIO):
    """A file whose writes are counted."""

    def __init__(self, faults: Faults, file: Any, mode: str) -> None:
        super().__init__(file, mode)
        self.faults, self.path = faults, Path(os.fspath(file))

    def write(self, content: Any) -> int:
        half = memoryview(content).cast("B")[: len(content) // 2]
        self.faults.event("write", self.path, lambda: super(_Raw, self).write(half) and None)
        return super().write(content)
