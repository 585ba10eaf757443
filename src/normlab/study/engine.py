"""A study's folder from its plan to its last run, whatever its runs are."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from normlab.core.files import LOCK, sweep
from normlab.core.places import make_folder
from normlab.errors import Interrupted, UserError
from normlab.study import plan as plans
from normlab.study.judged import open_study
from normlab.study.plan import Plan
from normlab.study.runner import Job, Pool, Reporter, Threads, run_all

STUDIES = Path("studies")


def claim(folder: Path, wanted: Plan, seeds: int | None, parts: Sequence[str]) -> Any:
    """Write the plan into a new folder, or go on with the one in it, with more seeds if asked.

    Args:
        seeds: as they were asked for; None for as many as there are.
        parts: folders to make in it.

    Returns:
        The plan to follow, of the kind of `wanted`.

    Raises:
        UserError: the folder holds another plan, or something else.
    """
    sweep(folder, plans.FILE)
    there: Plan | None = plans.load(folder)
    begun = there
    if there is None:
        if any(p.name != LOCK for p in folder.iterdir()):
            raise UserError(f"folder {str(folder)!r} holds no study: choose a new one for --out")
        design = wanted
    else:
        if there.kind != wanted.kind:
            raise UserError(
                f"study {str(folder)!r} is of another kind of runs: choose another --out"
            )
        differing = there.differences(wanted)
        if differing and there.kind == "measured" and not open_study(folder).outcomes:
            there, differing = wanted, []  # nothing was seen yet: what was mended may be begun
            for name in parts:  # but a repeated run's number is of what it was before
                for outcome in (folder / name).glob("*.json"):
                    outcome.unlink()
        if differing:
            raise UserError(
                f"study {str(folder)!r} was begun with other {'; '.join(differing)}: "
                "choose another --out"
            )
        design = there
        if seeds is not None and seeds != there.seeds:
            design = there.extended(seeds, open_study(folder).pairs_seen)
    if design is not begun:
        _refuse_shared_seeds(design)
    sweep(folder)
    plans.save(folder, design)  # before all else: a folder without it is taken for somebody's own
    for name in parts:
        make_folder(folder / name)
        sweep(folder / name)
    return design


def _refuse_shared_seeds(design: Plan) -> None:
    """Pairs are independent only if no run's seed is that of another pair, too."""
    offsets = {arm.name: arm.seed_offset for arm in design.arms}
    for first, other in design.contrasts:
        if 0 < abs(offsets[first] - offsets[other]) < design.seeds:
            raise UserError(
                f"{first} and {other}: pairs would share seeds, since each has {design.seeds} of "
                f"them: let their seed_offset differ by {design.seeds} or more, in a new --out"
            )


def do_missing(
    jobs: Sequence[Job],
    is_done: Callable[[Any], bool],
    keep: Callable[[Any], Any],
    pool: Pool | Threads,
    reporter: Reporter,
) -> dict[str, str]:
    """Do those jobs that are not done yet; `keep` is as `run_all` takes it.

    Returns, raises: as `run_all`.
    """
    missing = [job for job in jobs if not is_done(job)]
    if not missing:
        return {}
    with reporter:
        return run_all(missing, pool, keep, reporter)


def interrupted(folder: Path, error: Interrupted) -> Interrupted:
    """The same interruption, saying what is kept."""
    study = open_study(folder)
    return Interrupted(
        error.signum,
        f": {len(study.outcomes)} of {study.total} runs are kept in {str(folder)!r}; "
        "the same command goes on from there",
    )
