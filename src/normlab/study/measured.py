"""Studies of what is not ours: each run is a command or a function that gives numbers.

One of the numbers, in its own unit, decides. No deep-learning framework is needed or imported.
"""

import inspect
import math
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np

from normlab.core import minding
from normlab.core.cores import cores
from normlab.core.files import write_atomic, write_json
from normlab.core.machine import describe_host
from normlab.core.places import check_regular
from normlab.core.records import read_json, typed
from normlab.errors import DataError, UserError
from normlab.statistics import Comparison, Measure
from normlab.study.arms import Arm
from normlab.study.commands import (
    Command,
    NoNumber,
    environment_of,
    filled,
    numbers_of,
    pick,
    versions_of,
)
from normlab.study.judged import Judged
from normlab.study.plan import Plan, check, tell_arms
from normlab.study.runner import StudyStopped
from normlab.study.versions import own_versions

LOGS, FILES, REPEAT = "logs", "files", "repeat"
TIMES = re.compile(r"(?i:time(s|r|stamp)?|seconds?)(?![a-z])")  # in a name; not "sentiment"
MOST_KEPT = 1 << 20  # bytes of a log's end that come back from another machine


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run's numbers.

    Attributes:
        settings: what the arm filled in.
        value: the number that decides; None if the run diverged.
        values: all numbers that it gave, by name.
        diverged: why the run has no value, or None: it failed, took too long, or gave NaN.
        seconds, processor_seconds: of the run; the latter of a command only.
    """

    arm: str
    seed: int
    settings: dict[str, Any]
    value: float | None
    values: dict[str, float]
    diverged: str | None
    seconds: float
    processor_seconds: float | None
    environment: dict[str, Any]

    @property
    def told(self) -> str:
        """What the progress says of it."""
        return f"failed ({self.diverged})" if self.diverged else f"{self.value:.6g}"

    @property
    def gave(self) -> dict[str, float]:
        """All that the run gave, but for times, which never repeat."""
        return {k: v for k, v in self.values.items() if not TIMES.search(k)}


@dataclass(frozen=True, kw_only=True)
class Measured(Plan):
    """The plan of a study of commands or of a function.

    Attributes:
        command: what each run does; None for a function.
        function: its name; None for a command.
        source_sha256: of the function's text; empty where there is none to read.
        metric: the number that decides; None if a run gives one only.
        diverged: what a run counts as that fails, takes too long or gives NaN; None if the study
            stops there.
        check_repeat: whether the first run is made twice, to see whether a seed holds.
        jobs: runs side by side when the study began.
    """

    kind: ClassVar[str] = "measured"
    command: Command | None = None
    function: str | None = None
    source_sha256: str = ""
    metric: str | None = None
    lower_is_better: bool = False
    diverged: float | None = None
    check_repeat: bool = False
    jobs: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            (
                self.margin is None or 0 < self.margin < math.inf,
                f"margin={self.margin}: choose a number above 0, in the metric's own unit",
            ),
            (
                self.diverged is None or math.isfinite(self.diverged),
                f"diverged={self.diverged}: choose a finite number",
            ),
        )
        if self.command is not None:
            self.command.check_arms({arm.name: arm.changes for arm in self.arms})

    @property
    def title(self) -> str:
        return self.function or "command"

    @property
    def measure(self) -> Measure:
        return Measure(
            self.metric or "result",
            lower_is_better=self.lower_is_better,
            diverged_as=f"as {self.diverged:g}" if self.diverged is not None else "",
            scope="this command and its data" if self.command else "this function and its data",
        )

    def value(self, outcome: Outcome) -> float:
        value = self.diverged if outcome.diverged else outcome.value
        if value is None:
            raise DataError(f"{outcome.arm} seed {outcome.seed} has no value: repeat the run")
        return value

    def load_outcome(self, folder: Path, arm: Arm, seed: int) -> Outcome | None:
        path = path_of(folder, arm.name, seed)
        if not path.exists():
            return None
        try:
            outcome = typed(read_json(path), Outcome, "it")
            numbers = [*outcome.values.values(), outcome.value or 0.0]
            if not all(map(math.isfinite, numbers)) or (outcome.value is None) != bool(
                outcome.diverged
            ):
                raise DataError("its value is no number")
        except UserError as e:
            raise DataError(f"{path} is not a run's file ({e}): remove it to repeat it") from None
        if (outcome.arm, outcome.seed, outcome.settings) != (arm.name, seed, arm.changes):
            raise DataError(f"{path} is of another arm or seed: remove it to repeat the run")
        return outcome

    def differences(self, asked: "Measured") -> list[str]:
        found = []
        was, now = self.as_dict(), asked.as_dict()
        if self.command and asked.command:
            was, now = ({**p, **p["command"]} for p in (was, now))
        for key in was:
            if key in ("seeds", "looks", "environment", "jobs", "command") or was[key] == now[key]:
                continue
            if key == "arms":
                found.append(f"arms ({tell_arms(self.arms)} then, {tell_arms(asked.arms)} now)")
            elif key == "files":
                changed = [n for n in was[key] or {} if (now[key] or {}).get(n) != was[key][n]]
                found.append(f"content of {', '.join(changed) or 'files'}, which changed since")
            elif key == "source_sha256":
                found.append(f"text of the function {self.function}, which changed since")
            else:
                found.append(f"{key} ({was[key]} then, {now[key]} now)")
        return found

    def as_dict(self) -> dict[str, Any]:
        return {
            **super().as_dict(),
            "command": None if self.command is None else asdict(self.command),
            "outcome": f"{self.measure.name}; it alone decides",
        }


def read_plan(values: dict[str, Any]) -> Measured:
    """The plan that a study's file holds.

    Raises:
        UserError: it is none, or one that no study can have.
    """
    return typed(values, Measured, "it")


@dataclass(frozen=True)
class Study(Judged):
    """A study of commands or a function, its folder opened.

    Attributes:
        repeated: the first run's second outcome, if it was asked for.
    """

    design: Measured
    outcomes: tuple[Outcome, ...]
    repeated: Outcome | None = field(default=None)

    @cached_property
    def comparisons(self) -> tuple[Comparison, ...]:
        """The verdicts, one a contrast.

        Raises:
            UserError: runs are missing, or the seed changes nothing, so that there is one pair.
        """
        if self.complete and (problem := self.one_pair):
            raise UserError(f"no verdict: {problem}")
        return super().comparisons

    @property
    def one_pair(self) -> str | None:
        """What is wrong if every arm gave the same numbers from each of several seeds."""
        constant = [self._constant(arm.name) for arm in self.design.arms]
        if not constant or None in constant:
            return None
        first = next(iter(self.arm(self.design.arms[0].name).values()))
        return (
            f"the seed changes nothing: each arm gave the same from {min(map(len, constant))} "  # type: ignore[arg-type]
            f"seeds, to the last digit ({self.design.arms[0].name}: {_told(first)}), so these are "
            "not pairs but one pair seen again; let the script use its seed (order of the data, "
            "first weights), or print more digits or a second number if they are alike by chance"
        )

    @property
    def findings(self) -> tuple[str, ...]:
        """Mistakes that the outcomes show, each with its remedy."""
        found = [] if self.one_pair is None else [self.one_pair]
        if self.one_pair is None:
            for arm in self.design.arm_names:
                same = self._constant(arm)
                if same:
                    found.append(
                        f"{arm} gave the same from {len(same)} seeds, to the last digit "
                        f"({_told(next(iter(same.values())))}): does it use the seed?"
                    )
        names = self.design.arm_names
        for i, first in enumerate(names):
            for other in names[i + 1 :]:
                pairs = self.pairs(first, other)
                whole = [(a, b) for a, b in pairs if not (a.diverged or b.diverged)]
                if len(whole) > 1 and all(_alike(a, b) for a, b in whole):
                    found.append(
                        f"{first} and {other} gave the same in {len(whole)} pairs, to the last "
                        "digit: does what the arms change reach the run?"
                    )
        if self.repeated is not None:
            once = self.arm(self.repeated.arm).get(self.repeated.seed)
            if once is not None and once.gave != self.repeated.gave:
                found.append(
                    f"the seed does not hold: {once.arm} seed {once.seed} gave {_told(once)}, "
                    f"and {_told(self.repeated)} when it was repeated; so arms of a pair share "
                    "little, and more pairs are needed to see the same difference: seed every "
                    "generator, and ask the framework for deterministic kernels"
                )
        for arm in self.design.arm_names:
            runs = self.arm(arm).values()
            if len(runs) > 1 and all(o.diverged for o in runs):
                found.append(f"every run of {arm} failed ({next(iter(runs)).diverged})")
        return tuple(found)

    @cached_property
    def summaries(self) -> tuple[dict[str, Any], ...]:
        """Each arm's outcomes over its runs."""
        return tuple(self._summary(arm) for arm in self.design.arms)

    def _summary(self, arm: Arm) -> dict[str, Any]:
        found = list(self.arm(arm.name).values())
        values = [self.design.value(o) for o in found]
        names = dict.fromkeys(name for o in found for name in o.values)
        return {
            "name": arm.name,
            "n": len(found),
            "value": float(np.mean(values)) if values else None,
            "value_sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
            "diverged": sum(o.diverged is not None for o in found),
            "seconds": float(np.median([o.seconds for o in found])) if found else None,
            "others": {
                name: float(np.mean([o.values[name] for o in found if name in o.values]))
                for name in names
                if name != self.design.measure.name
            },
        }

    @property
    def decided(self) -> bool:
        """Whether there are verdicts: all runs are there, and the pairs are more than one."""
        return self.complete and self.one_pair is None

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON, in the metric's own unit."""
        return {
            **super().as_dict(),
            "metric": self.design.measure.name,
            "findings": list(self.findings),
            "arms": list(self.summaries),
            "given_up": self.given_up,
        }

    def _constant(self, arm: str) -> dict[int, Outcome] | None:
        """The runs of an arm that have values, if there are two or more and all gave the same."""
        runs = {seed: o for seed, o in self.arm(arm).items() if not o.diverged}
        first = next(iter(runs.values()), None)
        if len(runs) < 2 or first is None or not all(_alike(o, first) for o in runs.values()):
            return None
        return runs


