"""`normlab doctor` and `normlab recalibrate`."""

import json
import shutil

import click

from normlab.cli.options import WEIGHTS
from normlab.cli.output import say
from normlab.text import shell

DATA = click.option("--data", metavar="DATA", help="As `normlab train --data` takes it.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@click.command()
@click.argument("path")
@DATA
@WEIGHTS
@JSON
def doctor(path: str, data: str | None, weights: str, as_json: bool) -> None:
    """Say what is wrong with a batch-normalised model, where, how bad, and what to do.

    PATH is a run's folder, or a file: of torch.save or TorchScript, safetensors, of Keras (.keras,
    .h5), an ONNX graph. A run's network is run on its own images, too, if they are at
    hand, or on those of --data. Exit code 1 if
    anything is serious, or no batch normalisation was found or could be read.
    """
    from normlab.diagnosis import doctor

    diagnosis = doctor(path, data, weights=weights)
    if as_json:
        click.echo(json.dumps(diagnosis.as_dict()))
    else:
        say(diagnosis.text(min(shutil.get_terminal_size().columns, 100)))
    if diagnosis.serious:
        click.get_current_context().exit(1)


@click.command()
@click.argument("run", required=False)
@DATA
@JSON
def recalibrate(run: str | None, data: str | None, as_json: bool) -> None:
    """Give RUN (by default the latest) the statistics of all training images of its data.

    With --data those of other images: the network adapts to them without their labels. The result
    is a further set of weights, `recalibrated`; the run's own stay as they are. A run that keeps
    recalibrated weights already is refused.
    """
    from normlab.evaluation.recalibration import recalibrate
    from normlab.runs import open_run

    opened = open_run(run)
    done = recalibrate(opened, data)
    if as_json:
        click.echo(json.dumps(done))
        return
    say(f"Statistics of {done['images']:,} images of {done['data']} written to")
    say(f"  {opened.path / 'recalibrated.safetensors'}")
    say("Next:")
    command = ["normlab", "evaluate", str(opened.path), "--weights", "recalibrated"]
    say(f"  {shell(command)}")
