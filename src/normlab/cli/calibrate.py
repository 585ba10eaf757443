"""`normlab calibrate`: learn from pictures that a run never saw when it is not sure."""

import json

import click

from normlab.cli.options import JSON
from normlab.cli.output import say


@click.command()
@click.argument("run", required=False)
@click.option(
    "--on", metavar="DATA", help="Labelled pictures that it never saw, such as a folder of them."
)
@click.option("--data", metavar="DATA", help="Where the run's own data are now.")
@JSON
def calibrate(run: str | None, on: str | None, data: str | None, as_json: bool) -> None:
    """Learn when RUN (by default the latest) is not sure, from pictures it did not learn from.

    Training does so by itself where it held out pictures. This does it again, for a run of an
    earlier release, or with pictures from elsewhere. It writes the temperature of the
    probabilities, and what "not sure" is measured by, into the run's folder.
    """
    from normlab.api.run import open_run
    from normlab.evaluation import held_out

    opened = open_run(run)
    doubt = held_out.relearn(opened, on, data=data)
    assert doubt.before is not None
    assert doubt.after is not None
    say(f"Learnt from {doubt.total:,} pictures, {sum(doubt.right):,} answered rightly")
    say(f"Temperature: {doubt.temperature:.3f}")
    for name, scores in (("before", doubt.before), ("after", doubt.after)):
        say(
            f"  {name + ':':<8}calibration error {scores['error']:.4f}, "
            f"Brier {scores['brier']:.4f}, loss {scores['loss']:.4f}"
        )
    if not doubt.tells_unlike:
        say("Note: too few to tell pictures that are unlike them; it takes 19")
    if as_json:
        click.echo(json.dumps({**doubt.as_dict(), "run": str(opened.path)}))