def _alike(a: Outcome, b: Outcome) -> bool:
    """Whether both gave the same; the number that decides counts, be it a time."""
    return a.value == b.value and a.gave == b.gave


def open_repeat(path: Path, design: Measured) -> Outcome | None:
    """The first run's second outcome, if it was made."""
    if not design.check_repeat:
        return None
    return design.load_outcome(path / REPEAT, design.arms[0], design.first_seed)


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A run's outcome, and its logs if they were written on another machine."""

    outcome: Outcome
    logs: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A run of a measured study.

    Attributes:
        place: the study's folder; None where that may be on another machine.
        folder: where the run's relative paths begin.
        repeat: whether this is the first run's repetition.
    """

    design: Measured
    arm: str
    seed: int
    place: Path | None
    folder: Path
    repeat: bool = False

    @property
    def name(self) -> str:
        return f"{self.arm} seed {self.seed}{' again' if self.repeat else ''}"

    @property
    def settings(self) -> dict[str, Any]:
        return next(a for a in self.design.arms if a.name == self.arm).changes

    @property
    def actual_seed(self) -> int:
        return self.seed + next(a for a in self.design.arms if a.name == self.arm).seed_offset

    def finish(
        self, found: Any, failure: str | None, where: str, logs: dict[str, bytes], **more: Any
    ) -> Finished:
        """The outcome of what the run gave, or of its failure.

        Raises:
            StudyStopped: a failure for which nothing was declared, or no number where one was said
                to be.
        """
        value: float | None = None
        values: dict[str, float] = {}
        if failure is None:
            try:
                value, values = pick(found, self.design.metric)
            except NoNumber as e:
                raise StudyStopped(f"{self.name}: {e}{where}") from None
            if not math.isfinite(value):
                failure = f"its {self.design.measure.name} is {value}"
        if failure is not None:
            if self.design.diverged is None:
                raise StudyStopped(
                    f"{self.name}: {failure}{where}; the study stops, since nothing says what such "
                    "a run counts as: mend it and go on with the same command (another --out if a "
                    "file that the command names has changed since a run was kept), or begin a "
                    "study with --diverged VALUE"
                )
            value = None
        outcome = Outcome(
            arm=self.arm,
            seed=self.seed,
            settings=self.settings,
            value=value,
            values={name: x for name, x in values.items() if math.isfinite(x)},
            diverged=failure,
            **more,
        )
        return Finished(outcome=outcome, logs=logs)


@dataclass(frozen=True, kw_only=True)
class CommandJob(_Job):
    """A command as a run: a process group with a time limit, its output in two files.

    Attributes:
        threads: of it, which it is told through variables; 0 for as many as it likes.
    """

    command: Command
    threads: int

    def run(self) -> Finished:
        """Do it.

        Raises:
            StudyStopped: see `finish`; or there is no such program.
            NormlabError: it was broken off.
        """
        if self.place is not None:
            return self._run(self.place)
        with TemporaryDirectory(prefix="normlab-") as place:
            for name in (LOGS, FILES):
                (Path(place) / name).mkdir()
            return self._run(Path(place))

    def _run(self, place: Path) -> Finished:
        command = self.command
        name = f"{self.arm}-seed-{self.seed}{'-again' if self.repeat else ''}"
        values = {
            **self.settings,
            "seed": str(self.actual_seed),
            "arm": self.arm,
            "threads": str(self.threads or cores()),
            "out": str((place / FILES / name).absolute()),
        }
        if "{out}" in command.text:
            (place / FILES / name).mkdir(exist_ok=True)
        logs = [place / LOGS / f"{name}.{kind}" for kind in ("out", "err")]
        words = command.words(values)
        result = None
        if command.result is not None:
            result = self.folder / filled(command.result.rpartition(":")[0], values)
            result.unlink(missing_ok=True)  # an earlier run's would be taken for this one's
        try:
            ended = minding.run(
                words,
                folder=self.folder,
                environment=environment_of(self.threads),
                stdout=logs[0],
                stderr=logs[1],
                limit=command.time_limit,
            )
        except UserError as e:
            raise StudyStopped(f"{self.name}: {e}: name a program that is there") from None
        failure, found = None, None
        where = f" (see {logs[0]})" if self.place is not None else f" ({_last_line(logs)})"
        if ended.timed_out:
            failure = f"it took more than {command.time_limit:g} s"
        elif ended.code:
            how = f"exit code {ended.code}" if ended.code > 0 else f"signal {-ended.code}"
            failure = f"it ended with {how}: {_last_line(logs)}"
            where = f" (see {logs[1]})" if self.place is not None else ""
        else:
            try:
                found = numbers_of(command, result, *logs)
            except NoNumber as e:
                raise StudyStopped(f"{self.name}: {e}{where}") from None
        return self.finish(
            found,
            failure,
            where,
            {} if self.place is not None else {path.name: _tail(path) for path in logs},
            seconds=ended.seconds,
            processor_seconds=ended.processor_seconds,
            environment={
                **describe_host(),
                "threads": self.threads,
                "versions": {} if command.shell else versions_of(words[0]),
            },
        )


@dataclass(frozen=True, kw_only=True)
class FunctionJob(_Job):
    """A call of a function as a run, in a worker process."""

    function: Callable[..., Any]

    def run(self) -> Finished:
        """Do it.

        Raises:
            StudyStopped: see `finish`.
        """
        began, failure, found = time.monotonic(), None, None
        try:
            found = self.function(self.actual_seed, **self.settings)
            found = _plain(found)
        except (Exception, SystemExit) as e:  # sys.exit in a script ends the run, not the study
            failure = f"{type(e).__name__}: {e}"
        return self.finish(
            found,
            failure,
            "",
            {},
            seconds=time.monotonic() - began,
            processor_seconds=None,
            environment={
                **describe_host(),
                "threads": self.design.threads,
                "versions": own_versions(),
            },
        )


def source_of(function: Callable[..., Any]) -> str:
    """SHA-256 of a function's text; empty where there is none to read."""
    try:
        return sha256(inspect.getsource(function).encode()).hexdigest()
    except (OSError, TypeError):
        return ""


