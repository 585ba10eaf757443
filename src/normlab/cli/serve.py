"""`normlab serve`: a page and an HTTP interface to try a model on."""

import ipaddress

import click

from normlab.cli.options import ABSTAIN_AT, VIEWS
from normlab.cli.output import say
from normlab.core.descriptors import open_standard_streams


@click.command()
@click.argument("model", metavar="[RUN|MODEL.onnx]", required=False)
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen at.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="0 takes a free one.",
)
@click.option(
    "--allow-host",
    "allow_hosts",
    metavar="NAME",
    multiple=True,
    help="A name under which the server answers, beside localhost and --host. May be repeated.",
)
@VIEWS
@ABSTAIN_AT
@click.option("--always", is_flag=True, help="Always answer, however unsure it is.")
def serve(
    model: str | None,
    host: str,
    port: int,
    allow_hosts: tuple[str, ...],
    views: str,
    abstain_at: float | None,
    always: bool,
) -> None:
    """Serve RUN (by default the latest) or MODEL.onnx: a page to drop pictures on, and HTTP.

    Only this machine reaches it, unless --host says otherwise. Ctrl-C and SIGTERM end it once the
    requests under way are answered; the exit code is 130 or 143.
    """
    if always and abstain_at is not None:
        raise click.UsageError("--always cannot be combined with --abstain-at")
    if views != "single" and abstain_at is not None:
        raise click.UsageError("--abstain-at holds for single views: leave out --views")
    open_standard_streams()
    from normlab.serving.server import serve as run_server

    if not _is_loopback(host):
        say(
            f"Note: {host} can be reached from other machines, and there is no password "
            "and no encryption (docs/serve.md)",
            err=True,
        )
    run_server(
        model,
        host=host,
        port=port,
        allow_hosts=allow_hosts,
        views=views,
        abstain_at=None if abstain_at is None else abstain_at / 100,
        always=always,
        say=say,
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
