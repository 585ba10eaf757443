"""Runs side by side, each in a process that may die, here or on a cluster.

Runs are independent and each depends on its job alone, so neither their number side by side nor
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
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    Future,
    ThreadPoolExecutor,
    wait,
)
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, TypeVar

from normlab.core.children import safe_children
from normlab.errors import Interrupted, NormlabError
from normlab.study.cluster import WorkerDied, dask_backend

ATTEMPTS = 3
_T = TypeVar("_T")


class Job(Protocol):
    """One run to do: everything that whoever does it has to be told."""

    @property
    def arm(self) -> str: ...

    @property
    def seed(self) -> int: ...

    @property
    def name(self) -> str: ...

    def run(self) -> Any:
        """Do it; called where it is done, on any machine. Returns the outcome.

        Raises:
            StudyStopped: there is no sense in going on.
        """


class StudyStopped(NormlabError):
    """A run showed that the study, as it was asked for, can have no result."""


class Reporter(AbstractContextManager[Any], Protocol):
    """What is told of the runs while they go on; entered before the first one."""

    def finished(self, job: Any, outcome: Any, in_flight: int) -> None:
        """A run is done and kept."""

    def repeated(self, job: Any, reason: str) -> None:
        """A run's worker died or failed; the run is done again."""

    def given_up(self, job: Any, reason: str) -> None:
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
    def parallel(self, alone: bool) -> Iterator[tuple[Any, int]]:
        """A joblib pool that hands out its results as they come, and how many runs it does at once.

        With n_jobs=1 joblib would run in this process, which a run could then take with it; so
        there are two workers at least, and `pre_dispatch` decides how many runs are under way.

        Raises:
            UserError: the scheduler cannot be reached, or Dask is not installed.
        """
        from joblib import Parallel, effective_n_jobs, parallel_config  # not for commands

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


@dataclass(frozen=True, kw_only=True)
class Threads:
    """Where runs are done that are processes of their own: each has a thread that waits for it.

    Attributes:
        jobs: how many side by side.
        end: ends all runs that are under way; called from a signal's handler, too.
    """

    jobs: int
    end: Callable[[], None]
    scheduler: None = None


def run_all(
    jobs: Sequence[Job],
    pool: Pool | Threads,
    keep: Callable[[Any], Any],
    reporter: Reporter,
) -> dict[str, str]:
    """Do all jobs; `keep` is given what each gives, and returns the outcome that is told.

    Returns:
        The reason for each run that was given up, by the job's name.

    Raises:
        Interrupted: SIGINT or SIGTERM came; what was kept stays, the rest was stopped.
        StudyStopped: a run asked for it; those that were under way were kept.
    """
    waiting = {job.name: job for job in jobs}
    suspects: list[Job] = []
    failures: Counter[str] = Counter()
    given_up: dict[str, str] = {}
    end = pool.end if isinstance(pool, Threads) else _kill_workers
    with _signals(end, local=pool.scheduler is None) as signals:
        while (waiting or suspects) and signals.stopped is None:
            signals.check()
            alone = bool(suspects)
            batch = [suspects.pop(0)] if alone else list(waiting.values())
            with closing(_results(batch, pool, alone, signals)) as results:
                for job, result, in_flight in results:
                    waiting.pop(job.name, None)
                    if isinstance(result, StudyStopped):
                        signals.check()
                        signals.stopped = signals.stopped or result
                        continue
                    if not isinstance(result, str):
                        reporter.finished(job, keep(result), in_flight)
                        continue
                    signals.check()
                    failures[job.name] += 1
                    if failures[job.name] < ATTEMPTS:
                        suspects.append(job)
                        reporter.repeated(job, result)
                    else:
                        given_up[job.name] = result
                        reporter.given_up(job, result)
    if signals.stopped is not None:
        raise signals.stopped
    return given_up


def _results(
    batch: list[Job], pool: Pool | Threads, alone: bool, signals: "_Signals"
) -> Generator[tuple[Job, Any, int], None, None]:
    """Each job with its outcome, or why there is none, and how many more are under way.

    When a worker dies the runs under way are reported as failed; those behind them not at all.
    """
    if isinstance(pool, Threads):
        yield from _in_threads(batch, pool, signals)
        return
    taken: dict[str, Job] = {}  # by joblib, which takes a few more than it has begun
    parent = None if pool.scheduler else os.getpid()

    def calls() -> Iterator[Any]:
        for job in batch:
            if signals.stopped is not None:
                return
            taken[job.name] = job
            yield delayed(attempt)(job, parent)

    from joblib import delayed

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


def _in_threads(
    batch: list[Job], pool: Threads, signals: "_Signals"
) -> Generator[tuple[Job, Any, int], None, None]:
    """The same for runs that are processes of their own. Closed early, it ends them."""
    waiting = list(reversed(batch))
    under_way: dict[Future[tuple[str, Any]], Job] = {}
    with ThreadPoolExecutor(pool.jobs) as executor:
        try:
            while True:
                while waiting and len(under_way) < pool.jobs and not signals.ending:
                    job = waiting.pop()
                    under_way[executor.submit(attempt, job, None)] = job
                if not under_way:
                    return
                done, _ = wait(under_way, return_when=FIRST_COMPLETED)
                for future in done:
                    job = under_way.pop(future)
                    yield job, future.result()[1], len(under_way)
        finally:
            pool.end()


def attempt(job: Job, parent: int | None) -> tuple[str, Any]:
    """Do a job in a worker: its name, and the outcome or why there is none. Raises nothing."""
    if parent is not None:
        _end_with(parent)
    try:
        return job.name, job.run()
    except StudyStopped as e:
        return job.name, e
    except Exception as e:
        return job.name, f"{type(e).__name__}: {e}"


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

    def __init__(self, end: Callable[[], None], *, local: bool) -> None:
        self.end, self.local = end, local
        self.stopped: StudyStopped | None = None
        self.first: int | None = None
        self.waiting = False

    def note(self, signum: int, _: object) -> None:
        if self.first is None:
            self.first = signum
            self.end_runs()

    def end_runs(self) -> None:
        if self.local:
            self.end()
        elif self.waiting:
            self.check()

    @property
    def ending(self) -> bool:
        """Whether no further run is to be begun."""
        return self.first is not None or self.stopped is not None

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
def _signals(end: Callable[[], None], *, local: bool) -> Iterator[_Signals]:
    signals = _Signals(end, local=local)
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
