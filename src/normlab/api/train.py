"""Train a recipe: data in, a run's folder with an honest score out."""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from normlab import runs
from normlab.api.run import Evaluation, Run, open_run
from normlab.core.environment import (
    describe_machine,
    resolve_device,
    resolve_threads,
)
from normlab.core.environment import settings as machine_settings
from normlab.core.files import locked, write_json
from normlab.core.ranks import WAIT, Ranks, joined
from normlab.core.tensors import digest, is_finite, write_tensors
from normlab.curation.first_look import first_look
from normlab.data import ImageData, load
from normlab.data.batches import split_images
from normlab.data.changes import read_changes
from normlab.data.loading import PUBLIC, check_size
from normlab.data.pictures.sizes import SIZES
from normlab.errors import Interrupted, NonFiniteError, UserError
from normlab.evaluation import held_out
from normlab.evaluation.baselines import score_baselines
from normlab.evaluation.recalibration import Repair, renew_stale
from normlab.evaluation.scores import clearly_better, score
from normlab.inspection.activations import observed
from normlab.inspection.recording import RECORDING, Recorder
from normlab.recipes import DEFAULT_OWN, Recipe
from normlab.recipes.pictures import fitted
from normlab.runs import Task, create_folder
from normlab.text import duration, printable, shell
from normlab.training import checkpoint, starting_points
from normlab.training.hooks import ThreeWayScores, make_hooks
from normlab.training.loop import fit
from normlab.training.pace import largest_in, measure, steps_in
from normlab.training.preparation import make_plan, new_state, refuse_impossible
from normlab.training.state import Hook, Observer, Plan, State