def path_of(folder: Path, arm: str, seed: int) -> Path:
    return folder / f"{arm}-seed-{seed}.json"


def save(place: Path, folder: str, finished: Finished) -> Outcome:
    """Keep a finished run in a folder of the study at `place`, its logs first."""
    for name, content in finished.logs.items():
        write_atomic(place / LOGS / name, content)
    outcome = finished.outcome
    write_json(path_of(place / folder, outcome.arm, outcome.seed), vars(outcome))
    return outcome


def _plain(found: Any) -> Any:
    """NumPy's and PyTorch's single numbers as Python's, in dictionaries, too."""
    if isinstance(found, dict):
        return {str(name): _plain(value) for name, value in found.items()}
    if not isinstance(found, int | float | str) and hasattr(found, "item"):
        return found.item()
    return found


def _told(outcome: Outcome) -> str:
    return ", ".join(f"{name} {value!r}" for name, value in list(outcome.values.items())[:3])


def _last_line(logs: list[Path]) -> str:
    """The last thing that the run said, errors before all else."""
    for path in reversed(logs):
        lines = _tail(path).decode("utf-8", "replace").strip().splitlines()
        if lines:
            return lines[-1][-200:]
    return "it said nothing"


def _tail(path: Path) -> bytes:
    try:
        check_regular(path)
        with open(path, "rb") as f:
            f.seek(max(0, f.seek(0, 2) - MOST_KEPT))
            return f.read()
    except OSError:
        return b""
