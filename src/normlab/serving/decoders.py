"""Decoders in processes of their own: a hostile picture ends one of them, never the server."""

import asyncio
import logging
import os
import sys
from asyncio.subprocess import PIPE, Process
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from normlab.core.children import child_environment
from normlab.serving.decoder import ANSWER, REQUEST, Status
from normlab.serving.limits import Limits

logger = logging.getLogger(__name__)

_GRACE = 1.0  # seconds for a decoder to end by itself
_TOO_SLOW = "takes too long to decode; make it smaller, or save it anew as PNG or JPEG"


class RefusedError(Exception):
    """A picture that gets no answer; `status` is HTTP's, `detail` says why."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


@dataclass(frozen=True)
class Square:
    """What the network sees: pixels (S, S, 3) uint8, and as a PNG file if that was asked for."""

    pixels: NDArray[np.uint8]
    png: bytes


class Decoders:
    """A few decoding processes; one that dies or grows is replaced.

    Args:
        size: S of the squares.
        count: processes; by default one a core.
    """

    def __init__(self, size: int, limits: Limits, count: int | None = None) -> None:
        self._size = size
        self._limits = limits
        self._count = count or _cores()
        self._all: set[Process] = set()
        self._idle: asyncio.Queue[Process] = asyncio.Queue()
        self._replacing: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Start the processes."""
        for process in await asyncio.gather(*(self._spawn() for _ in range(self._count))):
            self._idle.put_nowait(process)

    async def close(self) -> None:
        """End the processes."""
        for task in self._replacing:
            task.cancel()
        await asyncio.gather(*self._replacing, return_exceptions=True)
        await asyncio.gather(*(self._end(process) for process in list(self._all)))

    async def decode(self, content: bytes | bytearray, *, as_png: bool = False) -> Square:
        """Decode a file.

        Raises:
            RefusedError: 413 if it is too large in pixels, memory or time, 415 if it is no
                picture that can be read, 429 if no decoder came free in time.
        """
        try:
            async with asyncio.timeout(self._limits.wait):
                process = await self._idle.get()
        except TimeoutError:
            raise RefusedError(429, "all decoders are busy; try again later") from None
        usable = False
        try:
            async with asyncio.timeout(self._limits.decode_wall):
                status, spent, body, png = await _ask(process, content, as_png)
            usable = not spent
        except (TimeoutError, EOFError, OSError):
            raise RefusedError(413, _TOO_SLOW) from None
        finally:
            if usable:
                self._idle.put_nowait(process)
            else:
                self._replace(process)
        if status != Status.DECODED:
            raise RefusedError(413 if status == Status.TOO_LARGE else 415, body.decode())
        shape = (self._size, self._size, 3)
        return Square(np.frombuffer(body, np.uint8).reshape(shape), png)

    def _replace(self, process: Process) -> None:
        task = asyncio.create_task(self._replacement(process))
        self._replacing.add(task)
        task.add_done_callback(self._replacing.discard)

    async def _replacement(self, process: Process) -> None:
        await self._end(process)
        while True:
            try:
                self._idle.put_nowait(await self._spawn())
                return
            except (
                OSError,
                EOFError,
            ) as error:  # no memory or no process to be had; there may be soon
                logger.error("no new decoder (%s); trying again", error)
                await asyncio.sleep(1)

    async def _spawn(self) -> Process:
        limits = self._limits
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "normlab.serving.decoder"),
            *map(str, (self._size, limits.decode_cpu, limits.decode_memory)),
            stdin=PIPE,
            stdout=PIPE,
            env=_ENVIRONMENT | child_environment(),
        )
        self._all.add(process)
        await _ask(process, b"", False)  # until it is ready
        return process

    async def _end(self, process: Process) -> None:
        # Its input's end ends it, if it has not died of a picture. To kill what has died already
        # would take its exit code from asyncio, which would then write a warning.
        assert process.stdin is not None
        process.stdin.close()
        try:
            async with asyncio.timeout(_GRACE):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
        self._all.discard(process)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# One thread a decoder, and large blocks of memory given back to the system when they are freed.
_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "1048576",
}


async def _ask(
    process: Process, content: bytes | bytearray, as_png: bool
) -> tuple[int, bool, bytes, bytes]:
    """Status, whether the process is spent, pixels or message, PNG."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.writelines((REQUEST.pack(as_png, len(content)), content))  # one system call
    await process.stdin.drain()
    status, spent, length, png = ANSWER.unpack(await process.stdout.readexactly(ANSWER.size))
    body = await process.stdout.readexactly(length + png)
    return status, spent, body[:length], body[length:]
