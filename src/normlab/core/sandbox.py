"""Run functions in a child process that may take so much memory and time and no more.

For libraries in C that read strangers' files: what crashes, loops for ever or asks for gigabytes
there is one `LimitError` here. The child is no jail: it has this process's rights.
"""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

from normlab.core.children import child_environment, module_path
from normlab.errors import DataError

T = TypeVar("T")

_CHILD = "import sys; sys.path[:] = {path!r}; from normlab.core.sandbox import _serve; _serve()"
# Each thread of a mathematics library sets aside memory that it does not use.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "ARROW_IO_THREADS": "1"}


class LimitError(DataError):
    """A function took too much memory or time, or its process crashed."""


class Worker:
    """A child process that does one call at a time, started by the first and after a failure.

    memory: bytes that a call may take beyond what the process has; not enforced but on Linux.
    seconds: of wall-clock time that a call may take, the start of the process included.
    """

    def __init__(self, *, memory: int, seconds: float) -> None:
        self.memory, self.seconds = memory, seconds
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, t: TracebackType | None
    ) -> None:
        self.close()

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """What `function`, which a module can be asked for by name, returns in the child.

        Raises:
            LimitError: a limit was passed, or the process died.
            Exception: whatever the function raised.
        """
        process = self._process = self._process or _start()
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(self.seconds, end)
        timer.daemon = True
        timer.start()
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            pickle.dump((self.memory, function, args), process.stdin, protocol=5)
            process.stdin.flush()
            good, value = pickle.load(process.stdout)  # from a process of ours, not from a file
        except (OSError, EOFError, pickle.UnpicklingError):
            self.close()
            if late.is_set():
                raise LimitError(f"takes longer than the {self.seconds:g} s it may take") from None
            raise LimitError(f"its reader crashed ({_cause(process)})") from None
        except BaseException:  # Ctrl-C, between two messages
            self.close()
            raise
        finally:
            timer.cancel()
        if good:
            result: T = value
            return result
        if isinstance(value, MemoryError):
            self.close()  # its heap may be in pieces
            raise LimitError(f"takes more than the {self.memory >> 20:,} MiB of memory it may take")
        raise value

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in filter(None, (process.stdin, process.stdout)):
                with contextlib.suppress(OSError):  # what was not sent
                    pipe.close()


def limited(function: Callable[..., T], *args: Any, memory: int, seconds: float) -> T:
    """One call in a process of its own; see `Worker.call`."""
    with Worker(memory=memory, seconds=seconds) as worker:
        return worker.call(function, *args)


def _start() -> "subprocess.Popen[bytes]":
    code = _CHILD.format(path=module_path())
    return subprocess.Popen(
        [sys.executable, "-P", "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=child_environment(**_ONE_THREAD),
    )


def _cause(process: "subprocess.Popen[bytes]") -> str:
    code = process.returncode
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit code {code}"


def _serve() -> None:
    """What the child does, until its parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends us
    requests = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    while True:
        try:
            memory, function, args = pickle.load(requests)
        except EOFError:
            return
        _limit(memory)
        try:
            answer = (True, function(*args))
        except Exception as e:
            answer = (False, e.with_traceback(None))
        _limit(None)
        answers.write(pickle.dumps(answer, protocol=5))
        answers.flush()


def _limit(memory: int | None) -> None:
    """Let this process take `memory` bytes more than it has; None for as much as it likes."""
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as f:
            has = int(f.read().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        return  # no Linux
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = hard if memory is None else has + memory
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
