"""The command in a forked process that may take so much memory and time, and is watched.

A process that has loaded PyTorch is forked, so that a session costs what its command costs. Run it
from a process of its own (`python tests/attack`): the limits are inherited.
"""

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MEMORY = 500 << 20  # bytes that a session may use beyond what it has at its start
ROOM = 3 << 30  # of addresses, which libraries take and do not use
SECONDS = 60.0


@dataclass(frozen=True)
class Session:
    """An ended session. `code` is None if it had to be killed."""

    code: int | None
    text: str
    memory: int

    @property
    def problem(self) -> str | None:
        """What is wrong with it whatever was asked; None for an end that a user can live with."""
        if self.code is None:
            return f"takes longer than {SECONDS:g} s"
        if self.code < 0:
            return f"ended by signal {-self.code}"
        if "Traceback" in self.text or "out of memory" in self.text:
            return self.text[-400:]
        if self.memory > MEMORY:
            return f"took {self.memory >> 20:,} MiB"
        if self.code not in (0, 1, 2):
            return f"exit code {self.code}: {self.text[-200:]}"
        if controls := {c for c in self.text if c != "\n" and not c.isprintable()}:
            return f"printed {sorted(controls)!r}"
        if self.code == 2 and len(self.text.strip().split("\n")[-1]) > 2_000:
            return "an error longer than a page"
        return None


def run(words: Sequence[str], folder: Path, **environment: str) -> Session:
    """`normlab` and these words in `folder`."""
    output = folder.parent / f"{folder.name}.output"
    before = _resident()
    child = os.fork()
    if child == 0:
        _session(words, folder, output, environment)
    end = time.monotonic() + SECONDS
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.wait4(child, 0)
            return Session(None, output.read_text("utf-8", "replace"), 0)
        time.sleep(0.01)
    code = os.waitstatus_to_exitcode(status)
    memory = (usage.ru_maxrss << 10) - before
    return Session(code, output.read_text("utf-8", "surrogateescape"), memory)


def _session(words: Sequence[str], folder: Path, output: Path, more: dict[str, str]) -> None:
    """What the forked process does; never returns."""
    code = 70
    try:
        os.chdir(folder)
        os.environ.update(more)
        stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        _limit()
        from normlab.__main__ import run as command

        code = command(list(words))
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _resident() -> int:
    with open("/proc/self/status", encoding="ascii") as f:
        line = next(line for line in f if line.startswith("VmRSS"))
    return int(line.split()[1]) << 10


def _limit() -> None:
    import resource

    with open("/proc/self/statm", encoding="ascii") as f:
        has = int(f.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + ROOM, resource.RLIM_INFINITY))
