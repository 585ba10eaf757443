"""Train a recipe: data in, a run's folder with an honest score out."""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from normlab.core.environment import describe, resolve_device, resolve_threads, settings
from normlab.core.files import digest, locked, write_json, write_tensors
from normlab.core.text import printable, shell
from normlab.data import ImageData, load
from normlab.data.batches import split_validation
from normlab.data.loading import PUBLIC
from normlab.errors import NonFiniteError, UserError
from normlab.inspection.activations import observed
from normlab.models import FastNet
from normlab.recipes import Recipe
from normlab.runs.run import Run, Task, create_folder, open_run
from normlab.training import checkpoint
from normlab.training import starting_points as transfer
from normlab.training.loop import Interrupted, Observer, Plan, State, fit, is_finite
from normlab.training.optimisers import make_optimizer


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
    start: str | Path | Run | None = None,
    freeze: bool = False,
    statistics: str | None = None,
    record: bool | Sequence[str] = False,
    observers: tuple[Observer, ...] = (),
    **changes: Any,
) -> Run:
    """Train `recipe` from `seed`, score it once on the test images, and keep it as a run.

        run = normlab.train("notebook", epochs=1, data="sample")
        run.result["test_accuracy"]

    Args:
        recipe: a name that `normlab recipes` lists, or a `Recipe`; None for the recipe of the run
            to start from, or else for the default one.
        data: as `normlab.data.load` takes it; None for CIFAR-10.
        out: the run's folder, new or empty; None for the next number in `runs/`.
        seed: of everything random.
        threads: of the CPU; None for all cores.
        device: `auto`, `cpu` or `cuda`.
        image_size, skip_bad: for pictures in a folder or parquet; see `normlab.data.load`.
        start: a finished run to start from: its network, all but the output layer, is taken over,
            and the recipe says how to go on training it. The output layer is taken over, too, if
            the classes are the same by name.
        freeze: with `start`: only the output layer learns.
        statistics: with `start`: of its batch normalisations, `keep`, `adapt` or `recalibrate`; see
            `normlab.training.starting_points`. None for `keep` when frozen, else `adapt`.
        record: keep what each layer sees, or those of these names, for `normlab inspect`.
        observers: told after each step.
        **changes: fields of `Recipe` to replace: `epochs`, `batch_size`, `norm`, ….

    Raises:
        UserError: something asked for is not possible; raised before any work is done.
        NonFiniteError: the loss became NaN or infinite. The best weights so far are kept.
        Interrupted: SIGINT or SIGTERM came; `resume` goes on from there.
    """
    layers = None if isinstance(record, bool) else list(record)
    if record:
        from normlab.inspection.recording import Recorder

        observers = (*observers, Recorder(layers))
    source = transfer.open_source(start, freeze=freeze, statistics=statistics)
    chosen = transfer.choose_recipe(source, recipe, changes)
    threads, where = resolve_threads(threads), resolve_device(device)
    if not 0 <= seed < 2**63:
        raise UserError(f"seed={seed}: choose a whole number from 0 to 2⁶³ − 1")
    started = time.perf_counter()
    size = source.task.image_size if image_size is None and source is not None else image_size
    images = load(data, image_size=size, skip_bad=skip_bad)
    data_seconds = time.perf_counter() - started
    task = Task(
        recipe=chosen,
        seed=seed,
        data=images.name if data is None or not isinstance(data, (str, Path)) else str(data),
        data_sha256=images.sha256,
        class_names=images.class_names,
        image_size=images.x_train.shape[1],
        skip_bad=skip_bad,
        start=transfer.plan_start(source, images.class_names, freeze=freeze, statistics=statistics),
    )
    if image_size is not None and image_size != task.image_size:
        raise UserError(
            f"image_size={image_size}: {images.name} has {task.image_size} × {task.image_size} "
            "pixels; only pictures from a folder or parquet are resized"
        )
    with settings(threads, where):
        started = time.perf_counter()
        _refuse_impossible(task, images, layers)
        weights = transfer.starting_weights(source, task, images)
        folder = create_folder(out, chosen.name)
        with locked(folder):
            _claim(folder, task)
            transfer.write_start(folder, task, weights)
            write_json(folder / "environment.json", describe(threads, where))
            state = new_state(task, images, where, weights)
            state.seconds = time.perf_counter() - started
            return _finish(Run(folder, task), images, data_seconds, state, where, observers)


