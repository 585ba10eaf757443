"""Changed copies of pictures, as they get into data sets: moved, zoomed, resized, recompressed, …

What finds copies is fitted to these changes on the user's own pictures, and measured by them.
"""

import io
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]  # (S, S, 3)
Change = Callable[[Pixels, np.random.Generator], Pixels]

_EDGES = ("reflect", "edge", "constant")


def moved(picture: Pixels, rng: np.random.Generator) -> Pixels:
    """By up to an eighth of its side; the gap is a reflection, the edge repeated, or black."""
    reach = max(1, len(picture) // 8)
    down, right = 0, 0
    while not (down or right):
        down, right = rng.integers(-reach, reach + 1, 2).tolist()
    edges = _EDGES[rng.integers(len(_EDGES))]
    padded = np.pad(picture, ((reach, reach), (reach, reach), (0, 0)), mode=edges)  # type: ignore[call-overload]
    return _window(padded, reach - down, reach - right, len(picture))


def zoomed(picture: Pixels, rng: np.random.Generator) -> Pixels:
    """A part of 80 to 95 % of each side, brought back to the full size."""
    size = len(picture)
    side = max(1, round(size * rng.uniform(0.8, 0.95)))
    top, left = rng.integers(0, size - side + 1, 2).tolist()
    return _resize(_window(picture, top, left, side), size)


def resized(picture: Pixels, rng: np.random.Generator) -> Pixels:
    """Brought to 45 to 80 % of each side and back."""
    size = len(picture)
    return _resize(_resize(picture, max(2, round(size * rng.uniform(0.45, 0.8)))), size)


def recompressed(picture: Pixels, rng: np.random.Generator) -> Pixels:
    """By JPEG of a quality from 10 to 60."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=int(rng.integers(10, 61)))
    return np.asarray(Image.open(file).convert("RGB"))


def mirrored(picture: Pixels, rng: np.random.Generator) -> Pixels:
    """Left and right changed over."""
    return np.ascontiguousarray(picture[:, ::-1])


def brightened(picture: Pixels, rng: np.random.Generator) -> Pixels:
    """Values multiplied by 0.5 to 0.8 or 1.25 to 1.8 and cut off at white."""
    factor = rng.uniform(0.5, 0.8) if rng.random() < 0.5 else rng.uniform(1.25, 1.8)
    values: Pixels = np.clip(np.rint(picture * factor), 0, 255).astype(np.uint8)
    return values


def toned(picture: Pixels, rng: np.random.Generator) -> Pixels:
    """Brightness to the power of 0.5 to 0.7 or 1.5 to 2, as other settings of a camera do."""
    power = rng.uniform(0.5, 0.7) if rng.random() < 0.5 else rng.uniform(1.5, 2)
    curve = np.rint(255 * (np.arange(256) / 255) ** power).astype(np.uint8)
    return np.take(curve, picture)


def several(picture: Pixels, rng: np.random.Generator) -> Pixels:
    """Brightened, moved, perhaps mirrored, and recompressed."""
    picture = moved(brightened(picture, rng), rng)
    return recompressed(mirrored(picture, rng) if rng.random() < 0.5 else picture, rng)


CHANGES: dict[str, Change] = {
    change.__name__: change
    for change in (
        *(moved, zoomed, resized, recompressed),
        *(mirrored, brightened, toned, several),
    )
}


def _window(picture: Pixels, top: int, left: int, side: int) -> Pixels:
    return np.ascontiguousarray(picture[top : top + side, left : left + side])


def _resize(picture: Pixels, side: int) -> Pixels:
    return np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC))