def train(
    recipe: str | Recipe | None = None,
    *,
    data: str | Path | Mapping[str, Any] | ImageData | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    threads: int | None = None,
    device: str = "auto",
    image_size: int | None = None,
    skip_bad: bool = False,
    group_by: str | None = None,
    exclude: str | Path | None = None,
    relabel: str | Path | None = None,
    start: str | Path | Run | None = None,
    freeze: bool = False,
    statistics: str | None = None,
    record: bool | Sequence[str] = False,
    three_way: bool = False,
    minutes: float | None = None,
    observers: tuple[Observer, ...] = (),
    wait: float = WAIT,
    settings: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Run:
    """Train `recipe` from `seed`, score it once on the test images, and keep it as a run.

        run = normlab.train("notebook", epochs=1, data="sample")
        run.result["test_accuracy"]

    In processes that torchrun started, all train this one run together (`docs/scale.md`): each has
    a part of every batch, and rank 0 scores the end and writes the folder.

    Args:
        recipe: a name that `normlab recipes` lists, or a `Recipe`; None for `fast79`, or with
            `start` for its recipe; on data of your own for `pictures`, unless that is for another
            network than that of `start`.
        data: as `normlab.data.load` takes it; None for CIFAR-10.
        out: the run's folder, new or empty; None for the next number in `runs/`.
        seed: the seed of every random draw (initial weights, order of images, augmentation,
            dropout).
        threads: CPU threads; None for all cores.
        device: `auto`, `cpu` or `cuda`.
        image_size, skip_bad, group_by: for pictures in a folder or parquet; see
            `normlab.data.load`.
        exclude, relabel: CSV files of decisions about pictures, as `normlab data check` makes them;
            see `normlab.data.changes`.
        start: what to start from: a finished run; `builtin`, one on CIFAR-10 that comes with this
            package; or a network of timm that was pretrained on ImageNet, by its name there, its
            weights from the hub or from a file (`FILE` or `NAME=FILE`). All but the output layer
            is taken over, and the recipe says how to go on. The output layer is taken over, too,
            if the classes are the same by name and the recipe fits none.
        freeze: with `start`: only the output layer learns.
        statistics: with `start`: of its batch normalisations, `keep`, `adapt` or `recalibrate`; see
            `normlab.training.starting_points`. None for `keep` when frozen, else `adapt`.
        record: keep what each layer sees, or those of these names, for `normlab inspect`.
        three_way: score the validation images of each epoch with three kinds of statistics.
        minutes: what all of it may take, data and scores included. A few steps are measured, then
            the size of pictures, the network and the number of steps are planned to fill the time;
            so it goes with neither `epochs` nor `least_steps`.
        observers: told after each step, in rank 0.
        wait: seconds that one process waits for another.
        settings: of the recipe, to replace; here None is a value.
        **changes: settings of the recipe to replace: `epochs`, `batch_size`, `norm`, …; None
            leaves one as it is.

    Raises:
        UserError: something asked for is not possible; raised before any work is done.
        NonFiniteError: the loss became NaN or infinite. The best weights so far are kept.
        Interrupted: SIGINT or SIGTERM came; `resume` goes on from there.
        RankError: another process of this training ended, or does not answer.
    """
    with joined(wait) as ranks:
        if ranks.remembered is not None:  # these processes take the place of some that failed
            return _resume(ranks, ranks.remembered, data, three_way=three_way, observers=observers)
        with ranks.agreeing("ready"):
            ranks.refuse(record=record, minutes=minutes is not None)
            layers = None if isinstance(record, bool) else list(record)
            asked = _asked(record, three_way)
            source = starting_points.open_source(start, freeze=freeze, statistics=statistics)
            wanted = {k: v for k, v in changes.items() if v is not None} | dict(settings or {})
            starting_points.choose_recipe(source, recipe, wanted)  # before anything is read
            began = time.perf_counter()
            threads = resolve_threads(threads, ranks.local[1])
            where = resolve_device(device, ranks.local[0] if ranks.size > 1 else None)
            if minutes is not None and not 0 < minutes < math.inf:
                raise UserError(f"minutes={minutes}: choose a number above 0")
            for name in ("epochs", "least_steps") if minutes is not None else ():
                if name in wanted:
                    raise UserError(
                        f"minutes={minutes:g} decides how long the training is, and so does "
                        f"{name}={wanted[name]}: leave one of them out"
                    )
            if not 0 <= seed < 2**63:
                raise UserError(f"seed={seed}: choose a whole number from 0 to 2⁶³ − 1")
            started = time.perf_counter()
            size = starting_points.size_of(source) if image_size is None else image_size
            decided = read_changes(exclude, relabel)

            def read(side: int | None) -> ImageData:
                return load(
                    data, image_size=side, skip_bad=skip_bad, group_by=group_by, changes=decided
                )

            images = read(size)
            check_size(images.name, images.image_shape, image_size)
            data_seconds = time.perf_counter() - started
            own = images.name not in PUBLIC
            if recipe is None and own and starting_points.suits(source, DEFAULT_OWN):
                recipe = DEFAULT_OWN

            def task_at(side: int, **more: Any) -> Task:
                """What is to be done at this size of images."""
                settled = settle_recipe(source, recipe, images, side, {**wanted, **more})
                return Task(
                    recipe=settled,
                    seed=seed,
                    data=images.name
                    if data is None or not isinstance(data, (str, Path))
                    else str(data),
                    data_sha256=images.sha256,
                    class_names=images.class_names,
                    image_size=side,
                    skip_bad=skip_bad,
                    start=starting_points.plan_start(
                        *(source, settled, images.class_names),
                        freeze=freeze,
                        statistics=statistics,
                    ),
                    group_by=group_by,
                    changes=decided,
                )

            task = task_at(images.image_shape[0])
            _refuse_unobservable(asked, task, images)
            with machine_settings(threads, where):
                started = time.perf_counter()
                refuse_impossible(task, images)
                look = first_look(images) if own and ranks.first else None
                if look is not None:
                    for line in look.lines:
                        text = printable(f"{images.name}: {line}")
                        print(text, file=sys.stderr, flush=True)
                expected = allowed = pace = None
                if minutes is not None:
                    largest = images.natural_size if recipe == DEFAULT_OWN else None
                    sizes = [s for s in SIZES if largest and s <= largest] or [task.image_size]
                    left = minutes * 60 - time.perf_counter() + began
                    side, pace = largest_in(left, sizes, task_at, images, where)
                    if side != task.image_size:
                        images = read(side)
                    left = minutes * 60 - time.perf_counter() + began
                    steps = steps_in(left, pace, task_at(side), images)
                    planned = {"patience": None, **wanted, "epochs": int(steps > 0)}
                    planned["least_steps"] = steps
                    task = task_at(side, **planned)
                    allowed = left - pace.ending(make_plan(task, images, threads), images)
                elif own and ranks.size == 1:
                    pace = measure(task, where)
                if pace is not None:
                    plan = make_plan(task, images, threads)
                    expected = pace.seconds(plan) + pace.ending(plan, images)
                observed(task.build(), layers)
                fits = task.recipe.head == "fitted"
                if fits and ranks.first:  # which takes its time before the first line of a training
                    text = f"{images.name}: {images.summary()}; an output layer is fitted to them"
                    text += "" if expected is None else f"; about {duration(expected)} in all"
                    print(printable(text), file=sys.stderr, flush=True)
                task, weights = starting_points.begin(source, task, images)
                if fits and pace is not None and expected is not None:
                    expected -= len(plan.train) * pace.image  # for features, which are there now
        machine = _describe(threads, where, ranks)
        ranks.same("facts", _facts(task, machine))
        with machine_settings(threads, where), ExitStack() as held:
            folder = Path()
            with ranks.agreeing("folder"):
                if ranks.first:
                    folder = create_folder(out, task.recipe.name)
                    held.enter_context(locked(folder))
                    _claim(folder, task)
                    starting_points.write_start(folder, task, weights)
                    if look is not None:
                        write_json(folder / "look.json", {"leak": look.leak})
                    # The last of the first files: a run that has it can be resumed.
                    write_json(folder / "environment.json", machine | asked)
            folder = Path(ranks.exchange("folder's name", str(folder))[0])
            ranks.remember(str(folder.absolute()))
            state = new_state(task, images, where, weights)
            checkpoint.share(ranks, state)
            state.seconds = time.perf_counter() - started
            return _finish(
                *(ranks, Run(folder, task), images, data_seconds, state, machine),
                *(where, observers, asked),
                expected=expected,
                allowed=None if allowed is None else allowed + state.seconds,
            )


def settle_recipe(
    source: runs.Run | None,
    recipe: str | Recipe | None,
    images: ImageData,
    side: int,
    wanted: Mapping[str, Any],
) -> Recipe:
    """The recipe to train by at this size of images; of `pictures`, with what follows from both.

    source, recipe: as `starting_points.choose_recipe` takes them.
    wanted: settings to replace.
    """
    follows = {}
    if recipe == DEFAULT_OWN and images.name not in PUBLIC:
        follows = fitted(images.class_names, side, wanted, source is not None)
    return starting_points.choose_recipe(source, recipe, {**follows, **wanted})


def _describe(threads: int, device: torch.device, ranks: Ranks) -> dict[str, Any]:
    machine = describe_machine(threads, device)
    return machine | {"processes": ranks.size} if ranks.size > 1 else machine


def _facts(task: Task, machine: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for all processes of a training; the data's place need not be."""
    keys = ("normlab", "torch", "numpy", "compiled_kernels", "cpu_capability", "bfloat16", "amx")
    values = task.as_dict()
    return {
        **{f"version of {key}": machine[key] for key in keys[:3]},
        **{key.replace("_", " "): machine[key] for key in keys[3:]},
        "kind of device": str(machine["device"]).split(":")[0],
        "data (by SHA-256)": values.pop("data_sha256"),
        **{k: v for k, v in values.items() if k not in ("data", "start")},
        "weights to start from": values.get("start", {}).get("weights_sha256"),
    }


def _claim(folder: Path, task: Task) -> None:
    """Write `recipe.json`; of two runs given the same folder the second one fails here."""
    try:
        write_json(folder / "recipe.json", task.as_dict(), replace=False)
    except FileExistsError:
        raise UserError(
            f"folder {str(folder)!r} is not empty: choose a new one for --out"
        ) from None


def _asked(record: bool | Sequence[str], three_way: bool) -> dict[str, Any]:
    """What a run shall observe; `environment.json` has it, so that `resume` goes on with it."""
    layers = record if isinstance(record, bool) else list(record)
    return {key: value for key, value in (("record", layers), ("three_way", three_way)) if value}


def _refuse_unobservable(asked: Mapping[str, Any], task: Task, images: ImageData) -> None:
    if "three_way" in asked and not len(split_images(images, task.recipe.validation)[1]):
        raise UserError(
            f"--three-way scores validation images and {task.recipe.name} holds out none: "
            "train with --validation 0.1, or leave it out"
        )


def resume(
    run: str | Path | None = None,
    *,
    data: str | Path | Mapping[str, Any] | ImageData | None = None,
    allow_changes: bool = False,
    record: bool = False,
    three_way: bool = False,
    observers: tuple[Observer, ...] = (),
    wait: float = WAIT,
) -> Run:
    """Go on with an interrupted run; it ends with the bits it would have ended with.

    Args:
        run: its folder; None for the highest number in `runs/`.
        data: where the images are now, if not where they were.
        allow_changes: go on although the data or the environment differ, where the end need not be
            bit-identical; the run's page and `environment.json` then tell of both.
        record, three_way: as for `train`; what the run was asked for before goes on in any case.
        observers: told after each step, in rank 0.
        wait: seconds that one process waits for another.

    Raises:
        UserError: it is finished already, report and all, or something differs and
            `allow_changes` is off.
        DataError: the data have other classes or another image size.
    """
    with joined(wait) as ranks:
        chosen = run if ranks.remembered is None else ranks.remembered
        return _resume(
            *(ranks, chosen, data),
            allow_changes=allow_changes,
            record=record,
            three_way=three_way,
            observers=observers,
        )


def _resume(
    ranks: Ranks,
    run: str | Path | None,
    data: str | Path | Mapping[str, Any] | ImageData | None,
    *,
    allow_changes: bool = False,
    record: bool = False,
    three_way: bool = False,
    observers: tuple[Observer, ...] = (),
) -> Run:
    told: Any = None
    with ranks.agreeing("open"):
        if ranks.first:  # the only one that needs the folder
            found = open_run(run)
            done = found.result is not None
            if done and not _redraw(found, data) and ranks.remembered is None:
                _refuse_finished(found)
            if not (found.path / "environment.json").exists():
                raise UserError(
                    f"run {str(found.path)!r} ended before its first step: train again, with a "
                    "new --out"
                )
            told = {
                "path": str(found.path),
                "task": found.task.as_dict(),
                "environment": dict(found.environment),
                "done": done,
                "recorded": (found.path / RECORDING).exists(),
            }
    told = ranks.exchange("run", told)[0]
    opened = Run(Path(told["path"]), Task.from_dict(told["task"]))
    environment: dict[str, Any] = told["environment"]
    if told["done"]:
        return opened
    with ranks.agreeing("ready"):
        begun = environment.get("record", told["recorded"])  # older runs do not say
        asked = _asked(begun or record, environment.get("three_way", False) or three_way)
        ranks.refuse(record="record" in asked)
        most = resolve_threads(None, ranks.local[1])
        then = [environment, *environment.get("later", [])][-1]
        threads = resolve_threads(min(then["threads"], most))
        where = resolve_device(str(then["device"]), ranks.local[0] if ranks.size > 1 else None)
        started = time.perf_counter()
        images = opened.task.load(data)
        data_seconds = time.perf_counter() - started
    machine = _describe(threads, where, ranks)
    ranks.same("facts", _facts(opened.task, machine) | {"data (by SHA-256)": images.sha256})
    with ranks.agreeing("differences"):
        opened.check_data(images)
        _refuse_unobservable(asked, opened.task, images)
        differs = _differences(opened.task, then, images, machine)
        if differs and not allow_changes:
            raise UserError(
                f"run {str(opened.path)!r} ran with other {'; '.join(differs)}: "
                "--allow-changes goes on all the same, but the end may differ"
            )
    ranks.remember(str(opened.path.absolute()))
    with machine_settings(threads, where), ExitStack() as held:
        with ranks.agreeing("locked"):
            if ranks.first:
                held.enter_context(locked(opened.path))
                _refuse_finished(opened)  # another process may have been at its last step
                weights = starting_points.read_start(opened.path, opened.task)
        state = new_state(opened.task, images, where, weights if ranks.first else None)
        if ranks.first:
            problem = checkpoint.restore(opened.path, state)
            if problem:
                line = f"normlab: {problem}; going on from step {state.step:,}"
                print(printable(line), file=sys.stderr)
            _note_changes(opened, state.step, images, machine, asked)
        checkpoint.share(ranks, state)
        return _finish(ranks, opened, images, data_seconds, state, machine, where, observers, asked)


def _refuse_finished(run: Run) -> None:
    if run.result is not None:
        raise UserError(f"run {str(run.path)!r} is finished: nothing is left to resume")


def _draw(run: Run, evaluation: Evaluation, images: ImageData) -> None:
    from normlab.reports.run_report import write_run_report  # Matplotlib: not before it is needed

    write_run_report(run, evaluation, images)


def _redraw(run: Run, data: str | Path | Mapping[str, Any] | ImageData | None) -> bool:
    """Do what a run that was killed at its very end has left undone; whether its page was."""
    with locked(run.path):
        checkpoint.remove(run.path)
        starting_points.remove_start(run.path)
        if (run.path / "report.html").exists():
            return False
        images = run.task.load(data)
        _draw(run, run.evaluate(images), images)
        return True


def _differences(
    task: Task, then: Mapping[str, Any], images: ImageData, now: Mapping[str, Any]
) -> list[str]:
    # What older runs did not tell: one process, whether products were bfloat16, the code. They had
    # no AMX.
    same = {key: now[key] for key in ("bfloat16", "code_sha256")}
    then = {"processes": 1, "amx": False, **same, "data_sha256": task.data_sha256, **then}
    now = {"processes": 1, **now, "data_sha256": images.sha256}
    found = [
        f"{key} ({then.get(key)} then, {now[key]} now)"
        for key in (
            "normlab",
            "torch",
            "numpy",
            "processes",
            "threads",
            "device",
            "cpu",
            "cpu_capability",
            "compiled_kernels",
            "bfloat16",
            "amx",
        )
        if then.get(key) != now[key]
    ]
    found += [
        f"{key} ({then[f'{key}_sha256'][:12]}… then, {now[f'{key}_sha256'][:12]}… now)"
        for key in ("code", "data")
        if then[f"{key}_sha256"] != now[f"{key}_sha256"]
    ]
    return found


def _note_changes(
    run: Run, step: int, images: ImageData, now: Mapping[str, Any], asked: Mapping[str, Any]
) -> None:
    """Note in `environment.json` what a run goes on with behind `step`, if that is another than
    before, and what it is `asked` to observe. Of what it went on with behind a later step, or this
    one, nothing is left.
    """
    begun: dict[str, Any] = dict(run.environment)
    later = [entry for entry in begun.get("later", []) if entry["step"] < step]
    if differs := _differences(run.task, [begun, *later][-1], images, now):
        later.append({"step": step, "differs": differs, **now, "data_sha256": images.sha256})
    noted = {**begun, **asked, "later": later}
    if noted != {"later": [], **begun}:
        write_json(run.path / "environment.json", noted)


def _finish(
    ranks: Ranks,
    run: Run,
    images: ImageData,
    data_seconds: float,
    state: State,
    machine: Mapping[str, Any],
    device: torch.device,
    observers: tuple[Observer, ...],
    asked: Mapping[str, Any],
    *,
    expected: float | None = None,
    allowed: float | None = None,
) -> Run:
    """Train to the end; rank 0 writes weights, scores the test images once, draws the report.

    Args:
        asked: what to observe, as `_asked` has it.
        expected: seconds that it will take.
        allowed: seconds that the training may take.
    """
    recipe, folder = run.task.recipe, run.path
    plan = make_plan(run.task, images, machine["threads"], folder, ranks)
    plan = replace(plan, expected=expected, seconds=allowed)
    extra: tuple[Hook, ...] = (ThreeWayScores(),) if "three_way" in asked else ()
    if record := asked.get("record"):
        observers = (*observers, Recorder(None if record is True else record))
    if ranks.first:
        observers = (*observers, checkpoint.Checkpoints(folder, state))
    try:
        fit(plan, state, device, observers if ranks.first else (), hooks=make_hooks(plan, extra))
    except Interrupted as e:
        if ranks.first:
            checkpoint.save(folder, state)
        raise Interrupted(
            e.signum,
            f" after step {state.step:,} of {plan.steps:,}; nothing is lost, go on with: "
            f"{shell(['normlab', 'train', '--resume', str(folder)])}",
        ) from None
    if not ranks.first:
        return run
    remedy = f"try a lower --learning-rate than {recipe.optimizer.learning_rate:g}"
    if not is_finite(state.model.state_dict()):
        raise NonFiniteError(f"a weight is NaN or infinite after the last step: {remedy}")
    write_tensors(folder / "last.safetensors", state.model.state_dict())
    kept, repair = _choose_weights(run, plan, state)
    started = time.perf_counter()
    if len(plan.validation):
        model = run.model(kept)
        held_out.write(
            run, *held_out.learn(model, plan.train, plan.validation, images.num_classes, kept)
        )
    evaluation = run.evaluate(images, weights=kept)
    evaluation_seconds = time.perf_counter() - started
    if not math.isfinite(evaluation.loss):
        raise NonFiniteError(f"the loss on the test images is {evaluation.loss}: {remedy}")
    last = state.history[-1] if state.history else {}  # none where time was up in the first epoch
    if state.totals.images and len(plan.validation):  # within a later one: the row is of before
        found = score(state.model, plan.validation.images, plan.validation.labels)
        last = {"val_loss": found.loss, "val_accuracy": found.accuracy}
    result = {
        "run": str(folder),
        "recipe": recipe.name,
        "norm": recipe.norm.name,
        "seed": run.task.seed,
        "steps": state.step,
        "test_accuracy": evaluation.accuracy,
        "test_accuracy_interval": list(evaluation.interval),
        "test_loss": evaluation.loss,
        "val_accuracy": last.get("val_accuracy"),
        "val_loss": last.get("val_loss"),
        "train_seconds": state.seconds,
        "images_per_second": len(plan.train) * state.step / len(plan.bounds) / state.seconds,
        "weights_sha256": digest(state.model.state_dict()),
        "weights": kept,
        "repair": None if repair is None else asdict(repair),
        "length": {
            "epochs": sum(row["epoch"] > 0 for row in state.history),  # 0 is a head fitted
            "planned": plan.epochs,
            "held_out": len(plan.validation),
            "best_epoch": state.best_epoch,
        },
        "data_seconds": data_seconds,
        "evaluation_seconds": evaluation_seconds,
        "evaluation": evaluation.as_dict(),
        "leak": run.leak,
        "baselines": None if images.name in PUBLIC else score_baselines(images),
    }
    write_json(folder / "result.json", result)  # from here on the run counts as finished
    checkpoint.remove(folder)
    starting_points.remove_start(folder)
    _draw(run, evaluation, images)
    return run


def _choose_weights(run: Run, plan: Plan, state: State) -> tuple[str, Repair | None]:
    """Which weights the run keeps: where patience was asked for, the best if the held-out images
    tell them from the last; statistics renewed where they are stale.
    """
    start = run.task.start
    if not len(plan.validation):
        return "last", None
    model, kept = run.model("last"), "last"
    chooses = plan.recipe.patience is not None or (plan.recipe.head == "fitted" and state.step)
    if chooses and state.best_epoch is not None:
        best = run.model("best")
        if clearly_better(best, model, plan.validation):
            model, kept = best, "best"
    if start is not None and start.statistics != "adapt":
        return kept, None  # they are what they were meant to be
    repair = renew_stale(model, plan.train.images, plan.validation)
    if repair is not None:
        kept = "recalibrated"
        write_tensors(run.path / "recalibrated.safetensors", model.state_dict())
    return kept, repair
