"""Minds one command for `core.minding`: a time limit, and nothing left behind.

A program of its own, started without Python's site and in a session of its own. Its first line of
input says what to run; then the input stays open, and its end means that whoever asked is gone.
The command leads a process group. When it has ended, or has to, the group is killed; on Linux also
every descendant that left the group, since orphans are handed to this process.
"""

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import Any

GRACE = 3.0  # seconds between SIGTERM and SIGKILL
SUBREAPER, DEATH_SIGNAL = 36, 1  # of Linux's prctl


def main() -> None:
    for ignored in (signal.SIGINT, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    order = json.loads(sys.stdin.buffer.readline())
    _prctl(SUBREAPER, 1)
    asked, gone = threading.Event(), threading.Event()  # to end; of its own accord or not
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
    began = time.monotonic()
    try:
        with open(order["stdout"], "wb") as out, open(order["stderr"], "wb") as err:
            child = subprocess.Popen(
                order["words"],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=order["cwd"],
                start_new_session=True,
                preexec_fn=_begin_child,
            )
    except OSError as e:
        _tell(error=e.strerror or str(e), file=e.filename or "")
        return
    _tell(pid=child.pid)
    threading.Thread(target=_await_end_of_input, args=(asked,), daemon=True).start()
    threading.Thread(target=_await_end, args=(child, gone, asked), daemon=True).start()
    limit = order["limit"]
    timed_out = not asked.wait(None if limit is None else began + limit - time.monotonic())
    _end_all(child, gone)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    _tell(
        code=child.returncode,
        timed_out=timed_out,
        seconds=time.monotonic() - began,
        processor_seconds=used.ru_utime + used.ru_stime,
    )


def _await_end(
    child: "subprocess.Popen[bytes]", gone: threading.Event, asked: threading.Event
) -> None:
    """Wait for the command, which stays a zombie: so its number still is its group's alone."""
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    gone.set()
    asked.set()


def _end_all(child: "subprocess.Popen[bytes]", gone: threading.Event) -> None:
    """End the command's group, kindly if the command is still there, and what was handed to us."""
    if not gone.is_set():
        with suppress(OSError):
            os.killpg(child.pid, signal.SIGTERM)
        gone.wait(GRACE)
    with suppress(OSError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    while strays := _children():
        for stray in strays:
            with suppress(OSError):
                os.kill(stray, signal.SIGKILL)
        for stray in strays:
            with suppress(OSError):
                os.waitpid(stray, 0)


def _children() -> list[int]:
    """This process's children, those handed to it included; none where the system does not say."""
    found: list[int] = []
    with suppress(OSError):
        for task in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{task}/children") as listed:
                found += map(int, listed.read().split())
    return found


def _begin_child() -> None:
    """In the command's process: defaults for signals, and an end if this one is killed."""
    for changed in (signal.SIGINT, signal.SIGHUP):
        signal.signal(changed, signal.SIG_DFL)
    _prctl(DEATH_SIGNAL, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _await_end_of_input(asked: threading.Event) -> None:
    while os.read(0, 1):
        pass
    asked.set()


def _tell(**what: Any) -> None:
    with suppress(OSError):
        print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main()
    os._exit(0)  # threads that wait for input would hold Python's own end up
