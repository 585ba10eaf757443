"""Augmentation as tensor operations on whole batches.

What happens to which image is drawn once an epoch from the epoch's own stream, so it is the same
whatever the batch size, and after a resume.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

from normlab.core.streams import stream
from normlab.errors import UserError

VIEWS = ("single", "flip", "shift")


@dataclass(frozen=True)
class Augmentation:
    """What one epoch does to each of the N training images.

    Attributes:
        mirrored: (N,) bool, or None for no flips.
        shifts: (N, 2) pixels down and right, or None for no shifts.
        reach: the largest shift, in pixels.
    """

    mirrored: NDArray[np.bool_] | None = None
    shifts: NDArray[np.int64] | None = None
    reach: int = 0

    @classmethod
    def draw(cls, seed: int, epoch: int, n: int, *, flip: bool, shift: int) -> "Augmentation":
        """Draw the epoch's flips and shifts.

        Flips alternate (Jordan 2024, arXiv 2404.00498, section 3.6): which images are mirrored is
        drawn for the first epoch and turned round in each one after, so that two epochs show every
        image both ways.
        """
        mirrored = shifts = None
        if flip:
            mirrored = (stream(seed, "flip").random(n) < 0.5) ^ (epoch % 2 == 1)
        if shift:
            shifts = stream(seed, "shift", epoch).integers(-shift, shift + 1, size=(n, 2))
        return cls(mirrored, shifts, shift)

    def __call__(self, x: Tensor, chosen: NDArray[np.int64]) -> Tensor:
        """Apply it to `x` (B, C, H, W), the images with the indices `chosen` (B,)."""
        if self.mirrored is not None:
            x = mirror(x, torch.from_numpy(self.mirrored[chosen]).to(x.device))
        if self.shifts is not None:
            x = shift(x, torch.from_numpy(self.shifts[chosen]).to(x.device), self.reach)
        return x


def mirror(x: Tensor, which: Tensor) -> Tensor:
    """Mirror left and right the images of `x` (N, C, H, W) for which `which` (N,) is true."""
    return torch.where(which.view(-1, 1, 1, 1), x.flip(3), x)


def shift(x: Tensor, by: Tensor, reach: int) -> Tensor:
    """Move each image of `x` (N, C, H, W) down and right `by` (N, 2) pixels, at most `reach`.

    What comes in at the edge is the image reflected there.
    """
    n, _, height, width = x.shape
    padded = pad(x, (reach,) * 4, mode="reflect").permute(0, 2, 3, 1)  # (N, H+2r, W+2r, C)
    rows = torch.arange(height, device=x.device) + reach - by[:, :1]  # (N, H)
    columns = torch.arange(width, device=x.device) + reach - by[:, 1:]  # (N, W)
    image = torch.arange(n, device=x.device)
    moved = padded[image[:, None, None], rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2)


def halve(x: Tensor) -> Tensor:
    """Halve height and width of `x` (N, C, H, W): each pixel is the mean of 2 × 2."""
    return avg_pool2d(x, 2)


def views_of(x: Tensor, views: str) -> list[Tensor]:
    """The versions of images `x` (N, C, H, W) that `views` says a classifier is to see.

    `single`: the images as they are; `flip`: and mirrored; `shift`: both, each also moved by a
    pixel up and left and by one down and right, six in all (Jordan 2024, arXiv 2404.00498, 3.5).

    Raises:
        UserError: other views.
    """
    if views not in VIEWS:
        raise UserError(f"views {views!r}: choose one of {', '.join(VIEWS)}")
    if views == "single":
        return [x]
    both = [x, x.flip(3)]
    if views == "flip":
        return both
    by = torch.ones(len(x), 2, dtype=torch.int64, device=x.device)
    return both + [shift(v, sign * by, 1) for v in both for sign in (-1, 1)]
