"""From a model to a running server, and back to the command line when it is told to end."""

import logging
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import FrameType

from normlab.errors import UserError
from normlab.serving.limits import Limits

MODULES = ("fastapi", "uvicorn", "python_multipart", "onnxruntime")
GRACE = 10  # seconds for answers that are under way when the server is told to end


def serve(
    path: str | Path | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    limits: Limits | None = None,
    say: Callable[[str], object] = print,
) -> None:
    """Serve the model at `path` until SIGINT or SIGTERM.

    Both end it in good order: requests under way are answered first. After SIGINT
    `KeyboardInterrupt` is raised, after SIGTERM `SystemExit(143)`.

    Args:
        path: a run's folder or an exported ONNX file; by default the latest run.
        port: 0 takes a free one.
        say: is given a line on the model and one with the address.

    Raises:
        UserError: an address that cannot be had, or no such model.
    """
    _require_packages()
    import uvicorn

    from normlab.serving.app import create_app
    from normlab.serving.model import open_served
    from normlab.serving.protocol import limited

    limits = limits or Limits()
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # who sent a bad body is told
    # uvicorn raises the signal again when it has ended; a shell's background has SIGINT ignored.
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with closing(_listen(host, port)) as listener:
        model = open_served(path)
        say(f"Model {model.name}: {model.checked}.")
        config = uvicorn.Config(
            create_app(
                model, limits, lambda: say(f"Serving at {_address(listener)} (Ctrl-C ends it)")
            ),
            http=limited(limits),
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=GRACE,
        )
        uvicorn.Server(config).run(sockets=[listener])


def _require_packages() -> None:
    if sys.platform == "win32":
        raise UserError("serve bounds its decoders by Unix limits, which Windows has not: use WSL")
    from importlib.util import find_spec

    for module in MODULES:
        if find_spec(module) is None:
            raise UserError(f"serve needs the package {module}: pip install 'normlab[serve]'")


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
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise UserError(
            f"port {port} of {host} cannot be had ({error.strerror}): "
            "choose another with --port, or --port 0 for any that is free"
        ) from None
    return listener


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _leave(signum: int, _: FrameType | None) -> None:
    raise SystemExit(128 + signum)
