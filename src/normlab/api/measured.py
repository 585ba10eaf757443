"""From any command, or any function, to a `Study` of it; nothing here needs PyTorch."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from normlab.api.shown import Shown
from normlab.core import minding
from normlab.core.cores import cores
from normlab.core.files import locked
from normlab.core.machine import describe_host
from normlab.errors import Interrupted, UserError
from normlab.study import measured
from normlab.study.arms import SEED_OFFSET, Arm, make_arms
from normlab.study.commands import Command, files_of, parse_arm
from normlab.study.engine import STUDIES, claim, do_missing, interrupted
from normlab.study.judged import RUNS
from normlab.study.judged import open_study as open_any
from normlab.study.measured import (
    FILES,
    LOGS,
    REPEAT,
    CommandJob,
    FunctionJob,
    Measured,
    open_repeat,
)
from normlab.study.plan import default_contrasts, enough_pairs
from normlab.study.progress import Lines, Progress
from normlab.study.runner import Pool, StudyStopped, Threads


class Study(Shown, measured.Study):
    """A study of commands or a function, opened."""


def open_study(path: str | Path, given_up: dict[str, str] | None = None) -> Study:
    """Read the folder of a study of commands or of a function.

    Raises:
        UserError: it is none.
        DataError: a file in it is damaged.
    """
    found = open_any(path, given_up)
    repeated = open_repeat(found.path, found.design)
    return Study(found.path, found.design, found.outcomes, found.given_up, repeated)


def compare_command(
    command: str,
    *,
    arms: Sequence[str | Arm],
    shell: bool = False,
    result: str | None = None,
    pattern: str | None = None,
    time_limit: float | None = None,
    metric: str | None = None,
    jobs: int | None = None,
    threads: int | None = None,
    scheduler: str | None = None,
    out: str | Path | None = None,
    **plan: Any,
) -> Study:
    """Run a command for every arm and seed, and judge one number that it gives.

    Args:
        command: with placeholders; see `normlab.study.commands`.
        arms: each `NAME: key=value, …`, or an `Arm` whose changes are texts.
        shell, result, pattern, time_limit: see `Command`.
        metric: which number decides; None if a run gives one only.
        jobs: runs side by side; None for one.
        threads: of each run, told through the usual variables; None leaves one run alone as it is,
            and gives cores ÷ jobs to several.
        scheduler: address of a Dask scheduler whose workers do the runs.
        out: the study's folder; None for `studies/SCRIPT-ARM-ARM…`.
        **plan: as `compare_function` takes it.

    Raises:
        UserError: something asked for is not possible, or another plan is in the folder.
        StudyStopped: a run failed and nothing says what it counts as, or the study can have no
            result.
        Interrupted: SIGINT or SIGTERM came; finished runs are kept.
    """
    if result is not None:
        name = result.rpartition(":")[2]
        if metric not in (None, name):
            raise UserError(f"--metric {metric!r} and --result …:{name} differ: give one of them")
        metric = name
    runs = Command(text=command, shell=shell, result=result, pattern=pattern, time_limit=time_limit)
    here = Path.cwd()
    runs = Command(**{**vars(runs), "files": files_of(runs, here)})
    side_by_side = _checked_jobs(jobs, 1)
    wanted = _plan(
        _arms(arms), command=runs, metric=metric, threads=threads or 0, jobs=side_by_side, **plan
    )
    folder = Path(out) if out is not None else STUDIES / "-".join([_name(runs), *wanted.arm_names])
    far = scheduler is not None
    place = None if far else folder.absolute()
    pool = (
        Pool(jobs=1, scheduler=scheduler)
        if far
        else Threads(jobs=side_by_side, end=minding.end_all)
    )
    share = 0 if side_by_side == 1 else max(1, cores() // side_by_side)
    job = partial(
        CommandJob, place=place, folder=here, command=runs, threads=wanted.threads or share
    )
    return _conduct(wanted, folder, pool, job, plan.get("seeds"), plan.get("progress"))


def compare_function(
    function: Callable[..., Any],
    *,
    arms: Mapping[str, Mapping[str, Any]],
    contrasts: Sequence[tuple[str, str]] | None = None,
    seeds: int | None = None,
    first_seed: int = 0,
    metric: str | None = None,
    lower_is_better: bool = False,
    margin: float | None = None,
    diverged: float | None = None,
    check_repeat: bool = False,
    jobs: int | None = None,
    threads: int = 1,
    scheduler: str | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Study:
    """Call a function for every arm and seed, in processes, and judge a number that it returns.

        def train(seed, norm):
            ...
            return {"accuracy": accuracy, "loss": loss}

        study = normlab.compare(train, arms={"batch": {"norm": "batch"}, "none": {"norm": None}},
                                metric="accuracy", seeds=6)

    Args:
        function: called as function(seed, **settings); returns a number, or numbers by name.
        arms: by name, what an arm is called with beside the seed; JSON must be able to hold it.
        contrasts: (first, other) names to compare; None for the first arm with each other one.
        seeds: pairs; None for what the study was planned with, in a new one for as many as can
            decide.
        first_seed: pair i has the seed first_seed + i.
        metric: which number decides; None if the function gives one only.
        lower_is_better: as of a loss.
        margin: what counts as no difference, in the metric's unit; None if nothing does.
        diverged: what a run counts as that raises or returns NaN; None if the study stops there.
        check_repeat: call the first run twice, to see whether its seed holds.
        jobs: processes side by side; None for cores ÷ threads.
        threads: of each, for the libraries that heed the usual variables.
        scheduler: address of a Dask scheduler whose workers do the runs.
        out: the study's folder; None for `studies/FUNCTION-ARM-ARM…`.
        progress: told of each run; None for plain lines.

    Raises:
        UserError, StudyStopped, Interrupted: as `compare_command`.
    """
    name = getattr(function, "__name__", type(function).__name__)
    wanted = _plan(
        make_arms([Arm(arm, dict(settings)) for arm, settings in arms.items()]),
        contrasts=contrasts,
        seeds=seeds,
        first_seed=first_seed,
        function=name,
        source_sha256=measured.source_of(function),
        metric=metric,
        lower_is_better=lower_is_better,
        margin=margin,
        diverged=diverged,
        check_repeat=check_repeat,
        threads=threads,
        jobs=_checked_jobs(jobs, max(1, cores() // threads)),
    )
    folder = Path(out) if out is not None else STUDIES / "-".join([name, *wanted.arm_names])
    pool = Pool(jobs=wanted.jobs, threads=threads, scheduler=scheduler)
    job = partial(FunctionJob, place=None, folder=Path.cwd(), function=function)
    return _conduct(wanted, folder, pool, job, seeds, progress)


def _plan(
    arms: tuple[Arm, ...],
    *,
    contrasts: Sequence[tuple[str, str]] | None = None,
    seeds: int | None = None,
    first_seed: int = 0,
    progress: object = None,
    **plan: Any,
) -> Measured:
    named = tuple(contrasts) if contrasts else default_contrasts(arms)
    return Measured(
        arms=arms,
        contrasts=named,
        seeds=enough_pairs(len(named)) if seeds is None else seeds,
        first_seed=first_seed,
        environment=describe_host(),
        **{"margin": None, **plan},
    )


def _arms(arms: Sequence[str | Arm]) -> tuple[Arm, ...]:
    made = []
    for arm in arms:
        if isinstance(arm, Arm):
            made.append(arm)
            continue
        name, values = parse_arm(arm)
        offset = values.pop(SEED_OFFSET, "0")
        if not offset.isdecimal():
            raise UserError(f"arm {name!r}: {SEED_OFFSET}={offset}: give a whole number")
        made.append(Arm(name, dict(values), int(offset)))
    return make_arms(made)


def _name(command: Command) -> str:
    """What a command's study is called: by its script, or its program."""
    script = next(iter(command.files or {}), command.text.split()[0])
    stem = "".join(c for c in Path(script).stem if c.isalnum() or c in "._-")
    return stem.strip(".") or "command"


