"""`normlab curve`: would more pictures help?"""

import json
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
    from normlab.study.learning_curve import Point


@click.command(cls=RecipeCommand)
@click.argument("recipe", required=False)
@DATA
@IMAGE_SIZE
@SKIP_BAD
@GROUP_BY
@click.option(
    "--shares",
    default="25,50,100",
    show_default=True,
    metavar="PERCENT,…",
    help="Shares of the training pictures; 100 is one of them.",
)
@click.option(
    "--seeds", type=click.IntRange(1), default=3, show_default=True, help="Of each share."
)
@click.option("--threads", type=int, help="CPU threads; all cores by default.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="A folder for the runs; those that are there are not trained again.",
)
@JSON
@recipe_options
def curve(
    recipe: str | None,
    data: str | None,
    image_size: int | None,
    skip_bad: bool,
    group_by: str | None,
    shares: str,
    seeds: int,
    threads: int | None,
    out: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Say whether more pictures would help: train RECIPE on a quarter, a half and all of them.

    Each training takes as many steps as the one on all pictures, so --patience is refused. The
    errors are continued to twice as many pictures, with the spread over the seeds.
    """
    from normlab.api.curve import learning_curve

    def told(point: "Point") -> None:
        say(
            f"{point.pictures:,} pictures, seed {point.seed}: test accuracy {point.accuracy:.4f}",
            err=True,
        )

    found = learning_curve(
        recipe,
        data=data,
        shares=_shares(shares),
        seeds=seeds,
        out=out,
        image_size=image_size,
        skip_bad=skip_bad,
        group_by=group_by,
        threads=threads,
        settings=given_settings(settings),
        told=told,
    )
    for line in found.lines():
        say(line)
    say(f"Figure: {Path(found.points[0].run).with_name('curve.png')}")
    if as_json:
        click.echo(json.dumps(found.as_dict()))


def _shares(text: str) -> list[float]:
    try:
        return [float(word) / 100 for word in text.split(",")]
    except ValueError:
        raise click.UsageError(f"--shares {text}: give percentages, as in 25,50,100") from None
