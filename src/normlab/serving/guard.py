"""Around the application: headers for every answer, limits for every request's body."""

import asyncio
import time
from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from normlab.serving.limits import Limits

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
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
RETRY = {"Retry-After": "1"}


class Guard:
    """Middleware that keeps `Limits`; one object counts for the whole server."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app = app
        self.limits = limits
        self.requests = 0  # under way that have a body
        self.buffered = 0  # bytes of their bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        if not has_body:
            await self.app(scope, receive, _with_headers(send))
            return
        body = _Body(self, receive, send)
        refusal = self._refusal(headers)
        self.requests += 1
        try:
            await (refusal or self.app)(scope, body.receive, _with_headers(body.send))
        finally:
            self.requests -= 1
            self.buffered -= body.length

    def _refusal(self, headers: Headers) -> JSONResponse | None:
        """The answer to a request that is not even read."""
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self.limits.body_bytes:
            return JSONResponse({"detail": too_large(self.limits)}, 413)
        if self.requests >= self.limits.requests:
            detail = f"{self.requests} requests are under way; try again later"
            return JSONResponse({"detail": detail}, 429, headers=RETRY)
        return None


class _Body:
    """One request's body: how much has come, how fast, and whether that was all."""

    def __init__(self, guard: Guard, receive: Receive, send: Send) -> None:
        self.length = 0
        self.complete = False
        self._guard = guard
        self._receive = receive
        self._send = send
        self._started = time.monotonic()

    async def receive(self) -> Message:
        """The next piece.

        Raises:
            HTTPException: 408 it is slow, 413 it is too long, 429 the server holds too much.
        """
        limits = self._guard.limits
        if self.complete:
            return await self._receive()
        left = limits.body - (time.monotonic() - self._started)
        try:
            async with asyncio.timeout(max(0, min(limits.pause, left))):
                message = await self._receive()
        except TimeoutError:
            detail = f"the body came too slowly: {self.length:,} bytes so far; send it faster"
            raise HTTPException(408, detail) from None
        if message["type"] == "http.request":
            self._take(len(message["body"]))
        self.complete = not message.get("more_body", False)
        return message

    def _take(self, count: int) -> None:
        guard = self._guard
        self.length += count
        guard.buffered += count
        if self.length > guard.limits.body_bytes:
            raise HTTPException(413, too_large(guard.limits))
        if guard.buffered > guard.limits.buffered_bytes:
            detail = "too much is being received at the moment; try again later"
            raise HTTPException(429, detail, RETRY)

    async def send(self, message: Message) -> None:
        """Send; what is answered before its end is read to the end first, within bounds.

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
            await self._linger()
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _linger(self) -> None:
        limits, read = self._guard.limits, 0
        try:
            async with asyncio.timeout(limits.linger):
                while not self.complete and read <= limits.body_bytes:
                    message = await self._receive()
                    read += len(message.get("body", b""))
                    self.complete = not message.get("more_body", False)
        except TimeoutError:
            return


def too_large(limits: Limits) -> str:
    """Say how large a body may be."""
    megabytes = limits.body_bytes / 1e6
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