def _refuse_impossible(task: Task, images: ImageData, layers: list[str] | None) -> None:
    """Find out before a folder is made what the first step could not do.

    Raises:
        UserError: pictures that are not square or too small, batches of a single image, or
            `layers` to record that the network does not have.
    """
    height, width, _ = images.image_shape
    if height != width:
        raise UserError(
            f"data {images.name!r} has images of {height} × {width} pixels: make them square"
        )
    observed(task.build(), layers)
    recipe = task.recipe
    train, _ = split_validation(images.x_train, images.y_train, recipe.validation)
    if recipe.norm == "batch" and min(recipe.batch_size, len(train)) < 2:
        raise UserError(
            f"batch_size={recipe.batch_size} with {len(train):,} training images gives batches of "
            "one, which have no variance: take two or more, or --norm none"
        )


def _claim(folder: Path, task: Task) -> None:
    """Write `recipe.json`; of two runs given the same folder the second one fails here."""
    try:
        write_json(folder / "recipe.json", task.as_dict(), replace=False)
    except FileExistsError:
        raise UserError(
            f"folder {str(folder)!r} is not empty: choose a new one for --out"
        ) from None


def resume(
    run: str | Path | None = None,
    *,
    data: str | Path | Mapping[str, Any] | ImageData | None = None,
    allow_changes: bool = False,
    observers: tuple[Observer, ...] = (),
) -> Run:
    """Go on with an interrupted run; it ends with the bits it would have ended with.

    Args:
        run: its folder; None for the highest number in `runs/`.
        data: where the images are now, if not where they were.
        allow_changes: go on although the data or the environment differ, where the end will not be
            bit-identical.
        observers: told after each step.

    Raises:
        UserError: it is finished already, or something differs and `allow_changes` is off.
    """
    opened = open_run(run)
    if opened.result is not None:
        with locked(opened.path):  # whose file, and checkpoints, one killed at its end leaves
            checkpoint.remove(opened.path)
        raise UserError(f"run {str(opened.path)!r} is finished: nothing is left to resume")
    if not (opened.path / "environment.json").exists():
        raise UserError(
            f"run {str(opened.path)!r} ended before its first step: train again, with a new --out"
        )
    environment = opened.environment
    threads = resolve_threads(min(environment["threads"], resolve_threads(None)))
    where = resolve_device(str(environment["device"]))
    started = time.perf_counter()
    images = opened.task.load(data)
    data_seconds = time.perf_counter() - started
    differs = _differences(opened, images, describe(threads, where))
    if differs and not allow_changes:
        raise UserError(
            f"run {str(opened.path)!r} began with other {'; '.join(differs)}: "
            "--allow-changes goes on all the same, but the end will differ"
        )
    weights = transfer.read_start(opened.path, opened.task)
    with settings(threads, where), locked(opened.path):
        state = new_state(opened.task, images, where, weights)
        problem = checkpoint.restore(opened.path, state)
        if problem:
            line = f"normlab: {problem}; going on from step {state.step:,}"
            print(printable(line), file=sys.stderr)
        return _finish(opened, images, data_seconds, state, where, observers)


def _differences(run: Run, images: ImageData, now: dict[str, Any]) -> list[str]:
    then = run.environment
    found = [
        f"{key} ({then.get(key)} then, {now[key]} now)"
        for key in ("torch", "threads", "device", "cpu", "cpu_capability", "compiled_kernels")
        if then.get(key) != now[key]
    ]
    if images.sha256 != run.task.data_sha256:
        found.append(f"data ({run.task.data_sha256[:12]}… then, {images.sha256[:12]}… now)")
    return found


