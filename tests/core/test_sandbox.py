"""Functions in child processes: what they may not do ends as one line here."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from normlab.core.sandbox import DeathError, LimitError, Worker, limited
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


def end_by(signum: int) -> None:
    os.kill(os.getpid(), signum)


def spin() -> None:
    while True:
        pass


def nap() -> None:
    time.sleep(60)


def write(path: str) -> None:
    with open(path, "w") as f:
        f.write("x" * 100)


KEPT: list[bytes] = []


def keep(size: int) -> None:
    KEPT.append(b"x" * size)


def test_a_death_tells_its_signal() -> None:
    with Worker(memory=ROOM, seconds=60, cpu_seconds=30) as worker:
        with pytest.raises(DeathError, match="SIGKILL") as caught:
            worker.call(end_by, signal.SIGKILL)
        assert caught.value.signal == signal.SIGKILL
        assert not worker.started
        with pytest.raises(DeathError, match="exit code 3") as left:
            worker.call(os._exit, 3)
        assert left.value.signal is None


def test_a_process_that_died_between_two_calls_is_nobodys_fault() -> None:
    with Worker(memory=ROOM, seconds=60) as worker:
        os.kill(worker.call(process_id), signal.SIGKILL)
        assert worker._process is not None
        worker._process.wait(60)
        assert worker.call(double, 2) == 4


def test_a_caller_may_watch_the_clock_itself() -> None:
    with Worker(memory=ROOM, seconds=None) as worker:
        worker.interrupt()  # there is nothing to end
        assert worker.call(double, 2) == 4
        timer = threading.Timer(0.3, worker.interrupt)
        timer.start()
        with pytest.raises(LimitError, match="takes longer than it may"):
            worker.call(nap)
        assert worker.call(double, 3) == 6


def test_processor_time_is_limited() -> None:
    with Worker(memory=ROOM, seconds=60, cpu_seconds=0.2) as worker:
        with pytest.raises(LimitError, match=r"longer than the 0.2 s of processor time") as caught:
            worker.call(spin)
        assert not isinstance(caught.value, DeathError)
        assert [worker.call(double, x) for x in range(3)] == [0, 2, 4]


def test_a_start_that_hangs_or_fails_leaves_no_process() -> None:
    with Worker(memory=ROOM, seconds=60, cpu_seconds=1) as worker:
        with pytest.raises(LimitError, match="longer than the 1 s"):
            worker.start(nap, seconds=1)
        assert not worker.started
        with pytest.raises(DeathError):
            worker.start(crash, seconds=60)
        assert not worker.started
        worker.start(process_id, seconds=60)
        assert worker.started


def test_nothing_is_written_to_a_file(tmp_path: Path) -> None:
    with Worker(memory=ROOM, seconds=60) as worker, pytest.raises((OSError, DeathError)):
        worker.call(write, str(tmp_path / "x"))
    assert not (tmp_path / "x").exists() or not (tmp_path / "x").read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a process has")
def test_a_process_that_keeps_what_it_was_given_is_replaced() -> None:
    with Worker(memory=ROOM, seconds=60) as worker:
        first = worker.call(process_id)
        worker.call(keep, 1 << 20)
        assert worker.call(process_id) == first
        worker.call(keep, 64 << 20)
        assert not worker.started
        assert worker.call(process_id) != first


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
