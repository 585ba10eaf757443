"""Decoders in processes of their own: a hostile picture ends one of them, never the server."""

import asyncio
import logging
import signal
import time
from concurrent.futures import ThreadPoolExecutor

from normlab.core.cores import cores
from normlab.core.sandbox import DeathError, LimitError, Worker
from normlab.errors import DataError, TooLargeError, UserError
from normlab.serving.decoder import Square, decode_square, load_formats
from normlab.serving.settings import ServerSettings

logger = logging.getLogger(__name__)

_TOO_SLOW = "takes too long to decode; make it smaller, or save it anew as PNG or JPEG"
_AGAIN = 1.0  # seconds between two tries to start a decoder
_TRIES = 2  # of a picture whose decoder was killed from outside


class RefusedError(Exception):
    """A picture that gets no answer; `status` is HTTP's, `detail` says why."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


class Decoders:
    """A few decoding processes; one that dies or grows is replaced.

    Each is a `Worker`, and a thread waits for its answer. Use it as a context manager.

    Args:
        size: S of the squares.
        count: processes; by default one a core.
    """

    def __init__(self, size: int, settings: ServerSettings, count: int | None = None) -> None:
        self._size = size
        self._settings = settings
        count = count or cores()
        self._workers = [
            Worker(
                # The process holds the file while it decodes.
                memory=settings.decode_memory - settings.file_bytes,
                seconds=None,  # the event loop watches the clock, without a thread a call
                cpu_seconds=settings.decode_cpu,
            )
            for _ in range(count)
        ]
        self._threads = ThreadPoolExecutor(count)
        self._idle: asyncio.Queue[Worker] = asyncio.Queue()
        self._closed = False

    def __enter__(self) -> "Decoders":
        """Start the processes.

        Raises:
            UserError: one cannot be started.
        """
        try:
            for _ in self._threads.map(self._start, self._workers):
                pass
        except (DataError, OSError) as error:
            self.__exit__()
            raise UserError(
                f"no process to decode pictures can be started ({error}): "
                "end other programs, or raise the limits of memory and processes (`ulimit -a`)"
            ) from None
        for worker in self._workers:
            self._idle.put_nowait(worker)
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes."""
        self._closed = True
        for worker in self._workers:
            worker.close()  # so that no thread waits for its answer
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.close()  # what a thread has started meanwhile

    async def decode(self, content: bytes | bytearray, *, as_png: bool = False) -> Square:
        """Decode a file.

        Raises:
            RefusedError: 413 if it is too large in pixels, memory or time, 415 if it is no
                picture that can be read, 429 if no decoder came free in time, 503 if the decoder
                was killed from outside, twice.
        """
        for _ in range(_TRIES):
            try:
                return await self._decode(content, as_png)
            except DeathError as error:
                if error.signal is None or error.signal not in (signal.SIGKILL, signal.SIGTERM):
                    detail = f"{error}: it is damaged; save it anew as PNG or JPEG"
                    raise RefusedError(415, detail) from None
            except (TooLargeError, LimitError) as error:
                detail = _TOO_SLOW if isinstance(error, LimitError) else str(error)
                raise RefusedError(413, detail) from None
            except DataError as error:
                raise RefusedError(415, str(error)) from None
            except OSError:  # no process or descriptor to be had
                break
        raise RefusedError(503, "the decoder was ended by something else; try again")

    async def _decode(self, content: bytes | bytearray, as_png: bool) -> Square:
        try:
            async with asyncio.timeout(self._settings.wait):
                worker = await self._idle.get()
        except TimeoutError:
            raise RefusedError(429, "all decoders are busy; try again later") from None
        loop = asyncio.get_running_loop()
        call = loop.run_in_executor(
            self._threads, worker.call, decode_square, bytes(content), self._size, as_png
        )
        late = loop.call_later(self._settings.decode_wall, worker.interrupt)

        def done(call: "asyncio.Future[Square]") -> None:
            late.cancel()
            call.exception()  # of a cancelled request's picture nobody else asks for it
            self._give_back(worker)

        # A request that is cancelled leaves its decoder at work; it is free when that ends.
        call.add_done_callback(done)
        return await asyncio.shield(call)

    def _give_back(self, worker: Worker) -> None:
        if worker.started:
            self._idle.put_nowait(worker)
        elif not self._closed:
            loop = asyncio.get_running_loop()
            restart = loop.run_in_executor(self._threads, self._restart, worker)
            restart.add_done_callback(lambda _: self._idle.put_nowait(worker))

    def _start(self, worker: Worker) -> None:
        worker.start(load_formats, seconds=self._settings.decoder_start)

    def _restart(self, worker: Worker) -> None:
        """Start a worker's process anew, however often that takes."""
        told = False
        while not self._closed:
            try:
                return self._start(worker)
            except (DataError, OSError) as error:  # no memory or no process to be had; soon perhaps
                if not told and not self._closed:
                    logger.error("no new decoder (%s); trying again", error)
                told = True
                time.sleep(_AGAIN)
