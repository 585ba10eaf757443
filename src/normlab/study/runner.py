"""Runs side by side, each in a process that may die, here or on a cluster.

Runs are independent and each depends on its task alone, so neither their number side by side nor
their order changes a figure. When a worker dies nothing says which of the runs in flight killed it:
all of them are suspects and are repeated one at a time, where blame is certain.
"""

import multiprocessing
import os
import re
import signal
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Protocol, TypeVar

from joblib import Parallel, delayed, effective_n_jobs, parallel_config

from normlab.core.children import safe_children
from normlab.data import ImageData
from normlab.data import load as load_data
from normlab.errors import DataError, Interrupted
from normlab.runs import Task
from normlab.study.cluster import WorkerDied, dask_backend
from normlab.study.outcomes import Outcome, train_one

ATTEMPTS = 3
_T = TypeVar("_T")
_ONE_AT_A_TIME = threading.Lock()  # a Dask worker may have several threads; torch's are global


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run to do: everything a worker has to be told but the data."""

    arm: str
    seed: int
    task: Task
    threads: int
    thresholds: tuple[float, ...]
    checks: int
    test: bool

    @property
    def name(self) -> str:
        return f"{self.arm} seed {self.seed}"


class Reporter(AbstractContextManager[Any], Protocol):
    """What is told of the runs while they go on; entered before the first one."""

    def finished(self, job: Job, outcome: Outcome, in_flight: int) -> None:
        """A run is done and kept."""

    def repeated(self, job: Job, reason: str) -> None:
        """A run's worker died or failed; the run is done again."""

    def given_up(self, job: Job, reason: str) -> None:
        """It failed too often."""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Where runs are done.

    Attributes:
        jobs: how many side by side on this machine.
        threads: of each run.
        scheduler: address of a Dask scheduler, whose workers take the runs instead.
    """

    jobs: int
    threads: int = 1
    scheduler: str | None = None

    @contextmanager
    def parallel(self, alone: bool) -> Iterator[tuple[Parallel, int]]:
        """A joblib pool that hands out its results as they come, and how many runs it does at once.

        With n_jobs=1 joblib would run in this process, which a run could then take with it; so
        there are two workers at least, and `pre_dispatch` decides how many runs are under way.

        Raises:
            UserError: the scheduler cannot be reached, or Dask is not installed.
        """
        how: dict[str, Any] = {"batch_size": 1, "return_as": "generator_unordered"}
        if self.scheduler is not None:
            with dask_backend(self.scheduler) as backend, parallel_config(backend=backend):
                width = 1 if alone else effective_n_jobs(-1)
                yield Parallel(n_jobs=-1, pre_dispatch=width, **how), width
            return
        width = 1 if alone else self.jobs
        with (
            safe_children(PYTHONWARNINGS=_tracker_without_warnings()),
            parallel_config(backend="loky", inner_max_num_threads=self.threads),
        ):
            yield Parallel(n_jobs=max(2, self.jobs), pre_dispatch=width, **how), width


def _tracker_without_warnings() -> str:
    """`PYTHONWARNINGS` for the process that tidies up after dead workers.

    Python starts it once, with the environment of that moment, and it warns on the terminal, after
    everything else was said, of each semaphore that a killed worker left behind and it removed.
    """
    given = os.environ.get("PYTHONWARNINGS")
    return ",".join(filter(None, [given, "ignore:resource_tracker"]))


def run_all(
    jobs: Sequence[Job],
    data: str | ImageData,
    pool: Pool,
    keep: Callable[[Outcome], None],
    reporter: Reporter,
) -> dict[str, str]:
    """Do all jobs; `keep` is given each outcome as it comes.

    Args:
        data: what a worker gives `normlab.data.load`, or the images themselves.

    Returns:
        The reason for each run that was given up, by the job's name.

    Raises:
        Interrupted: SIGINT or SIGTERM came; what was kept stays, the rest was stopped.
    """
    waiting = {job.name: job for job in jobs}
    suspects: list[Job] = []
    failures: Counter[str] = Counter()
    given_up: dict[str, str] = {}
    with _signals(local=pool.scheduler is None) as signals:
        while waiting or suspects:
            signals.check()
            alone = bool(suspects)
            batch = [suspects.pop(0)] if alone else list(waiting.values())
            with closing(_results(batch, data, pool, alone, signals)) as results:
                for job, result, in_flight in results:
                    waiting.pop(job.name, None)
                    if isinstance(result, Outcome):
                        keep(result)
                        reporter.finished(job, result, in_flight)
                        continue
                    signals.check()
                    failures[job.name] += 1
                    if failures[job.name] < ATTEMPTS:
                        suspects.append(job)
                        reporter.repeated(job, result)
                    else:
                        given_up[job.name] = result
                        reporter.given_up(job, result)
    return given_up


def _results(
    batch: list[Job], data: str | ImageData, pool: Pool, alone: bool, signals: "_Signals"
) -> Generator[tuple[Job, Outcome | str, int], None, None]:
    """Each job with its outcome, or why there is none, and how many more are under way.

    When a worker dies the runs under way are reported as failed; those behind them not at all.
    """
    taken: dict[str, Job] = {}  # by joblib, which takes a few more than it has begun
    parent = None if pool.scheduler else os.getpid()

    def calls() -> Iterator[Any]:
        for job in batch:
            taken[job.name] = job
            yield delayed(attempt)(job, data, parent)

    with pool.parallel(alone) as (parallel, width), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="A worker stopped while some jobs")
        try:
            with closing(parallel(calls())) as finished:
                for name, result in signals.waiting_for(finished):
                    job = taken.pop(name)
                    yield job, result, min(width, len(taken))
        except (BrokenExecutor, WorkerDied) as e:
            signals.check()
            codes = re.search(r"\{(.+?)\}", str(e))
            reason = "its worker died" if alone else "a worker died while it was under way"
            for job in list(taken.values())[:width]:
                yield job, reason + (f", {codes[1]}" if codes else ""), 0


def attempt(job: Job, data: str | ImageData, parent: int | None) -> tuple[str, Outcome | str]:
    """Do a job in a worker: its name, and the outcome or why there is none. Raises nothing."""
    if parent is not None:
        _end_with(parent)
    try:
        with _ONE_AT_A_TIME:
            images = data if isinstance(data, ImageData) else _load(data, job.task)
            if images.sha256 != job.task.data_sha256:
                raise DataError(f"data {data!r} are others here than where the study was begun")
            outcome = train_one(
                job.task,
                images,
                arm=job.arm,
                seed=job.seed,
                threads=job.threads,
                thresholds=job.thresholds,
                checks=job.checks,
                test=job.test,
            )
        return job.name, outcome
    except Exception as e:
        return job.name, f"{type(e).__name__}: {e}"


def _load(data: str, task: Task) -> ImageData:
    return _load_once(data, task.image_size, task.skip_bad)


@lru_cache(maxsize=1)
def _load_once(data: str, image_size: int, skip_bad: bool) -> ImageData:
    return load_data(data, image_size=image_size, skip_bad=skip_bad)


@cache
def _end_with(parent: int) -> None:
    """From now on end this worker when its study has died: a resumed one needs the room."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Signals:
    """SIGINT and SIGTERM, the first of which ends all runs; a study is over when they are.

    An exception in the midst of joblib can leave half a worker, and the end of its pool can meet a
    thread of its that hands out the next run; both end in a traceback. So workers here are killed,
    which joblib is made for, and only the wait for those of a cluster is broken off.
    """

    def __init__(self, *, local: bool) -> None:
        self.local = local
        self.first: int | None = None
        self.waiting = False

    def note(self, signum: int, _: object) -> None:
        if self.first is None:
            self.first = signum
            self.end_runs()

    def end_runs(self) -> None:
        if self.local:
            _kill_workers()
        elif self.waiting:
            self.check()

    def check(self) -> None:
        if self.first is not None:
            raise Interrupted(self.first)

    def waiting_for(self, results: Iterator[_T]) -> Iterator[_T]:
        """Hand `results` on. After a signal they end, the last one with an exception."""
        nothing = object()
        while True:
            self.waiting = True
            try:
                if self.first is not None:  # it may have come before the last worker was there
                    self.end_runs()
                result = next(results, nothing)
            finally:
                self.waiting = False
            if result is nothing:
                return
            yield result  # type: ignore[misc]


def _kill_workers() -> None:
    """Kill the workers that joblib started for this process; they are its own to restart."""
    for child in multiprocessing.active_children():
        if type(child).__module__.startswith("joblib.") and child.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(child.pid, getattr(signal, "SIGKILL", signal.SIGTERM))


@contextmanager
def _signals(*, local: bool) -> Iterator[_Signals]:
    signals = _Signals(local=local)
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {s: signal.signal(s, signals.note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
        signals.check()
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
