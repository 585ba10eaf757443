"""Run functions in a child process with limits of memory and time.

For libraries in C that read strangers' files: what crashes, loops for ever or asks for gigabytes
there is one `LimitError` here. The child can write no file, but it is no jail: otherwise it has
this process's rights.
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

_DYING = 1.0  # seconds for a process that no longer answers to end by itself
_CHILD = "import sys; sys.path[:] = {path!r}; from normlab.core.sandbox import _serve; _serve()"
_ENVIRONMENT = {
    # Each thread of a mathematics library sets aside memory that it does not use.
    **{"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "ARROW_IO_THREADS": "1"},
    # Large blocks of memory go back to the system when they are freed.
    **{"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "1048576"},
}
# A process that keeps this many bytes more than it had after its first call is replaced.
_KEPT = 32 << 20


TAKES = "takes "  # how what is said of a limit begins


class LimitError(DataError):
    """A function took too much memory or time, or its process died."""


class DeathError(LimitError):
    """The process died in a call, and not of its limits.

    signal: what ended it; None if it left by itself.
    """

    def __init__(self, message: str, signum: signal.Signals | None) -> None:
        super().__init__(message)
        self.signal = signum


class Worker:
    """A child process that does one call at a time.

    The first call starts it, and so does the first after a failure.

    memory: bytes that a call may take beyond what the process has. Linux only.
    seconds: wall-clock time that a call may take, the start of the process included. None if the
        caller sees to it with `interrupt`; otherwise each call has a thread that does.
    cpu_seconds: processor time that a call may take; by default as much as it likes.
    """

    def __init__(
        self, *, memory: int, seconds: float | None, cpu_seconds: float | None = None
    ) -> None:
        self.memory, self.seconds, self.cpu_seconds = memory, seconds, cpu_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._late = False

    @property
    def started(self) -> bool:
        """Whether there is a process that the next call can use."""
        return self._process is not None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, t: TracebackType | None
    ) -> None:
        self.close()

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """Return what `function(*args)` returns in the child.

        Args:
            function: one that a module has under its name, so that it can be pickled.

        Raises:
            DeathError: the process died.
            LimitError: a limit was passed.
            Exception: whatever the function raised.
        """
        return self._call(self.seconds, self.cpu_seconds, function, args)

    def start(self, prepare: Callable[[], object], *, seconds: float) -> None:
        """Start the process and let it call `prepare`, without a limit of processor time.

        Raises:
            LimitError: it takes longer than `seconds` on the clock, or the process died.
        """
        self._call(seconds, None, prepare, ())

    def interrupt(self) -> None:
        """End the call that another thread waits for, as one that took too long."""
        process, self._late = self._process, True
        if process is not None:
            process.kill()

    def _call(
        self,
        seconds: float | None,
        cpu_seconds: float | None,
        function: Callable[..., T],
        args: Any,
    ) -> T:
        if self._process is not None and self._process.poll() is not None:
            self.close()  # it died between two calls, which is not this one's fault
        process = self._process = self._process or _start()
        self._late = False
        timer = None if seconds is None else threading.Timer(seconds, self.interrupt)
        if timer is not None:
            timer.daemon = True
            timer.start()
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            request = (self.memory, cpu_seconds, function, args)
            pickle.dump(request, process.stdin, protocol=5)
            process.stdin.flush()
            # From a process of ours, not from a file.
            good, value, spent = pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_DYING)  # by itself, so that its exit code tells why
            self.close()
            if self._late:
                most = "it may" if seconds is None else f"the {seconds:g} s it may take"
                raise LimitError(f"{TAKES}longer than {most}") from None
            raise self._death(process) from None
        except BaseException:  # Ctrl-C, between two messages
            self.close()
            raise
        finally:
            if timer is not None:
                timer.cancel()
        if spent or isinstance(value, MemoryError):  # its heap may be in pieces
            self.close()
        if good:
            result: T = value
            return result
        if isinstance(value, MemoryError):
            raise LimitError(
                f"{TAKES}more than the {self.memory >> 20:,} MiB of memory it may take"
            )
        raise value

    def _death(self, process: "subprocess.Popen[bytes]") -> LimitError:
        code = process.returncode
        if code == -signal.SIGPROF:
            seconds = f"{self.cpu_seconds:g} s"
            return LimitError(f"{TAKES}longer than the {seconds} of processor time it may take")
        try:
            died_of = signal.Signals(-code)
        except ValueError:
            return DeathError(f"its reader crashed (exit code {code})", None)
        return DeathError(f"its reader crashed ({died_of.name})", died_of)

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
        env=child_environment(**_ENVIRONMENT),
    )


def _serve() -> None:
    """What the child does, until its parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends us
    _write_no_files()
    requests = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    first = None
    while True:
        try:
            answer = _answer(*pickle.load(requests))
        except EOFError:
            return
        has = _address_space_and_data()
        first = first or has
        spent = has is not None and first is not None and has[1] > first[1] + _KEPT
        answers.write(pickle.dumps((*answer, spent), protocol=5))
        answers.flush()
        del answer


def _answer(
    memory: int, cpu_seconds: float | None, function: Callable[..., Any], args: Any
) -> tuple[bool, Any]:
    """Whether the call went well, and what it returned or raised."""
    _limit(memory)
    if cpu_seconds is not None:
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)  # then SIGPROF ends the process
    try:
        return True, function(*args)
    except Exception as e:
        return False, e.with_traceback(None)
    finally:
        if cpu_seconds is not None:
            signal.setitimer(signal.ITIMER_PROF, 0)
        _limit(None)


def _write_no_files() -> None:
    """Let this process write to no file, and leave no picture of its memory when it crashes."""
    try:
        import resource
    except ImportError:
        return  # Windows
    for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        resource.setrlimit(limit, (0, 0))


def _limit(memory: int | None) -> None:
    """Let this process take `memory` bytes more than it has; None for as much as it likes."""
    has = _address_space_and_data()
    if has is None:
        return
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = hard if memory is None else has[0] + memory
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))


def _address_space_and_data() -> tuple[int, int] | None:
    """Bytes that this process has: all of its address space, and its data alone.

    None where the system does not tell: on any but Linux.
    """
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as f:
            pages = f.read().split()
    except (ImportError, OSError):
        return None
    return int(pages[0]) * resource.getpagesize(), int(pages[5]) * resource.getpagesize()
