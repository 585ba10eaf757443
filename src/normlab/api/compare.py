"""From arms and seeds to a `Study`: plan, trials, runs, report."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from normlab import recipes
from normlab.api.shown import Shown
from normlab.core.cores import cores
from normlab.core.environment import describe_machine, resolve_threads
from normlab.core.files import locked
from normlab.data import ImageData
from normlab.data import load as load_data
from normlab.data.batches import hold_out, split_images
from normlab.data.loading import PUBLIC, check_size
from normlab.errors import Interrupted, UserError
from normlab.recipes import Recipe
from normlab.recipes.pictures import fitted
from normlab.reports.study_report import write_report
from normlab.runs import Run
from normlab.statistics.verdict import MARGIN
from normlab.study import judged, result
from normlab.study import outcomes as runs
from normlab.study import plan as plans
from normlab.study.arms import Arm, make_arms
from normlab.study.design import Design, check_arm
from normlab.study.engine import STUDIES, claim, do_missing, interrupted
from normlab.study.judged import RUNS
from normlab.study.plan import default_contrasts, enough_pairs
from normlab.study.progress import Lines, Progress
from normlab.study.runner import Pool, Reporter
from normlab.study.training import Job
from normlab.study.tuning import TUNING, choose, parse_tuning, trials
from normlab.training import starting_points
from normlab.training.pretrained import Pretrained

THRESHOLDS = (0.5, 0.6, 0.7, 0.8)
CHECKS = 10
HELD_OUT = 0.2  # of the training images of one's own data: what a study decides by


class Study(Shown, result.Study):
    """A study's folder, opened."""


def open_study(path: str | Path, given_up: dict[str, str] | None = None) -> Study:
    """Read a study's folder.

    Raises:
        UserError: it is none.
        DataError: a file in it is damaged.
    """
    found = judged.open_study(path, given_up)
    return Study(found.path, found.design, found.outcomes, found.given_up)


