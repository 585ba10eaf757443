"""What a person sees while a study goes on."""

import time
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from normlab.study.judged import Judged
from normlab.study.plan import enough_pairs
from normlab.study.runner import Job, Reporter
from normlab.text import counted, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress


class Progress(Protocol):
    """Makes a reporter for each part of a study."""

    def trials(self, jobs: Sequence[Job]) -> Reporter:
        """For the trials before the study."""

    def study(self, study: Judged) -> Reporter:
        """For the study, as far as it has come."""


class Lines:
    """One line a finished run, for logs, pipes and terminals; with a console, a bar below them."""

    def __init__(self, console: "Console | None" = None) -> None:
        self.console = console

    def trials(self, jobs: Sequence[Job]) -> Reporter:
        return _Reporter("trial", len(jobs), [], None, self.console)

    def study(self, study: Judged) -> Reporter:
        return _Reporter("run", study.total, list(study.outcomes), study, self.console)


class _Reporter:
    """Counts, guesses the time that remains, and describes the pairs so far."""

    def __init__(
        self,
        noun: str,
        total: int,
        done: list[Any],
        study: Judged | None,
        console: "Console | None",
    ) -> None:
        self.noun, self.total, self.done, self.study = noun, total, done, study
        self.before = len(done)
        self.started = time.perf_counter()
        self.bar = None if console is None else _bar(console)

    def __enter__(self) -> "_Reporter":
        if self.study is not None:
            design = self.study.design
            _say(
                f"{design.title}: {', '.join(design.arm_names)}; "
                f"{counted(design.seeds, 'seed')} from {design.first_seed}, "
                f"{counted(self.total, 'run')}, {self.before} done; into {self.study.path}",
            )
            enough = enough_pairs(len(design.contrasts), design.look)
            if design.seeds < enough:
                _say(
                    f"{counted(design.seeds, 'pair')} cannot decide "
                    f"{counted(len(design.contrasts), 'contrast')} on look {design.look}: "
                    f"{enough} or more can",
                )
        if self.bar is not None:
            self.bar.start()
            self.bar.add_task("", total=self.total, completed=self.before, note="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def finished(self, job: Job, outcome: Any, in_flight: int) -> None:
        self.done.append(outcome)
        note = f"{in_flight} in flight, {self._remaining()}"
        _say(
            f"{len(self.done)}/{self.total} {job.name}: {outcome.told}, "
            f"{outcome.seconds:.0f} s; {note}",
        )
        for line in self._so_far(job):
            _say(line)
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=len(self.done), note=note)

    def repeated(self, job: Job, reason: str) -> None:
        _say(f"{job.name}: {reason}; it is done again")

    def given_up(self, job: Job, reason: str) -> None:
        _say(f"{job.name}: {reason}; given up")

    def _remaining(self) -> str:
        seconds = (time.perf_counter() - self.started) / (len(self.done) - self.before)
        seconds *= self.total - len(self.done)
        if seconds == 0:
            return "none left"
        return (
            f"about {seconds:.0f} s left" if seconds < 90 else f"about {seconds / 60:.0f} min left"
        )

    def _so_far(self, job: Job) -> list[str]:
        """The contrasts that a run adds a pair to, described; that is no look."""
        if self.study is None:
            return []
        study = replace(self.study, outcomes=tuple(self.done))
        lines = []
        for first, other in study.design.contrasts:
            pair_is_done = job.seed in study.arm(first) and job.seed in study.arm(other)
            if job.arm not in (first, other) or not pair_is_done:
                continue
            so_far = study.so_far(first, other)
            if so_far is not None and so_far.t_interval is not None:
                measure = study.design.measure
                low, high = map(measure.difference, so_far.t_interval)
                unit = " points" if measure.fraction else ""
                lines.append(
                    f"  so far {first} - {other}: {measure.difference(so_far.mean)}{unit}, "
                    f"95 % t interval {low} to {high}, {so_far.n} pairs (no look, decides nothing)"
                )
        return lines


def _say(line: str) -> None:
    print(printable(line), flush=True)


def _bar(console: "Console") -> "RichProgress":
    from rich.progress import BarColumn, Progress, TextColumn

    columns: list[Any] = [TextColumn("{task.completed}/{task.total}"), BarColumn(bar_width=None)]
    columns.append(TextColumn("{task.fields[note]}"))
    return Progress(*columns, console=console, transient=True, redirect_stdout=True)
