"""The front door: verbs only, no logic. Heavy imports wait until a verb needs them."""

import json
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normlab.cli.compare import compare
from normlab.cli.data import data as data_group
from normlab.cli.doctor import doctor, recalibrate
from normlab.cli.export import export_command, import_command
from normlab.cli.inspect import inspect
from normlab.cli.output import say
from normlab.cli.predict import predict
from normlab.cli.serve import serve

if TYPE_CHECKING:
    from normlab.runs.run import Run
    from normlab.training.loop import Observer


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="normlab")
def cli() -> None:
    """Train batch-normalised image classifiers, and know what the normalisation does for them.

    Start with `normlab train`: it gets CIFAR-10, trains the default recipe and scores it.
    """


cli.add_command(data_group)
cli.add_command(inspect)
cli.add_command(export_command)
cli.add_command(import_command)
cli.add_command(compare)
cli.add_command(doctor)
cli.add_command(recalibrate)
cli.add_command(predict)
cli.add_command(serve)

DATA = click.option(
    "--data",
    metavar="DATA",
    help="cifar10 (the default), sample (a few hundred images, no network), a folder of pictures, "
    "a .npz, a .parquet, or an archive or folder that holds CIFAR-10.",
)
JSON = click.option("--json", "as_json", is_flag=True, help="End with one line of JSON.")


