"""What the commands print."""

import click

from normlab.text import printable_lines


def say(what: object = "", *, err: bool = False) -> None:
    """Print lines for people. Names in them come from data and models: a terminal only shows them.

    JSON is for programs, has its own escapes, and goes through `click.echo`.
    """
    click.echo(printable_lines(str(what)), err=err)
