"""Batches that form under load: whatever has arrived while the model ran goes into its next run."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Model = Callable[[NDArray[np.uint8]], Sequence[Any]]

MOST = 64
# At most so many pixels in a batch: a network's activations are some hundred times as large.
MOST_PIXELS = 2**20


@dataclass
class Counts:
    """What has been answered since the start."""

    pictures: int = 0
    runs: int = 0


class Batcher:
    """Answers pictures one by one, and runs the model on as many as are waiting.

    A picture that arrives while the model is idle is answered at once, alone: nothing ever waits
    for a batch to fill. Use it as an asynchronous context manager.

    Args:
        model: images (N, S, S, 3) uint8 → N answers; called in a thread, once at a time.
        most: N at most; by default what suits the first picture's size.
    """

    def __init__(self, model: Model, most: int | None = None) -> None:
        self._model = model
        self._most = most
        self._waiting: asyncio.Queue[_Waiting] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1)
        self.counts = Counts()

    async def __aenter__(self) -> "Batcher":
        self._task = asyncio.create_task(self._collect())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._thread.shutdown()

    async def __call__(self, pixels: NDArray[np.uint8]) -> Any:
        """The model's answer to a picture (S, S, 3)."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait(_Waiting(pixels, answer))
        return await answer

    async def _collect(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._waiting.get()]
            most = self._most or max(1, min(MOST, MOST_PIXELS // batch[0].pixels[..., 0].size))
            while len(batch) < most and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            images = np.stack([waiting.pixels for waiting in batch])
            try:
                rows = await loop.run_in_executor(self._thread, self._model, images)
            except Exception as error:  # whoever asked gets it; the next batch may fare better
                for waiting in batch:
                    if not waiting.answer.done():
                        waiting.answer.set_exception(error)
                continue
            self.counts.runs += 1
            self.counts.pictures += len(batch)
            for waiting, row in zip(batch, rows, strict=True):
                if not waiting.answer.done():  # its request may have been cancelled
                    waiting.answer.set_result(row)


@dataclass
class _Waiting:
    pixels: NDArray[np.uint8]
    answer: asyncio.Future[Any]
