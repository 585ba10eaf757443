"""`normlab compare`: a paired experiment, and its verdict."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normlab.cli.options import (
    DATA,
    IMAGE_SIZE,
    JSON,
    SKIP_BAD,
    RecipeCommand,
    given_settings,
    recipe_options,
)
from normlab.cli.output import say
from normlab.recipes import SETTINGS

if TYPE_CHECKING:
    from normlab.study.progress import Lines


@click.command(cls=RecipeCommand)
@click.argument("recipe", required=False)
@click.option("--arms", metavar="NORM,NORM,…", help="Normalisers to compare, the first with each.")
@click.option(
    "--arm",
    "described",
    multiple=True,
    metavar="'NAME: KEY=VALUE, …'",
    help="An arm that changes any settings of the recipe; repeat it for more.",
)
@click.option(
    "--contrast",
    "contrasts",
    multiple=True,
    metavar="FIRST,OTHER",
    help="Compare these two arms; repeat it. By default the first arm with each other one.",
)
@click.option("--seeds", type=int, help="Pairs; by default as many as can decide. More adds pairs.")
@click.option("--first-seed", type=int, default=0, show_default=True, help="Of the first pair.")
@click.option(
    "--tune",
    metavar="SETTING=F,F,…",
    help="First choose each arm's own value, such as learning_rate=0.3,1,3 (factors).",
)
@click.option("--margin", type=float, help="Points that count as no difference; 0.5 by default.")
@click.option(
    "--thresholds", metavar="A,A,…", help="Validation accuracies whose steps are counted."
)
@click.option("--checks", type=int, help="At least so many checks of validation a run; 10.")
@DATA
@IMAGE_SIZE
@SKIP_BAD
@click.option("--jobs", type=int, help="Runs side by side; cores ÷ threads by default.")
@click.option("--threads", type=int, help="CPU threads of each run; 1 by default.")
@click.option(
    "--scheduler", metavar="ADDRESS", help="Do the runs on this Dask scheduler's workers."
)
@click.option("--out", type=click.Path(path_type=Path), help="The study's folder.")
@click.option("--show", type=click.Path(path_type=Path), help="Print the study in this folder.")
@JSON
@recipe_options
@click.pass_context
def compare(
    context: click.Context,
    /,
    recipe: str | None,
    arms: str | None,
    described: tuple[str, ...],
    contrasts: tuple[str, ...],
    margin: float | None,
    thresholds: str | None,
    show: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Is one arm better than another on RECIPE, by how much, and how sure is that?

    Every arm is trained from the same seeds. Stop it when you like: the same command goes on.
    More --seeds add pairs, which counts as a further look at the data.
    """
    from normlab import recipes
    from normlab.api import compare as study

    if show is not None:
        _refuse_with_show(context)
        _close(study.open_study(show), as_json)
        return
    names = [] if arms is None else [name.strip() for name in arms.split(",")]
    if not names and not described:
        names = ["batch", "none"]
    settings = given_settings(options)
    given = {k: v for k, v in options.items() if v is not None and k not in SETTINGS}
    if margin is not None:
        given["margin"] = margin / 100
    if thresholds is not None:
        given["thresholds"] = _numbers(thresholds)
    result = study.compare(
        recipe or recipes.DEFAULT,
        arms=[*names, *described],
        contrasts=[_pair(text) for text in contrasts] or None,
        progress=_progress(),
        settings=settings,
        **given,
    )
    _close(result, as_json)
    if result.given_up:
        raise SystemExit(1)


def _pair(text: str) -> tuple[str, str]:
    first, _, other = (part.strip() for part in text.partition(","))
    return first, other


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r} is not numbers with commas between them") from None


def _refuse_with_show(context: click.Context) -> None:
    for name in context.params:
        given = context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE
        if given and name not in ("show", "as_json"):
            raise click.UsageError("--show only prints: give it no other option but --json")


def _progress() -> "Lines":
    from rich.console import Console

    from normlab.study.progress import Lines

    console = Console(stderr=True)
    return Lines(console if console.is_terminal and sys.stdout.isatty() else None)


def _close(result: Any, as_json: bool) -> None:
    from normlab.reports.study_report import closing_lines

    for line in closing_lines(result):
        say(line)
    if as_json:
        click.echo(json.dumps(result.as_dict()))
