"""`normlab compare`: a paired experiment, and its verdict."""

import json
import sys
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
    refuse,
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
    help="An arm that changes settings of the recipe, image_size, or the run it starts from; "
    "repeat it for more.",
)
@click.option(
    "--contrast",
    "contrasts",
    multiple=True,
    metavar="FIRST,OTHER",
    help="Compare these two arms; repeat it. By default the first arm with each other one.",
)
@click.option(
    "--command",
    metavar="'… {norm} … {seed}'",
    help="Compare runs of this command instead of a recipe; each --arm fills the placeholders.",
)
@click.option(
    "--metric", metavar="NAME", help="The number that decides, in the run's last line of JSON."
)
@click.option(
    "--result", metavar="FILE:KEY", help="The number is in this file; FILE may have {out}."
)
@click.option(
    "--pattern", metavar="REGEX", help="The number is what this last found in the output."
)
@click.option("--lower-is-better", is_flag=True, help="As of a loss.")
@click.option(
    "--diverged",
    type=float,
    metavar="VALUE",
    help="What a run counts as that fails, takes too long or gives NaN; else the study stops.",
)
@click.option("--time-limit", type=float, metavar="SECONDS", help="After which a run is ended.")
@click.option("--check-repeat", is_flag=True, help="Make the first run twice: does the seed hold?")
@click.option("--shell", is_flag=True, help="Let /bin/sh read the command; values are quoted.")
@click.option("--seeds", type=int, help="Pairs; by default as many as can decide. More adds pairs.")
@click.option("--first-seed", type=int, default=0, show_default=True, help="Of the first pair.")
@click.option(
    "--tune",
    metavar="SETTING=F,F,…",
    help="First choose each arm's own value, such as learning_rate=0.3,1,3 (factors).",
)
@click.option(
    "--outcome",
    type=click.Choice(["accuracy", "balanced_accuracy", "macro_f1", "loss"]),
    help="What decides; accuracy by default.",
)
@click.option(
    "--margin",
    type=float,
    help="What counts as no difference: points (0.5); of a loss, or of a command (none), in its "
    "own unit.",
)
@click.option(
    "--thresholds", metavar="A,A,…", help="Validation accuracies whose steps are counted."
)
@click.option("--checks", type=int, help="At least so many checks of validation a run; 10.")
@DATA
@IMAGE_SIZE
@SKIP_BAD
@GROUP_BY
@click.option(
    "--jobs", type=int, help="Runs side by side; cores ÷ threads by default, one of a command."
)
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

    With --command each run is any program of yours, which gives a number:

    normlab compare --command 'python train.py --norm {norm} --seed {seed}'
    --arm 'batch: norm=batch' --arm 'none: norm=none' --metric test_accuracy
    """
    if show is not None:
        from normlab.api.studies import open_study

        _refuse_with_show(context)
        _close(open_study(show), as_json)
        return
    given = {k: v for k, v in options.items() if v is not None and k not in SETTINGS}
    given["contrasts"] = [_pair(text) for text in contrasts] or None
    given["progress"] = _progress()
    if margin is not None:
        given["margin"] = margin
    if options["command"] is not None:
        from normlab.api.measured import compare_command

        refuse(context, "--command has no recipe", _OF_RECIPES | set(SETTINGS))
        result: Any = compare_command(arms=described, **_without(given, _OF_RECIPES))
    else:
        from normlab.api.compare import compare as compare_recipe

        refuse(context, "only --command has that", _OF_COMMANDS)
        names = [] if arms is None else [name.strip() for name in arms.split(",")]
        if not names and not described:
            names = ["batch", "none"]
        if margin is not None and options["outcome"] != "loss":
            given["margin"] = margin / 100
        if thresholds is not None:
            given["thresholds"] = _numbers(thresholds)
        result = compare_recipe(
            recipe,
            arms=[*names, *described],
            settings=given_settings(options),
            **_without(given, _OF_COMMANDS),
        )
    _close(result, as_json)
    if result.given_up or not result.decided:
        context.exit(1)


_OF_RECIPES = {
    *("recipe", "arms", "tune", "outcome", "thresholds", "checks"),
    *("data", "image_size", "skip_bad", "group_by"),
}
_OF_COMMANDS = {
    *("command", "metric", "result", "pattern", "lower_is_better", "diverged", "time_limit"),
    *("check_repeat", "shell"),
}


def _without(given: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in names}


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
    from normlab.study.progress import Lines

    if not (sys.stderr.isatty() and sys.stdout.isatty()):
        return Lines()
    from rich.console import Console

    console = Console(stderr=True)
    return Lines(console if console.is_terminal else None)


def _close(result: Any, as_json: bool) -> None:
    from normlab.api.studies import closing_lines

    for line in closing_lines(result):
        say(line)
    if as_json:
        click.echo(json.dumps(result.as_dict()))
