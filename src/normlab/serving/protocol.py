"""Uvicorn's HTTP/1.1, with an end to requests that never begin and to ever more connections."""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

from normlab.serving.limits import Limits


def limited(limits: Limits) -> type[H11Protocol]:
    """A protocol class that keeps `limits.head` and `limits.connections`."""

    class LimitedProtocol(H11Protocol):
        _head: asyncio.TimerHandle | None = None
        _silent = True

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                detail = "too many connections; try again later"
                self._refuse("429 Too Many Requests", detail, "Retry-After: 1\r\n")
                return
            self._head = self.loop.call_later(limits.head, self._too_slow)

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            self._silent = False
            super().data_received(data)
            waiting = self.cycle is None or self.cycle.response_complete
            if not waiting:
                self._stop()
            elif self._head is None and not self.transport.is_closing():
                self._head = self.loop.call_later(limits.head, self._too_slow)

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            super().connection_lost(exc)

        def _stop(self) -> None:
            if self._head is not None:
                self._head.cancel()
                self._head = None

        def _too_slow(self) -> None:
            if self._silent:  # browsers open connections in advance, and some stay unused
                self.transport.close()
                return
            self._refuse("408 Request Timeout", "the request did not begin in time; send it faster")

        def _refuse(self, status: str, detail: str, header: str = "") -> None:
            """Answer past h11, which may be in the middle of a request's head."""
            body = f'{{"detail": "{detail}"}}'
            self.transport.write(
                f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n{header}"
                f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()
            )
            self.transport.close()

    return LimitedProtocol
