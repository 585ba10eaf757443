"""Around the application: whom it answers, headers for every answer, limits for every body."""

import asyncio
import time
from collections.abc import Iterable, MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from normlab.serving.connections import Connection
from normlab.serving.settings import ServerSettings

# The page's own files and nothing else; no frame may hold it.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), geolocation=(), microphone=()",
}
RETRY = {"Retry-After": "1"}
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
_SMALL = 1_000_000  # bytes of a body that large ones leave room for


class Guard:
    """Middleware that keeps `ServerSettings`; one object counts for the whole server.

    Args:
        hosts: names, as a browser's address line has them, under which the server answers.
            Without this, a website could have its own name lead to this machine, and read.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, hosts: Iterable[str]) -> None:
        self.app = app
        self.settings = settings
        self.hosts = frozenset(host.lower() for host in hosts)
        self.requests = 0  # under way that have a body
        self.held = 0  # bytes of their bodies, received or announced
        self._room = asyncio.Condition()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        connection: Connection = scope["state"]["connection"]
        chunked = "transfer-encoding" in headers
        length = int(headers.get("content-length", "0"))  # h11 has refused what is no number
        has_body = chunked or length > 0
        with connection.request(has_body=has_body):
            refusal = self._refusal(headers, length, chunked)
            if not has_body:
                await (refusal or self.app)(scope, receive, _with_headers(send))
                return
            body = _Body(self.settings, connection, length, receive, send)
            self.requests += 1
            held = False
            try:
                if refusal is None:
                    held = await self._wait_for_room(length)
                    refusal = None if held else _busy("too much is being received at the moment")
                await (refusal or self.app)(scope, body.receive, _with_headers(body.send))
            finally:
                self.requests -= 1
                if held:
                    await self._give_room(length)

    def _refusal(self, headers: Headers, length: int, chunked: bool) -> JSONResponse | None:
        """The answer to a request whose body is not even read."""
        if host_name(headers.get("host", "")) not in self.hosts:
            detail = "this server does not answer under that name; allow it with --allow-host NAME"
            return JSONResponse({"detail": detail}, 421)
        if chunked:  # a million pieces of one byte would take minutes to put together
            detail = "send the body's length (Content-Length), not pieces of unknown length"
            return JSONResponse({"detail": detail}, 411)
        if length > self.settings.body_bytes:
            return JSONResponse({"detail": _too_large(self.settings)}, 413)
        if length and self.requests >= self.settings.requests:
            return _busy(f"{self.requests} requests are under way")
        return None

    async def _wait_for_room(self, length: int) -> bool:
        """Hold room for a body. Its client is not read from until then."""
        room = self.settings.buffered_bytes
        if length > _SMALL:  # a few large bodies that come slowly shall not lock out all small ones
            room = room * 3 // 4
        try:
            async with asyncio.timeout(self.settings.wait), self._room:
                await self._room.wait_for(lambda: self.held + length <= room)
        except TimeoutError:
            return False
        self.held += length
        return True

    async def _give_room(self, length: int) -> None:
        self.held -= length
        async with self._room:
            self._room.notify_all()


class _Body:
    """One request's body: how much has come, how fast, and whether that was all."""

    def __init__(
        self,
        settings: ServerSettings,
        connection: Connection,
        announced: int,
        receive: Receive,
        send: Send,
    ) -> None:
        self.length = 0
        self.complete = False
        self._settings = settings
        self._connection = connection
        self._announced = announced
        self._receive = receive
        self._send = send
        self._started: float | None = None

    async def receive(self) -> Message:
        """The next piece.

        Raises:
            HTTPException: 408, it is slow.
        """
        if self.complete:
            return await self._receive()
        try:
            async with asyncio.timeout(self._patience()):
                message = await self._receive()
        except TimeoutError:
            detail = f"the body came too slowly: {self.length:,} bytes so far; send it faster"
            raise HTTPException(408, detail) from None
        if message["type"] == "http.request":
            self.length += len(message["body"])
        self.complete = not message.get("more_body", False)
        if self.complete:
            self._connection.received()
        return message

    def _patience(self) -> float:
        """Seconds that the next piece may take: each, and so that the whole is there in time."""
        settings, now = self._settings, time.monotonic()
        self._started = self._started or now
        share = self.length / max(1, self._announced)
        spent = now - self._started
        on_pace = settings.pause + settings.body * share - spent
        return max(0, min(settings.pause, on_pace, settings.body - spent))

    async def send(self, message: Message) -> None:
        """Send; the rest of a body that is answered before its end is thrown away first.

        Closing a connection on which bytes still arrive resets it, and the client would see that
        instead of the answer. So the answer goes out whole, and its end waits.
        """
        if self.complete:
            await self._send(message)
        elif message["type"] == "http.response.start":
            MutableHeaders(scope=message)["Connection"] = "close"
            await self._send(message)
        elif message.get("more_body", False):
            await self._send(message)
        else:
            await self._send({**message, "more_body": True})
            await self._connection.discard(self._settings.body_bytes)
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})


def host_name(header: str) -> str:
    """The name in a `Host` header, without its port.

    >>> host_name("Pictures.example:8000"), host_name("[::1]:80"), host_name("[::1]")
    ('pictures.example', '[::1]', '[::1]')
    """
    name, colon, port = header.lower().rpartition(":")
    return name if colon and port.isdecimal() else header.lower()


def _busy(what: str) -> JSONResponse:
    return JSONResponse({"detail": f"{what}; try again later"}, 429, headers=RETRY)


def _too_large(settings: ServerSettings) -> str:
    megabytes = settings.body_bytes / 1e6
    return f"more than {megabytes:g} MB in one request; send smaller pictures, or fewer at a time"


def _with_headers(send: Send) -> Send:
    async def sending(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers[name] = value
            headers.setdefault("Cache-Control", "no-store")
        await send(message)

    return sending