def new_state(
    task: Task,
    images: ImageData,
    device: torch.device,
    weights: dict[str, torch.Tensor] | None = None,
) -> State:
    """The network with its initial values and its optimiser, before the first step.

    Args:
        weights: in place of the initial values, as `transfer.starting_weights` has them.
    """
    model = task.build().to(device)
    if weights is not None:
        model.load_state_dict(weights)
    elif isinstance(model, FastNet):
        train, _ = split_validation(images.x_train, images.y_train, task.recipe.validation)
        model.fit_to(train.images)
    if task.start is not None:
        transfer.freeze(model, task.start)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return State(model=model, optimizer=make_optimizer(task.recipe, model))


def make_plan(task: Task, images: ImageData, threads: int, folder: Path | None = None) -> Plan:
    """Split the images and say what `fit` shall do with them."""
    train, validation = split_validation(images.x_train, images.y_train, task.recipe.validation)
    return Plan(
        recipe=task.recipe,
        folder=folder,
        seed=task.seed,
        threads=threads,
        train=train,
        validation=validation,
        start="" if task.start is None else str(task.start),
    )


def _finish(
    run: Run,
    images: ImageData,
    data_seconds: float,
    state: State,
    device: torch.device,
    observers: tuple[Observer, ...],
) -> Run:
    """Train to the end, write weights, score the test images once, draw the report."""
    from normlab.evaluation.baselines import score_baselines
    from normlab.reports.run_report import write_run_report

    recipe, folder = run.task.recipe, run.path
    plan = make_plan(run.task, images, run.environment["threads"], folder)
    keeper = checkpoint.Keeper(folder, saved_at=state.seconds)
    try:
        # The keeper comes last: what the others add to the history is written down, too.
        fit(plan, state, device, (*observers, keeper))
    except Interrupted as e:
        checkpoint.save(folder, state)
        raise Interrupted(
            e.signum,
            f" after step {state.step:,} of {plan.steps:,}; nothing is lost, go on with: "
            f"{shell(['normlab', 'train', '--resume', str(folder)])}",
        ) from None
    if not is_finite(state.model):
        raise NonFiniteError(
            "a weight is NaN or infinite after the last step: "
            f"try a lower --learning-rate than {recipe.learning_rate:g}"
        )
    write_tensors(folder / "last.safetensors", state.model.state_dict())
    started = time.perf_counter()
    evaluation = run.evaluate(images)
    evaluation_seconds = time.perf_counter() - started
    if not math.isfinite(evaluation.loss):
        raise NonFiniteError(
            f"the loss on the test images is {evaluation.loss}: "
            f"try a lower --learning-rate than {recipe.learning_rate:g}"
        )
    result = {
        "run": str(folder),
        "recipe": recipe.name,
        "norm": recipe.norm,
        "seed": run.task.seed,
        "steps": state.step,
        "test_accuracy": evaluation.accuracy,
        "test_accuracy_interval": list(evaluation.interval),
        "test_loss": evaluation.loss,
        "val_accuracy": state.history[-1]["val_accuracy"],
        "val_loss": state.history[-1]["val_loss"],
        "train_seconds": state.seconds,
        "images_per_second": len(plan.train) * len(state.history) / state.seconds,
        "weights_sha256": digest(state.model.state_dict()),
        "data_seconds": data_seconds,
        "evaluation_seconds": evaluation_seconds,
        "evaluation": evaluation.as_dict(),
        "baselines": None if images.name in PUBLIC else score_baselines(images),
    }
    write_run_report(run, result, evaluation, images)
    write_json(folder / "result.json", result)  # from here on the run counts as finished
    checkpoint.remove(folder)
    transfer.remove_start(folder)
    return run