@cli.command()
@click.argument("recipe", required=False)
@click.option("--norm", help="The normaliser: batch or none.")
@click.option("--epochs", type=int, help="Passes over the training images.")
@click.option("--batch-size", type=int, help="Images a step.")
@click.option("--learning-rate", type=float, help="The optimiser's learning rate.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of everything random.")
@click.option("--threads", type=int, help="CPU threads; all cores by default.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@DATA
@click.option("--image-size", type=click.IntRange(8, 512), help="Of pictures; 32 by default.")
@click.option("--skip-bad", is_flag=True, help="Leave out pictures that cannot be used.")
@click.option(
    "--validation", type=float, help="Share of the training images, the last ones, to hold out."
)
@click.option(
    "--ema", type=float, help="Score and keep averaged weights; their decay a step, such as 0.999."
)
@click.option("--patience", type=int, help="Stop after so many epochs without a better val_loss.")
@click.option("--from", "start", metavar="RUN", help="Start from this finished run's network.")
@click.option("--freeze", is_flag=True, help="With --from: only the output layer learns.")
@click.option("--statistics", help="With --from: keep, adapt or recalibrate the normalisers'.")
@click.option("--out", type=click.Path(path_type=Path), help="The run's folder, new or empty.")
@click.option("--tensorboard", is_flag=True, help="Write TensorBoard events into the run, too.")
@click.option("--three-way", is_flag=True, help="Score each epoch with three kinds of statistics.")
@click.option("--record", is_flag=True, help="Keep what each layer sees, for `normlab inspect`.")
@click.option("--layers", metavar="NAME,…", help="With --record: only these layers.")
@click.option("--resume", metavar="RUN", help="Go on with an interrupted run.")
@click.option("--allow-changes", is_flag=True, help="With --resume: although something differs.")
@JSON
@click.pass_context
def train(
    context: click.Context,
    /,
    recipe: str | None,
    seed: int,
    threads: int | None,
    device: str,
    data: str | None,
    image_size: int | None,
    skip_bad: bool,
    start: str | None,
    freeze: bool,
    statistics: str | None,
    out: Path | None,
    tensorboard: bool,
    three_way: bool,
    record: bool,
    layers: str | None,
    resume: str | None,
    allow_changes: bool,
    as_json: bool,
    **changes: Any,
) -> None:
    """Train RECIPE, score it once on the test images, and keep it as a run.

    Options override the recipe; `normlab recipes` lists recipes. With --from, RECIPE is by default
    the recipe of that run.
    """
    from normlab.api import train as training
    from normlab.training import starting_points as transfer

    if layers is not None and not record:
        raise click.UsageError("--layers says which layers --record keeps: add --record")
    observer = _progress()
    observers: list[Observer] = [observer]
    if tensorboard:
        from normlab.training.tensorboard import TensorBoard

        observers.append(TensorBoard())
    if three_way:
        from normlab.evaluation.recalibration import ThreeWayScores

        chosen = transfer.choose_recipe(transfer.open_source(start), recipe, changes)
        if resume is None and chosen.validation == 0:
            raise click.UsageError(
                f"--three-way scores validation images and {chosen.name} holds out none: "
                "add --validation 0.1"
            )
        observers.insert(0, ThreeWayScores())  # before those who tell of the epoch
    if resume is not None and (record or (Path(resume) / "recording.npz").exists()):
        from normlab.inspection.recording import Recorder

        observers.append(Recorder())
    install_seconds = os.environ.get("NORMLAB_INSTALL_SECONDS")
    with observer if isinstance(observer, AbstractContextManager) else nullcontext():
        if resume is not None:
            _refuse_with_resume(context)
            run = training.resume(
                resume, data=data, allow_changes=allow_changes, observers=tuple(observers)
            )
        else:
            run = training.train(
                recipe,
                data=data,
                image_size=image_size,
                skip_bad=skip_bad,
                start=start,
                freeze=freeze,
                statistics=statistics,
                record=record if layers is None else layers.split(","),
                out=out,
                seed=seed,
                threads=threads,
                device=device,
                observers=tuple(observers),
                **changes,
            )
    _close(run, float(install_seconds) if install_seconds else None, as_json)


def _refuse_with_resume(context: click.Context) -> None:
    """A resumed run is decided by its folder; options that would change it are a mistake."""
    allowed = {
        "resume",
        "data",
        "allow_changes",
        "tensorboard",
        "three_way",
        "record",
        "as_json",
    }
    for name in context.params:
        given = context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE
        if given and name not in allowed:
            option = {"recipe": name, "start": "--from"}.get(name, f"--{name.replace('_', '-')}")
            raise click.UsageError(f"{option} cannot be combined with --resume", context)


def _progress() -> Any:
    from rich.console import Console

    from normlab.training.progress import Bar, Lines

    console = Console(stderr=True)
    return Bar(console) if console.is_terminal and sys.stdout.isatty() else Lines()


def _close(run: "Run", install_seconds: float | None, as_json: bool) -> None:
    from normlab.reports.run_report import closing_lines

    for line in closing_lines(run, install_seconds):
        say(line)
    if as_json:
        click.echo(json.dumps(run.result))


@cli.command()
@click.argument("run", required=False)
@DATA
@click.option("--weights", default="last", show_default=True, help="last, best or recalibrated.")
@click.option(
    "--views",
    default="single",
    show_default=True,
    help="Versions of each picture to answer from: single, flip (2) or shift (6).",
)
@JSON
def evaluate(run: str | None, data: str | None, weights: str, views: str, as_json: bool) -> None:
    """Score RUN (by default the latest) on the test images, with plots and its mistakes."""
    from normlab.reports.run_report import write_evaluation
    from normlab.runs.run import open_run

    opened = open_run(run)
    images = opened.task.load(data)
    evaluation = opened.evaluate(images, weights=weights, views=views)
    name = weights if views == "single" else f"{weights}-{views}"
    folder = opened.path / f"evaluation-{name}"
    write_evaluation(evaluation, images, folder)
    if views != "single":
        say(f"Views: {views}; not comparable with figures from a single view")
    say(str(evaluation))
    say(f"Balanced accuracy: {evaluation.balanced_accuracy:.4f}")
    width = max(map(len, evaluation.class_names))
    for name, accuracy in zip(evaluation.class_names, evaluation.class_accuracy, strict=True):
        say(f"  {name:<{width}}  {accuracy:.3f}")
    for limit in evaluation.limits:
        say(f"Limit: {limit}")
    say(f"Report: {folder / 'report.html'}")
    if as_json:
        click.echo(json.dumps(evaluation.as_dict()))


@cli.command()
@click.argument("recipe")
@click.option("--norm", help="The normaliser: batch or none.")
def summary(recipe: str, norm: str | None) -> None:
    """Print RECIPE's network as a table of layers, output shapes and parameters."""
    from normlab import recipes
    from normlab.models import MODELS, summarize

    chosen = recipes.get(recipe).override(norm=norm)
    say(str(summarize(MODELS[chosen.model](norm=chosen.norm))))


@cli.command("recipes")
def list_recipes() -> None:
    """List the recipes."""
    from normlab import recipes

    width = max(map(len, recipes.RECIPES))
    for name, make in recipes.RECIPES.items():
        first_line = (make.__doc__ or "").strip().splitlines()[0]
        default = "  (the default)" if name == recipes.DEFAULT else ""
        say(f"{name:<{width}}  {first_line}{default}")
