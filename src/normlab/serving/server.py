"""Start a server for a model, and end it in good order."""

import asyncio
import errno
import logging
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from normlab.errors import UserError, install
from normlab.evaluation.doubt import NOTHING_HELD_OUT
from normlab.serving.settings import ServerSettings
from normlab.text import printable

MODULES = ("fastapi", "uvicorn", "python_multipart", "onnxruntime")
GRACE = 10  # seconds for answers that are under way when the server is told to end

# How many connections the kernel holds until they are taken, and asyncio takes in one go.
_BACKLOG = 128
_KERNEL_BUFFER = 256 * 1024
_OTHER_DESCRIPTORS = 64 + _BACKLOG  # what is open beside connections, and those just taken
_FEWEST_CONNECTIONS = 16


def serve(
    path: str | Path | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    allow_hosts: Iterable[str] = (),
    settings: ServerSettings | None = None,
    views: str = "single",
    abstain_at: float | None = None,
    always: bool = False,
    say: Callable[[str], object] = print,
) -> None:
    """Serve the model at `path` until SIGINT or SIGTERM.

    Both end it in good order: requests under way are answered first. After SIGINT
    `KeyboardInterrupt` is raised, after SIGTERM `SystemExit(143)`.

    Args:
        path: a run's folder or an exported ONNX file; by default the latest run.
        port: 0 takes a free one.
        allow_hosts: names under which the server answers, beside `host` and those of this machine
            itself: what a browser's address line has there, without the port.
        views: of each picture, by a run; see `normlab.evaluation.prediction.run_predictor`.
        abstain_at: the share of answers that shall be right; the others are "not sure". None for
            the rule of `Doubt.rule`.
        always: answer, however unsure it is.
        say: is given a line on the model and one with the address.

    Raises:
        UserError: an address that cannot be had, no such model, or too few file descriptors.
    """
    _require_packages()
    import uvicorn

    from normlab.serving.app import create_app
    from normlab.serving.connections import Connections
    from normlab.serving.decoders import Decoders
    from normlab.serving.guard import LOCAL_HOSTS
    from normlab.serving.model import open_served

    settings = _within_descriptors(settings or ServerSettings())
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # who sent a bad body is told
    logging.getLogger("uvicorn.error").addFilter(_worth_telling)
    # uvicorn raises the signal again when it has ended; a shell's background has SIGINT ignored.
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    names = [_name(given) for given in (host, *allow_hosts)]
    connections = Connections(settings)

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            connections.end()
            await super().shutdown(sockets)

    def ready() -> None:
        asyncio.get_running_loop().set_exception_handler(_LoopErrors())
        say(f"Serving at {_address(listener)} (Ctrl-C ends it)")

    with closing(_listen(host, port)) as listener:
        model = open_served(path, views)
        doubt = model.predictor.doubt
        reason = f": {model.reason}" if model.reason else ""
        say(printable(f"Model {model.name}: {model.checked}{reason}."))
        if views != "single":
            say(f"Views: {views}.")
        if doubt is None and abstain_at is not None:
            raise UserError(f"this model knows no doubt: {NOTHING_HELD_OUT}")
        rule = None if doubt is None or always else doubt.rule(abstain_at)
        say(f"Sure: {'always' if rule is None else rule.told()}.")
        with Decoders(model.predictor.image_size, settings) as decoders:
            hosts = (*LOCAL_HOSTS, *names)
            config = uvicorn.Config(
                create_app(model, decoders, settings, hosts=hosts, ready=ready, rule=rule),
                http=connections.protocol,  # type: ignore[arg-type]  # makes what a class would
                ws="none",
                loop="asyncio",
                lifespan="on",
                log_level="error",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=_BACKLOG,
                timeout_graceful_shutdown=GRACE,
            )
            Server(config).run(sockets=[listener])


def _require_packages() -> None:
    if sys.platform == "win32":
        raise UserError("serve bounds its decoders by Unix limits, which Windows has not: use WSL")
    from importlib.util import find_spec

    for module in MODULES:
        if find_spec(module) is None:
            raise UserError(f"serve needs the package {module}: {install('serve')}")


def _name(given: str) -> str:
    """A host's name or address as a `Host` header has it, without a port.

    Raises:
        UserError: it is a URL, a pattern, or empty.
    """
    from normlab.serving.guard import host_name

    name = f"[{given}]" if given.count(":") > 1 and not given.startswith("[") else host_name(given)
    if not re.fullmatch(r"[^\s/*@\[\]]+|\[[0-9a-fA-F:.%]+\]", name):
        raise UserError(f"host {given!r} is no name: give it alone, such as pictures.example")
    return name


def _listen(host: str, port: int) -> socket.socket:
    """Take the address before anything slow; who connects waits until the model is ready."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    except (socket.gaierror, UnicodeError) as error:
        raise UserError(f"host {host!r} is not known ({error}): try 127.0.0.1") from None
    family, kind, protocol, _, address = found[0]
    # With its protocol named: asyncio turns off Nagle's delay of 40 ms for TCP only.
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Each connection inherits these. What the kernel holds of answers that nobody reads, and of
        # bodies that wait for their turn, would otherwise be megabytes a connection.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _KERNEL_BUFFER)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _KERNEL_BUFFER)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise UserError(
            f"port {port} of {host} cannot be had ({error.strerror}): "
            "choose another with --port, or --port 0 for any that is free"
        ) from None
    return listener


def _within_descriptors(settings: ServerSettings) -> ServerSettings:
    """As many connections as there can be file descriptors for, raising their limit if need be.

    Raises:
        UserError: there are too few for a server.
    """
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = settings.connections + _OTHER_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft - _OTHER_DESCRIPTORS < min(_FEWEST_CONNECTIONS, settings.connections):
            raise UserError(
                f"this process may open {soft} files, which is too few for a server: "
                f"raise the limit (`ulimit -Hn {wanted}`)"
            )
        return replace(settings, connections=min(settings.connections, soft - _OTHER_DESCRIPTORS))
    return settings


class _LoopErrors:
    """What asyncio could not do, in a line and not in thousands.

    Out of descriptors, asyncio of Python 3.11 reports each connection that it cannot take, with a
    traceback, as fast as it can.
    """

    _EVERY = 60.0  # seconds between two lines

    def __init__(self) -> None:
        self._next = 0.0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in _NOTHING_LEFT:
            loop.default_exception_handler(context)
            return
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + self._EVERY
            logging.getLogger(__name__).error(
                "no connection can be taken at the moment (%s); trying again", error.strerror
            )


_NOTHING_LEFT = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def _worth_telling(record: logging.LogRecord) -> bool:
    """Whether uvicorn's report is news: not that the server's end has cut a request off."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _leave(signum: int, _: FrameType | None) -> None:
    raise SystemExit(128 + signum)
