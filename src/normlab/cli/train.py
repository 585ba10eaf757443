"""`normlab train`: a recipe trained, scored once and kept as a run."""

import json
import os
import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normlab.cli.options import (
    DATA,
    GROUP_BY,
    IMAGE_SIZE,
    JSON,
    SKIP_BAD,
    RecipeCommand,
    given_settings,
    recipe_options,
)
from normlab.cli.output import say

if TYPE_CHECKING:
    from normlab.runs import Run
    from normlab.training.state import Observer


@click.command(cls=RecipeCommand)
@click.argument("recipe", required=False)
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="The seed of every random draw: initial weights, order, augmentation, dropout.",
)
@click.option("--threads", type=int, help="CPU threads; all cores by default.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@DATA
@IMAGE_SIZE
@SKIP_BAD
@GROUP_BY
@click.option("--exclude", metavar="FILE", help="Leave out the pictures that this CSV names.")
@click.option("--relabel", metavar="FILE", help="Give pictures the labels that this CSV names.")
@click.option(
    "--from",
    "start",
    metavar="RUN|NAME|FILE",
    help="Start from a finished run, from timm's network NAME, pretrained on ImageNet, or from its "
    "weights in FILE; builtin is a run on CIFAR-10.",
)
@click.option(
    "--minutes",
    type=float,
    help="What all of it may take, in place of --epochs: size, network and length are planned to "
    "fill it.",
)
@click.option("--freeze", is_flag=True, help="With --from: only the output layer learns.")
@click.option("--statistics", help="With --from: keep, adapt or recalibrate the normalisers'.")
@click.option("--out", type=click.Path(path_type=Path), help="The run's folder, new or empty.")
@click.option("--tensorboard", is_flag=True, help="Write TensorBoard events into the run, too.")
@click.option("--three-way", is_flag=True, help="Score each epoch with three kinds of statistics.")
@click.option("--record", is_flag=True, help="Keep what each layer sees, for `normlab inspect`.")
@click.option("--layers", metavar="NAME,…", help="With --record: only these layers.")
@click.option(
    "--processes",
    type=click.IntRange(1),
    help="Train in so many processes of this machine, each with a share of its cores.",
)
@click.option(
    "--max-restarts",
    type=click.IntRange(0),
    help="With --processes: after a failure, go on from the last checkpoint so many times.",
)
@click.option(
    "--wait",
    type=click.FloatRange(0, min_open=True),
    default=120.0,
    show_default=True,
    help="Seconds that one of several processes waits for another.",
)
@click.option("--resume", metavar="RUN", help="Go on with an interrupted run.")
@click.option("--allow-changes", is_flag=True, help="With --resume: although something differs.")
@JSON
@recipe_options
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
    group_by: str | None,
    exclude: str | None,
    relabel: str | None,
    minutes: float | None,
    start: str | None,
    freeze: bool,
    statistics: str | None,
    out: Path | None,
    tensorboard: bool,
    three_way: bool,
    record: bool,
    layers: str | None,
    processes: int | None,
    max_restarts: int | None,
    wait: float,
    resume: str | None,
    allow_changes: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train RECIPE, score it once on the test images, and keep it as a run.

    Options override the recipe; `normlab recipes` lists recipes. By default RECIPE is fast79, or
    with --from that of the run. On your own data it is pictures, unless that is for another network
    than the run's.
    """
    if layers is not None and not record:
        raise click.UsageError("--layers says which layers --record keeps: add --record")
    if resume is not None:
        _refuse_with_resume(context)
    if max_restarts is not None and processes is None:
        raise click.UsageError("--max-restarts is for --processes, or is an option of torchrun")
    if allow_changes and resume is None:
        raise click.UsageError("--allow-changes is for --resume: leave it out")
    from normlab.core.launcher import launch, world

    rank, size = world()
    if processes is not None and "RANK" not in os.environ:
        words = context.find_root().obj
        context.exit(launch(words, processes, restarts=max_restarts or 0))
    if processes not in (None, size):
        raise click.UsageError(
            f"--processes {processes} starts processes, and RANK={rank} in the environment says "
            f"that this is one of {size}: unset RANK and WORLD_SIZE, or leave out --processes"
        )
    from normlab.api.train import resume as go_on
    from normlab.api.train import train as begin

    observer = _progress() if rank == 0 else None
    observers: list[Observer] = [] if observer is None else [observer]
    if (tensorboard or resume is not None) and rank == 0:  # a resumed run goes on with its events
        from normlab.training.tensorboard import TensorBoard

        observers.append(TensorBoard(begin=tensorboard))
    install_seconds = None
    with suppress(ValueError):  # of `make run`; anything else that is there is no reason to fail
        install_seconds = float(os.environ.get("NORMLAB_INSTALL_SECONDS", ""))
    with observer if isinstance(observer, AbstractContextManager) else nullcontext():
        if resume is not None:
            run = go_on(
                resume,
                data=data,
                allow_changes=allow_changes,
                record=record,
                three_way=three_way,
                observers=tuple(observers),
                wait=wait,
            )
        else:
            run = begin(
                recipe,
                data=data,
                image_size=image_size,
                skip_bad=skip_bad,
                group_by=group_by,
                exclude=exclude,
                relabel=relabel,
                minutes=minutes,
                start=start,
                freeze=freeze,
                statistics=statistics,
                record=record if layers is None else layers.split(","),
                three_way=three_way,
                out=out,
                seed=seed,
                threads=threads,
                device=device,
                observers=tuple(observers),
                wait=wait,
                settings=given_settings(settings),
            )
    if rank == 0:
        _close(run, install_seconds, as_json)


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
        "processes",
        "max_restarts",
        "wait",
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
