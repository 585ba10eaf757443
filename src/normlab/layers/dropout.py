"""Dropout whose draws, of 16 bits each, are functions of a key and of a value's place.

A value is dropped when its draw is below ⌊rate·2¹⁶⌉, so the realised rate is exact to 2⁻¹⁶, and the
survivors are scaled by 1/(1 − realised rate): the expectation is kept exactly. No draw depends on
the one before, so any thread, and any process with a part of the batch, makes its own.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from normlab.errors import UserError
from normlab.kernels import NONE_DROPPED, Drops

STEPS = 1 << 16
_NEXT, _FIRST, _SECOND = (
    np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
_WORDS = 1 << 13  # made at a time, in cache


class PartGenerator(np.random.Generator):
    """`rng` for a process that has the images `first` to `last` (not included) of a batch.

    So each image of a batch that lies in parts with several processes has the draws that it would
    have if the batch were whole.
    """

    def __init__(self, rng: np.random.Generator, first: int, last: int) -> None:
        super().__init__(rng.bit_generator)
        self.first, self.last = first, last

    def before(self, values: int) -> int:
        """How many values of the batch come before this part, which has so many `values`."""
        return self.first * values // max(self.last - self.first, 1)


def draws(drops: Drops, values: int) -> NDArray[np.uint16]:
    """The draws (values,) that `drops` compares with its threshold.

    Four are cut from each 64-bit word of SplitMix64 that starts with the key (Steele, Lea and Flood
    2014, OOPSLA, figure 14), whose words can be had in any order.
    """
    begin, skipped = divmod(drops.first, 4)
    words = np.empty((skipped + values + 3) // 4, np.uint64)
    with np.errstate(over="ignore"):
        for start in range(0, len(words), _WORDS):
            z = words[start : start + _WORDS]
            place = begin + 1 + start
            z[:] = np.arange(place, place + len(z), dtype=np.uint64)
            z *= _NEXT
            z += np.uint64(drops.key)
            z ^= z >> np.uint64(30)
            z *= _FIRST
            z ^= z >> np.uint64(27)
            z *= _SECOND
            z ^= z >> np.uint64(31)
    return words.view(np.uint16)[skipped:][:values]


def new_key(rng: np.random.Generator) -> int:
    """Draw a key."""
    return int(rng.integers(1 << 63))


class Dropout(nn.Module):
    """Set a share `rate` of the values to 0 while training (Srivastava et al. 2014, JMLR 15).

    The key of the draws comes from the generator that `forward` is given, never from a global one,
    and the draws follow the memory order N, H, W, C, so that they do not depend on how the tensor
    happens to lie.

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
        drops = self.drops(x.numel(), rng)
        if drops is NONE_DROPPED:
            return x
        n, c, *space = x.shape
        keep = draws(drops, x.numel()) >= drops.threshold
        mask = torch.from_numpy(keep.reshape(n, *space, c)).movedim(-1, 1).to(x.device)
        return x * (mask * drops.scale).to(x.dtype)

    def active(self) -> bool:
        """Whether values would be dropped now."""
        return self.training and self.threshold > 0

    def drops(self, values: int, rng: np.random.Generator | None) -> Drops:
        """What to do to a batch, or a part of one, of so many `values`; a new key each time."""
        if not self.active():
            return NONE_DROPPED
        if rng is None:
            raise UserError("dropout in training needs a generator: pass `rng`, or call .eval()")
        key = new_key(rng)
        before = rng.before(values) if isinstance(rng, PartGenerator) else 0
        return Drops(key, before, self.threshold, self.scale)

    def extra_repr(self) -> str:
        return f"{self.rate}"
