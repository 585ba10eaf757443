"""Connections that stall are ended, so that the others are answered.

uvicorn's own protocol speaks HTTP. It has no limit of time for a client that does not send its
request or does not read its answer. A `Connection` stands between that protocol and the socket,
passes everything on, and ends what stalls. Only what asyncio and ASGI document is used of both.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from typing import Any

from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from normlab.serving.settings import ServerSettings

# Read so little at a time of what may be thousands of tiny chunks or requests: h11 needs some
# 0.1 ms for each, and nobody else is answered meanwhile.
_HEAD_READ = 1024
_BODY_READ = 256 * 1024
_DRAINED = 64 * 1024  # bytes that a client has to take of an answer within `pause`
_YOUNG = 1.0  # seconds for which a waiting connection does not make room for another


class Doing(Enum):
    """What a connection is doing."""

    WAITING = "for a request's first lines"
    RECEIVING = "a request's body"
    ANSWERING = "a request that has come in whole"


class Connections:
    """All open connections of a server."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.open: set[Connection] = set()
        self.ending = False
        self._buffer = memoryview(bytearray(_BODY_READ))  # read and passed on in one step

    def protocol(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> "Connection":
        """Make the protocol of a new connection, as uvicorn asks for it."""
        connection = Connection(self, self._buffer)
        # ASGI gives this to each request as `scope["state"]`.
        state = {**app_state, "connection": connection}
        connection.http = H11Protocol(config, server_state, state, _loop)
        return connection

    def admit(self, new: "Connection") -> bool:
        """Take a connection in. If there are too many, the one that has idled longest goes."""
        if len(self.open) >= self.settings.connections:
            before = asyncio.get_running_loop().time() - _YOUNG
            idle = [c for c in self.open if c.idle_since < before]
            if not idle:
                return False
            min(idle, key=lambda c: c.idle_since).abort()
        self.open.add(new)
        return True

    def end(self) -> None:
        """The server ends: who does not send or read gets a last moment, `linger`."""
        self.ending = True
        loop = asyncio.get_running_loop()
        for connection in self.open:
            loop.call_later(self.settings.linger, connection.abort_unless_answering)


class Connection(asyncio.BufferedProtocol):
    """One client's connection.

    idle_since: when it began to wait for the client, on the loop's clock; infinity while the
        server is at work for it.
    """

    http: H11Protocol
    transport: asyncio.Transport

    def __init__(self, connections: Connections, buffer: memoryview) -> None:
        self._all = connections
        self._settings = connections.settings
        self._buffer = buffer
        self._loop = asyncio.get_running_loop()
        self._doing = Doing.WAITING
        self._silent = True
        self._head: asyncio.TimerHandle | None = None
        self._reader: asyncio.TimerHandle | None = None
        self._discarding = False
        self._discarded = 0
        self._closed = asyncio.Event()
        self.idle_since = self._loop.time()

    # What asyncio tells.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        if not self._all.admit(self):
            detail = "too many connections; try again later"
            self._refuse("429 Too Many Requests", detail, "Retry-After: 1\r\n")
            return
        # So that asyncio tells as soon as anything waits to be read by the client.
        transport.set_write_buffer_limits(high=0)
        self.http.connection_made(transport)
        self._wait()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer[: _HEAD_READ if self._doing is Doing.WAITING else _BODY_READ]

    def buffer_updated(self, nbytes: int) -> None:
        if self._discarding or self.transport.is_closing():
            self._discarded += nbytes
            return
        if self._silent:
            self._silent = False
            self._wait()
        self.http.data_received(bytes(self._buffer[:nbytes]))

    def eof_received(self) -> None:
        if self.http.transport is not None:
            self.http.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._all.open.discard(self)
        self._closed.set()
        for timer in (self._head, self._reader):
            if timer is not None:
                timer.cancel()
        if self.http.transport is not None:
            self.http.connection_lost(exc)

    def pause_writing(self) -> None:
        self.http.pause_writing()
        self.idle_since = min(self.idle_since, self._loop.time())
        self._reader = self._loop.call_later(self._pause(), self._check_reader, self._unsent())

    def resume_writing(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            self._reader = None
        if self._doing is Doing.WAITING:
            self._wait()
        else:
            self.idle_since = float("inf")
        self.http.resume_writing()

    # What the application tells.

    @contextmanager
    def request(self, *, has_body: bool) -> Iterator[None]:
        """While a request is under way."""
        if self._head is not None:
            self._head.cancel()
        self._doing = Doing.RECEIVING if has_body else Doing.ANSWERING
        self.idle_since = float("inf")
        try:
            yield
        finally:
            if not self._closed.is_set():
                self._wait()

    def received(self) -> None:
        """The request has come in whole."""
        self._doing = Doing.ANSWERING

    async def discard(self, most: int) -> None:
        """Read and forget what the client sends, until it closes the connection.

        It ends after `most` bytes, too, and when nothing has come for `linger`.
        """
        self._discarding = True
        self.transport.resume_reading()
        until = self._loop.time() + self._settings.pause
        while not self._closed.is_set():
            before = self._discarded
            with suppress(TimeoutError):
                async with asyncio.timeout(self._settings.linger):
                    await self._closed.wait()
            if self._discarded == before or self._discarded > most or self._loop.time() > until:
                return

    @property
    def ending(self) -> bool:
        """Whether the server has been told to end."""
        return self._all.ending

    # How it ends.

    def abort(self) -> None:
        """Close at once, whatever has not been sent."""
        self.transport.abort()

    def abort_unless_answering(self) -> None:
        """Close at once if it is the client that is waited for."""
        if self._doing is not Doing.ANSWERING or self._unsent():
            self.abort()

    def _wait(self) -> None:
        """Begin to wait for a request."""
        if self._head is not None:
            self._head.cancel()
        self._doing = Doing.WAITING
        self.idle_since = self._loop.time()
        self._head = self._loop.call_later(self._settings.head, self._too_slow)

    def _too_slow(self) -> None:
        if self.transport.is_closing() or self._unsent():
            return  # `_check_reader` sees to it
        if self._silent:  # browsers open connections in advance, and some stay unused
            self.transport.close()
            return
        self._refuse("408 Request Timeout", "the request did not begin in time; send it faster")

    def _check_reader(self, before: int) -> None:
        """End a connection whose client has read next to nothing of its answer."""
        now = self._unsent()
        if now > before - _DRAINED:
            self.abort()
            return
        self._reader = self._loop.call_later(self._pause(), self._check_reader, now)

    def _pause(self) -> float:
        return min(self._settings.pause, self._settings.linger if self.ending else 1e9)

    def _unsent(self) -> int:
        return self.transport.get_write_buffer_size()

    def _refuse(self, status: str, detail: str, header: str = "") -> None:
        """Answer past h11, which may be in the middle of a request's head."""
        body = f'{{"detail": "{detail}"}}'
        self.transport.write(
            f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n{header}"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()
        )
        self.transport.close()
