"""Commands of other people's, run one by one by a `core.minder`, which outlives none of them."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normlab.core import minder
from normlab.errors import NormlabError, UserError

_LIVE: set["subprocess.Popen[bytes]"] = set()
_LOCK = threading.Lock()


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: its exit code; below 0 the signal that ended it.
        processor_seconds: of it and of the descendants that it waited for.
    """

    code: int
    timed_out: bool
    seconds: float
    processor_seconds: float


def run(
    words: Sequence[str],
    *,
    folder: Path,
    environment: Mapping[str, str],
    stdout: Path,
    stderr: Path,
    limit: float | None = None,
) -> Ended:
    """Run a command to its end, in `folder`, its output into two files.

    When this returns, no process of the command is left. If this process dies, the command ends.

    Args:
        limit: seconds after which it is ended.

    Raises:
        UserError: there is no such program, or it cannot be run.
        NormlabError: the run was broken off by `end_all`, or its minder was killed.
    """
    if os.name != "posix":
        raise UserError("commands are run on Linux and macOS only: use normlab.compare(function)")
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", minder.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=dict(environment),
        start_new_session=True,
    )
    order = {
        "words": list(words),
        "cwd": str(folder),
        "stdout": str(stdout),
        "stderr": str(stderr),
        "limit": limit,
    }
    with _LOCK:
        _LIVE.add(process)
    try:
        begun = _tell(process, order)
        if "error" in begun:
            raise UserError(f"{begun['file'] or words[0]!r}: {begun['error']}: cannot be run")
        end = _hear(process)
    finally:
        with _LOCK:
            broken_off = process not in _LIVE
            _LIVE.discard(process)
        _close(process)
    if broken_off:
        raise NormlabError("broken off")
    if "code" not in end:
        with suppress(OSError, KeyError):
            os.killpg(begun["pid"], signal.SIGKILL)
        raise NormlabError("the process that minds the run was killed")
    return Ended(**end)


def end_all() -> None:
    """End every command that is under way, from any thread or a signal's handler."""
    for process in list(_LIVE):
        _LIVE.discard(process)
        with suppress(OSError, ProcessLookupError):
            process.send_signal(signal.SIGTERM)


def _tell(process: "subprocess.Popen[bytes]", order: Mapping[str, Any]) -> dict[str, Any]:
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.write(json.dumps(order).encode() + b"\n")
        process.stdin.flush()
    return _hear(process)


def _hear(process: "subprocess.Popen[bytes]") -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    found: dict[str, Any] = json.loads(line) if line else {}
    return found


def _close(process: "subprocess.Popen[bytes]") -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError):
        process.stdin.close()
    process.wait()
    process.stdout.close()
