"""Random streams: every draw is a pure function of the run's seed and of what it is for.

Nothing here remembers a position. The order of the images in epoch 7 comes from
``stream(seed, "order", 7)`` whether or not epoch 6 was run in this process, so a resumed run draws
what the uninterrupted one drew, and two arms of a comparison share every draw they have in common.
"""

import hashlib
from collections.abc import Iterator

import numpy as np

AHEAD = 64  # streams made at a time


def stream(seed: int, *purpose: str | int) -> np.random.Generator:
    """Return the generator that belongs to `seed` and `purpose`, always at its start.

    >>> stream(0, "order", 1).integers(100) == stream(0, "order", 1).integers(100)
    True
    """
    key = "/".join(map(str, (seed, *purpose))).encode()
    words = np.frombuffer(hashlib.sha256(key).digest(), np.uint32)
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence(words)))


def streams(seed: int, *purpose: str | int, numbers: range) -> Iterator[np.random.Generator]:
    """Yield ``stream(seed, *purpose, n)`` for each n of `numbers`.

    They are made many at a time. One alone, between two steps of a training, takes twenty times as
    long, since no cache holds any more what makes it.
    """
    for first in range(0, len(numbers), AHEAD):
        yield from [stream(seed, *purpose, n) for n in numbers[first : first + AHEAD]]
