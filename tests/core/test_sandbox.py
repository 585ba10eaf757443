"""Functions in child processes: what they may not do ends as one line here."""

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from normlab.core.sandbox import LimitError, Worker, limited
from normlab.data.pictures.decoding import Readers
from normlab.errors import DataError

ROOM = 256 << 20


def double(x: int) -> int:
    print("what a library prints is no answer")
    return 2 * x


def fail(message: str) -> None:
    raise DataError(message)


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def allocate(size: int) -> int:
    return int(np.ones(size, np.uint8).sum())


def process_id() -> int:
    return os.getpid()


def test_results_and_errors_come_back_from_one_process() -> None:
    with Worker(memory=ROOM, seconds=60) as worker:
        assert worker.call(double, 21) == 42
        first = worker.call(process_id)
        assert first != os.getpid()
        with pytest.raises(DataError, match=r"^as it was$"):
            worker.call(fail, "as it was")
        assert worker.call(process_id) == first


def test_a_crash_is_one_line_and_the_next_call_works() -> None:
    with Worker(memory=ROOM, seconds=60) as worker:
        with pytest.raises(LimitError, match=r"crashed \(SIGSEGV\)"):
            worker.call(crash)
        assert worker.call(double, 1) == 2


def test_time_is_limited() -> None:
    started = time.monotonic()
    with pytest.raises(LimitError, match="longer than the 1 s"):
        limited(time.sleep, 60, memory=ROOM, seconds=1)
    assert time.monotonic() - started < 20


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_memory_is_limited() -> None:
    with Worker(memory=ROOM, seconds=60) as worker:
        assert worker.call(allocate, ROOM // 2) == ROOM // 2
        with pytest.raises(LimitError, match="more than the 256 MiB"):
            worker.call(allocate, 2 * ROOM)
        assert worker.call(allocate, 10) == 10


def test_a_module_beside_the_pictures_is_not_imported(in_tmp: Path) -> None:
    (in_tmp / "pickle.py").write_text("raise SystemExit('imported')")
    (in_tmp / "numpy.py").write_text("raise SystemExit('imported')")
    assert limited(double, 3, memory=ROOM, seconds=60) == 6


def test_no_process_is_left(in_tmp: Path) -> None:
    with Readers() as readers:
        results = list(readers.read([Path("none.png"), b"no picture"], 8))
        workers = [w._process for w in readers._workers if w._process is not None]
    assert [problem[:11] for _, _, problem in results] == ["cannot be r", "not a pictu"]
    assert workers
    assert all(process.returncode is not None for process in workers)
