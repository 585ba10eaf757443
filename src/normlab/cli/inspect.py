"""`normlab inspect`: what the layers saw, and what normalisation does to the loss around them."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from normlab.cli.options import refuse
from normlab.cli.output import say

if TYPE_CHECKING:
    from normlab.runs import Run

_OF_LANDSCAPES = {"seeds", "points", "steps", "images", "threads", "data"}


@click.command()
@click.argument("run", required=False)
@click.argument("other", required=False)
@click.option(
    "--landscape", is_flag=True, help="Replay RUN with and without normalisation; see docs."
)
@click.option("--seeds", type=int, default=3, show_default=True, help="For --landscape.")
@click.option("--points", type=int, default=50, show_default=True, help="For --landscape.")
@click.option("--steps", type=int, help="For --landscape: replay only so many.")
@click.option("--images", type=int, default=128, show_default=True, help="For --landscape.")
@click.option("--threads", type=int, help="For --landscape; all cores by default.")
@click.option("--data", metavar="DATA", help="For --landscape: where the run's images are now.")
@click.pass_context
def inspect(
    context: click.Context,
    /,
    run: str | None,
    other: str | None,
    landscape: bool,
    seeds: int,
    points: int,
    steps: int | None,
    images: int,
    threads: int | None,
    data: str | None,
) -> None:
    """Show what the layers of RUN (by default the latest) saw, and of OTHER beside it.

    RUN was trained with --record, or is a folder of normlab.watch. The pictures and a page with a
    slider go into RUN/inspect.
    """
    if not landscape:
        refuse(context, "only --landscape has that", _OF_LANDSCAPES)
    from normlab.inspection.inspected import open_recorded
    from normlab.reports.inspection_report import inspect as look

    opened = open_recorded(run)
    if landscape:
        if other is not None:
            raise click.UsageError("--landscape takes one run: it makes the other arm itself")
        if isinstance(opened, Path):
            raise click.UsageError(
                "--landscape replays a run of normlab's own; for your own training see "
                "normlab.walk in docs/your-own-training.md"
            )
        _landscape(opened, data, seeds, points, steps, images, threads)
        return
    seen = look(opened) if other is None else look(opened, open_recorded(other))
    folder = (opened if isinstance(opened, Path) else opened.path) / "inspect"
    seen.write(folder)
    say(seen)
    say(f"Report: {folder / 'report.html'}")


def _landscape(
    run: "Run",
    data: str | None,
    seeds: int,
    points: int,
    steps: int | None,
    images: int,
    threads: int | None,
) -> None:
    from normlab.core.environment import resolve_threads
    from normlab.core.files import write_json
    from normlab.core.places import make_folder
    from normlab.inspection.landscape import explore
    from normlab.reports.inspection_plots import draw_landscape
    from normlab.reports.inspection_report import save_figure
    from normlab.reports.plots import safely

    found = explore(
        run.task,
        run.task.load(data),
        seeds=seeds,
        points=points,
        steps=steps,
        batch=images,
        threads=resolve_threads(threads),
        report=say,
    )
    folder: Path = run.path / "inspect"
    make_folder(folder)
    write_json(folder / "landscape.json", found.as_dict())
    fig = safely("the landscape", lambda: draw_landscape(found))
    drawn = None if fig is None else save_figure(fig, folder / "landscape")
    say(str(found))
    if drawn is not None:
        say(f"Picture: {folder / 'landscape.png'}")