def _checked_jobs(jobs: int | None, usual: int) -> int:
    if jobs is not None and jobs < 1:
        raise UserError(f"jobs={jobs}: choose 1 or more")
    return usual if jobs is None else jobs


def _conduct(
    wanted: Measured,
    folder: Path,
    pool: Pool | Threads,
    make_job: Callable[..., Any],
    seeds: int | None,
    progress: Progress | None,
) -> Study:
    """Claim the folder, do the runs that are missing, judge, and write the report."""
    progress = progress or Lines()
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        parts = [RUNS, *([REPEAT] if wanted.check_repeat else [])]
        if wanted.command:
            parts += [LOGS, *([FILES] if "{out}" in wanted.command.text else [])]
        design: Measured = claim(folder, wanted, seeds, parts)
        jobs = [
            make_job(design=design, arm=arm.name, seed=seed)
            for seed in design.pair_seeds
            for arm in design.arms
        ]
        arms = {arm.name: arm for arm in design.arms}

        def is_done(part: str, job: Any) -> bool:
            return design.load_outcome(folder / part, arms[job.arm], job.seed) is not None

        known = list(open_study(folder).outcomes)

        def keep(finished: Any) -> Any:
            outcome = measured.save(folder, RUNS, finished)
            known.append(outcome)
            _stop_if_one_pair(folder, design, known)
            return outcome

        _stop_if_one_pair(folder, design, known)
        try:
            if design.check_repeat:
                again = [make_job(design=design, arm=jobs[0].arm, seed=jobs[0].seed, repeat=True)]
                do_missing(
                    again,
                    partial(is_done, REPEAT),
                    partial(measured.save, folder, REPEAT),
                    pool,
                    progress.trials(again),
                )
            given_up = do_missing(
                jobs, partial(is_done, RUNS), keep, pool, progress.study(open_study(folder))
            )
        except Interrupted as e:
            raise interrupted(folder, e) from None
        study = open_study(folder, given_up)
        if study.decided:
            from normlab.reports.measured_report import write_report

            write_report(study)
        return study


def _stop_if_one_pair(folder: Path, design: Measured, outcomes: Sequence[measured.Outcome]) -> None:
    problem = measured.Study(folder, design, tuple(outcomes)).one_pair
    if problem is not None:
        raise StudyStopped(f"the study stops: {problem}")
