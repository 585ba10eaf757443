"""Dropout whose masks are cut from 64-bit random words, four 16-bit draws each.

A value is dropped when its draw is below ⌊rate·2¹⁶⌉, so the realised rate is exact to 2⁻¹⁶, and the
survivors are scaled by 1/(1 − realised rate): the expectation is kept exactly.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from normlab.errors import UserError

STEPS = 1 << 16


class PartGenerator(np.random.Generator):
    """The draws that images `first` to `last` (not included) of a batch of `images` get of `rng`.

    So each image of a batch that lies in parts with several processes has the draws that it would
    have if the batch were whole. Every part makes the draws of all: SFC64 cannot jump.
    """

    def __init__(self, rng: np.random.Generator, first: int, last: int, images: int) -> None:
        super().__init__(rng.bit_generator)
        self.first, self.last, self.images = first, last, images

    def draws(self, size: int) -> NDArray[np.uint16]:
        """As the function `draws`, for `size` values of this part."""
        if not size:  # no image here: nothing more will be drawn
            return np.empty(0, np.uint16)
        each = size // (self.last - self.first)
        begin, end, total = (n * each for n in (self.first, self.last, self.images))
        before, after = begin // 4, -(-end // 4)
        self.bit_generator.random_raw(before, output=False)
        words = self.integers(0, 1 << 64, size=after - before, dtype=np.uint64, endpoint=False)
        self.bit_generator.random_raw(-(-total // 4) - after, output=False)
        return words.view(np.uint16)[begin - 4 * before :][:size]


def draws(size: int, rng: np.random.Generator) -> NDArray[np.uint16]:
    """Cut `size` 16-bit draws from the generator's next 64-bit words."""
    if isinstance(rng, PartGenerator):
        return rng.draws(size)
    words = rng.integers(0, 1 << 64, size=-(-size // 4), dtype=np.uint64, endpoint=False)
    return words.view(np.uint16)[:size]


class Dropout(nn.Module):
    """Set a share `rate` of the values to 0 while training (Srivastava et al. 2014, JMLR 15).

    The draws come from the generator that `forward` is given, never from a global one, and follow
    the memory order N, H, W, C, so that they do not depend on how the tensor happens to lie.

    Raises:
        UserError: a rate outside [0, 1), or training without a generator.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise UserError(f"dropout rate {rate}: choose a value from 0 up to, not including, 1")
        self.rate = rate
        self.threshold = round(rate * STEPS)

    @property
    def scale(self) -> float:
        """What survivors are multiplied by: 1/(1 − realised rate)."""
        return STEPS / (STEPS - self.threshold)

    def forward(self, x: Tensor, rng: np.random.Generator | None = None) -> Tensor:
        """Drop values of `x` (N, C) or (N, C, H, W); the same shape and layout out."""
        source = self.source(rng)
        if source is None:
            return x
        keep = self.draw(tuple(x.shape), source).to(x.device)
        return x * (keep * self.scale).to(x.dtype)

    def source(self, rng: np.random.Generator | None) -> np.random.Generator | None:
        """Return the generator to draw from, or None where nothing is dropped."""
        if not self.training or self.threshold == 0:
            return None
        if rng is None:
            raise UserError("dropout in training needs a generator: pass `rng`, or call .eval()")
        return rng

    def draw(self, shape: tuple[int, ...], rng: np.random.Generator) -> Tensor:
        """Draw a mask of `shape` (N, C) or (N, C, H, W): True where the value is kept."""
        n, c, *space = shape
        keep = draws(math.prod(shape), rng) >= self.threshold
        return torch.from_numpy(keep.reshape(n, *space, c)).movedim(-1, 1)

    def extra_repr(self) -> str:
        return f"{self.rate}"
