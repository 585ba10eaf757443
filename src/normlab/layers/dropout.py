"""Dropout whose masks are cut from 64-bit random words, four 16-bit draws each.

A value is dropped when its draw is below ⌊rate·2¹⁶⌉, so the realised rate is exact to 2⁻¹⁶, and the
survivors are scaled by 1/(1 − realised rate): the expectation is kept exactly.
"""

import numpy as np
import torch
from torch import Tensor, nn

from normlab.errors import UserError

STEPS = 1 << 16


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

    def forward(self, x: Tensor, rng: np.random.Generator | None = None) -> Tensor:
        """Drop values of `x` (N, C) or (N, C, H, W); the same shape and layout out."""
        if not self.training or self.threshold == 0:
            return x
        if rng is None:
            raise UserError("dropout in training needs a generator: pass `rng`, or call .eval()")
        keep = self.draw(tuple(x.shape), rng).to(x.device)
        return x * (keep * (STEPS / (STEPS - self.threshold))).to(x.dtype)

    def draw(self, shape: tuple[int, ...], rng: np.random.Generator) -> Tensor:
        """Draw a mask of `shape` (N, C) or (N, C, H, W): True where the value is kept."""
        n, c, *space = shape
        size = int(np.prod(shape))
        words = rng.integers(0, 1 << 64, size=-(-size // 4), dtype=np.uint64, endpoint=False)
        keep = words.view(np.uint16)[:size] >= self.threshold
        return torch.from_numpy(keep.reshape(n, *space, c)).movedim(-1, 1)

    def extra_repr(self) -> str:
        return f"{self.rate}"