def compare(
    recipe: str | Recipe | None = None,
    *,
    arms: Sequence[str | Arm] = ("batch", "none"),
    contrasts: Sequence[tuple[str, str]] | None = None,
    seeds: int | None = None,
    first_seed: int = 0,
    data: str | Path | Mapping[str, Any] | ImageData | None = None,
    image_size: int | None = None,
    skip_bad: bool = False,
    group_by: str | None = None,
    out: str | Path | None = None,
    jobs: int | None = None,
    threads: int = 1,
    scheduler: str | None = None,
    tune: str | None = None,
    margin: float = MARGIN,
    outcome: str = "accuracy",
    thresholds: Sequence[float] = THRESHOLDS,
    checks: int = CHECKS,
    progress: Progress | None = None,
    settings: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Study:
    """Train every arm from the same seeds and say which is better, and how sure that is.

        study = normlab.compare("fast79", arms=["batch", "none"], seeds=6)
        print(study.comparisons[0].sentence)

    Called again with the same arguments it goes on where it was stopped; with more seeds it adds
    pairs, which counts as a further look.

    Args:
        recipe: what all arms have in common; None for the default one of these data.
        arms: each a normaliser's name, `NAME: key=value, …`, or an `Arm`. Beside settings of the
            recipe an arm may have an `image_size` and a run that it starts `from`.
        contrasts: (first, other) names to compare; None for the first arm with each other one.
        seeds: pairs; None for what the study was planned with, in a new one for as many as can
            decide: 6 for one contrast, 8 for four.
        first_seed: pair i has the seed first_seed + i.
        data, image_size, skip_bad, group_by: as `normlab.load` takes them.
        out: the study's folder; None for `studies/RECIPE-ARM-ARM…`.
        jobs: runs side by side on this machine; None for cores ÷ threads.
        threads: of each run.
        scheduler: address of a Dask scheduler whose workers do the runs.
        tune: `learning_rate=0.3,1,3`: choose each arm's own value on validation images first.
        margin: what counts as no difference, a fraction of accuracy; of `loss`, in nats.
        outcome: what decides: `accuracy`, `balanced_accuracy`, `macro_f1` or `loss`. On data of
            your own it is that on a fifth of the training images, held out from a fixed seed: your
            test images have no say in what you choose.
        thresholds: validation accuracies whose steps are counted.
        checks: at least so many checks of validation accuracy a run.
        progress: told of each run; None for plain lines.
        settings: of the recipe, to replace for all arms; here None is a value.
        **changes: the same; None leaves a setting as it is.

    Raises:
        UserError: something asked for is not possible, or another plan is in the folder.
        Interrupted: SIGINT or SIGTERM came; finished runs are kept.
    """

    def read(side: int | None) -> ImageData:
        return load_data(data, image_size=side, skip_bad=skip_bad, group_by=group_by)

    images = read(image_size)
    check_size(images.name, images.image_shape, image_size)
    own = images.name not in PUBLIC
    if recipe is None:
        recipe = recipes.DEFAULT_OWN if own else recipes.DEFAULT
    wanted_changes = {k: v for k, v in changes.items() if v is not None} | dict(settings or {})
    if recipe == recipes.DEFAULT_OWN and own:
        side = images.image_shape[0]
        follows = fitted(images.class_names, side, wanted_changes, from_run=False)
        wanted_changes = follows | wanted_changes
    whole = images.sha256
    if own:
        images = hold_out(images, HELD_OUT)
    wanted = _design(
        recipes.get(recipe).with_settings(wanted_changes),
        make_arms(arms),
        _name(data, images),
        images,
        contrasts=contrasts,
        seeds=seeds,
        first_seed=first_seed,
        threads=resolve_threads(threads),
        tune=tune,
        margin=margin,
        thresholds=thresholds,
        checks=checks,
        skip_bad=skip_bad,
        group_by=group_by,
        outcome=outcome,
        held_out=HELD_OUT if own else 0.0,
        resized=read,
        whole=whole,
    )
    if jobs is not None and jobs < 1:
        raise UserError(f"jobs={jobs}: choose 1 or more")
    pool = Pool(jobs=jobs or max(1, cores() // threads), threads=threads, scheduler=scheduler)
    folder = Path(out) if out is not None else default_folder(wanted)
    source = wanted.data if isinstance(data, str | Path | None) else images
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        design = claim(folder, wanted, seeds, (RUNS, TUNING))
        return _work(folder, design, source, pool, progress or Lines())


def _design(
    recipe: Recipe,
    arms: tuple[Arm, ...],
    data: str,
    images: ImageData,
    *,
    contrasts: Sequence[tuple[str, str]] | None,
    seeds: int | None,
    tune: str | None,
    thresholds: Sequence[float],
    resized: Callable[[int], ImageData],
    whole: str,
    **plan: Any,
) -> Design:
    """Make the plan, and refuse here what could not be done later.

    Args:
        whole: the SHA-256 of the data before images were held out.
    """
    size = images.image_shape[0]
    sources = {arm.name: starting_points.open_source(arm.start) for arm in arms}
    for name, source in sources.items():
        if plan["held_out"] and source is not None and trained_on(source, data, whole):
            raise UserError(
                f"arm {name!r} starts from run {source.path}, which learnt from the pictures that "
                "decide here, held out of the training pictures: start from a run on other data"
            )
    arms = tuple(_fitting(arm, sources[arm.name], images.files_train is not None) for arm in arms)
    sizes: dict[str, str] = {}
    for arm in arms:
        check_arm(arm, recipe, images.class_names, arm.image_size or size)
        split_images(images, arm.recipe(recipe).validation)
        if arm.image_size not in (None, size):
            other = resized(arm.image_size)
            check_size(f"arm {arm.name!r}: {images.name}", other.image_shape, arm.image_size)
            other = hold_out(other, plan["held_out"]) if plan["held_out"] else other
            sizes[str(arm.image_size)] = other.sha256
    starts = {
        arm.name: starting_points.plan_start(
            *(sources[arm.name], arm.recipe(recipe), images.class_names),
            freeze=False,
            statistics=None,
        )
        for arm in arms
    }
    named = tuple(contrasts) if contrasts else default_contrasts(arms)
    return Design(
        recipe=recipe,
        arms=arms,
        contrasts=named,
        seeds=enough_pairs(len(named)) if seeds is None else seeds,
        data=data,
        data_sha256=images.sha256,
        data_name=images.name,
        class_names=images.class_names,
        image_size=size,
        train_images=len(images.y_train),
        test_images=len(images.y_test),
        tuning=parse_tuning(tune),
        thresholds=tuple(thresholds),
        environment=describe_machine(plan["threads"], torch.device("cpu")),
        sizes=sizes,
        starts={name: start for name, start in starts.items() if start is not None},
        **plan,
    )


def trained_on(run: Run, data: str, whole: str) -> bool:
    """Whether `run` learnt from `data`, a path or a name, whose SHA-256 is `whole`; at another
    size of the images that is another one.
    """
    there = run.task.data
    named = there not in PUBLIC and Path(there).absolute() == Path(data)
    return whole == run.task.data_sha256 or (named and Path(data).exists())


def _fitting(arm: Arm, source: Run | None, resizable: bool) -> Arm:
    """An arm with the network and the normaliser of the run that it starts from.

    What starts from a network that was pretrained elsewhere is trained by the recipe for those, on
    images of that network's size.
    """
    if source is None:
        return arm
    theirs = source.task.recipe.settings()
    if isinstance(source, Pretrained):
        size = arm.image_size or (source.task.image_size if resizable else None)
        return replace(arm, changes={**theirs, **arm.changes}, image_size=size)
    keys = ("model", "architecture", "norm", "norm_position", "norm_epsilon", "logit_scale")
    same = {key: theirs[key] for key in keys}
    return replace(arm, changes={**same, **arm.changes})


def _name(data: object, images: ImageData) -> str:
    """How a study and its workers name the data."""
    if data is None or data in ("cifar10", "sample"):
        return str(data or "cifar10")
    return str(Path(data).absolute()) if isinstance(data, (str, Path)) else images.name


def default_folder(design: Design) -> Path:
    """Where a study goes that is given no folder: the same command finds it again."""
    return STUDIES / "-".join([design.recipe.name, *design.arm_names])


def _work(
    folder: Path, design: Design, data: str | ImageData, pool: Pool, progress: Progress
) -> Study:
    """Do the trials and the runs that are missing, then write the report."""
    try:
        if design.tuning is not None and not design.tuning.chosen:
            jobs = trials(design, data)
            given_up = _do(folder / TUNING, jobs, pool, progress.trials(jobs))
            if given_up:
                return open_study(folder, given_up)
            found = [runs.load(folder / TUNING, job.task, job.arm, job.seed) for job in jobs]
            design = choose(design, [outcome for outcome in found if outcome is not None])
            plans.save(folder, design)
        reporter = progress.study(open_study(folder))
        given_up = _do(folder / RUNS, _jobs(design, data), pool, reporter)
    except Interrupted as e:
        raise interrupted(folder, e) from None
    study = open_study(folder, given_up)
    if study.complete:
        write_report(study)
    return study


def _do(folder: Path, jobs: list[Job], pool: Pool, reporter: Reporter) -> dict[str, str]:
    """Do those jobs that have no file yet; each outcome becomes one as it comes."""

    def is_done(job: Job) -> bool:
        return runs.load(folder, job.task, job.arm, job.seed) is not None

    def keep(outcome: runs.Outcome) -> runs.Outcome:
        runs.save(folder, outcome)
        return outcome

    return do_missing(jobs, is_done, keep, pool, reporter)


def _jobs(design: Design, data: str | ImageData) -> list[Job]:
    """Every run of the study, pair by pair."""
    return [
        Job(
            arm=arm.name,
            seed=seed,
            task=design.task(arm, seed),
            data=data,
            threads=design.threads,
            thresholds=design.thresholds,
            checks=design.checks,
            test=True,
            held_out=design.held_out,
        )
        for seed in design.pair_seeds
        for arm in design.arms
    ]
