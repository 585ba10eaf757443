"""Augmentation as tensor operations on whole batches.

What happens to which image is drawn once an epoch from the epoch's own stream, so it is the same
whatever the batch size, and after a resume.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample, pad

from normlab import kernels, recipes
from normlab.core.streams import stream
from normlab.errors import UserError

# What each version of an image weighs in the answer, in the order in which `views_of` has them.
VIEWS = {"single": (1.0,), "flip": (0.5, 0.5), "shift": (0.25, 0.25, *(0.125,) * 4)}


@dataclass(frozen=True)
class Augmentation:
    """What one epoch does to each of the N training images, in the order of the attributes.

    Attributes:
        mirrored: (N,) bool, or None for no flips.
        shifts: (N, 2) pixels down and right, or None for no shifts.
        reach: the largest shift, in pixels.
        crops: (N, 3) share of height and width, and the place of the part in [0, 1]²; or None.
        colours: (N, 3) factors of brightness, contrast and saturation; or None.
        covers: (N, 2) where the middle of the covered square is, down and right in [0, 1); or None.
        side: of that square, in pixels.
    """

    mirrored: NDArray[np.bool_] | None = None
    shifts: NDArray[np.int64] | None = None
    reach: int = 0
    crops: NDArray[np.float32] | None = None
    colours: NDArray[np.float32] | None = None
    covers: NDArray[np.float32] | None = None
    side: int = 0

    @classmethod
    def draw(cls, seed: int, epoch: int, n: int, settings: recipes.Augmentation) -> "Augmentation":
        """Draw what happens to N images in an epoch.

        Flips alternate (Jordan 2024, arXiv 2404.00498, section 3.6): which images are mirrored is
        drawn for the first epoch and turned round in each one after, so that two epochs show every
        image both ways.
        """
        mirrored = shifts = crops = colours = covers = None
        if settings.flip:
            mirrored = (stream(seed, "flip").random(n) < 0.5) ^ (epoch % 2 == 1)
        if reach := settings.shift:
            shifts = stream(seed, "shift", epoch).integers(-reach, reach + 1, size=(n, 2))
        if settings.crop < 1:
            crops = stream(seed, "crop", epoch).random((n, 3), np.float32)
            crops[:, 0] = settings.crop + (1 - settings.crop) * crops[:, 0]
        if c := settings.colour:
            colours = 1 - c + 2 * c * stream(seed, "colour", epoch).random((n, 3), np.float32)
        if settings.cutout:
            covers = stream(seed, "cutout", epoch).random((n, 2), np.float32)
        return cls(mirrored, shifts, settings.shift, crops, colours, covers, settings.cutout)

    def __call__(
        self,
        images: NDArray[np.uint8],
        chosen: NDArray[np.int64],
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1] of the `chosen` (B,) of `images` (N, H, W, 3), changed."""

        def of(values: NDArray[Any]) -> Tensor:
            return torch.from_numpy(values[chosen]).to(device)

        if kernels.reads(images, device, self.reach):
            x = kernels.read(images, chosen, self.mirrored, self.shifts)
        else:
            x = to_input(images[chosen], device)
            if self.mirrored is not None:
                x = mirror(x, of(self.mirrored))
            if self.shifts is not None:
                x = shift(x, of(self.shifts), self.reach)
        if self.crops is not None:
            x = crop(x, of(self.crops))
        if self.colours is not None:
            x = recolour(x, of(self.colours))
        if self.covers is not None:
            x = cover(x, of(self.covers), self.side)
        return x


def to_input(images: NDArray[np.uint8], device: torch.device | str = "cpu") -> Tensor:
    """Scale pixels (N, H, W, 3) as the notebook does: float32 in [0, 1], as (N, 3, H, W).

    The one place where pixels become numbers for a network, in training (`Augmentation`, and
    `kernels.read` with the same values) and everywhere else. The result is laid out channels-last.
    """
    x = torch.from_numpy(np.array(images)).to(device)  # a copy: the cache's pages are read-only
    return x.float().div_(255).permute(0, 3, 1, 2)


def crop(x: Tensor, parts: Tensor) -> Tensor:
    """A part of each image of `x` (N, C, H, W), brought back to H × W by bilinear interpolation.

    Args:
        parts: (N, 3), the share of height and width, and where the part lies, from 0 (up, left) to
            1 (down, right).
    """
    share, place = parts[:, :1], (2 * parts[:, 1:] - 1) * (1 - parts[:, :1])  # (N, 1), (N, 2)
    theta = torch.zeros(len(x), 2, 3, device=x.device)
    theta[:, 0, 0] = theta[:, 1, 1] = share[:, 0]
    theta[:, 0, 2], theta[:, 1, 2] = place[:, 1], place[:, 0]
    grid = affine_grid(theta, list(x.shape), align_corners=False)
    return grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def recolour(x: Tensor, factors: Tensor) -> Tensor:
    """Scale brightness, contrast and saturation of images `x` (N, 3, H, W) in [0, 1].

    Args:
        factors: (N, 3); 1 changes nothing.
    """
    brightness, contrast, saturation = (f.view(-1, 1, 1, 1) for f in factors.unbind(1))
    x = x * brightness
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + (x - mean) * contrast
    grey = x.mean(1, keepdim=True)
    return (grey + (x - grey) * saturation).clamp(0, 1)


def cover(x: Tensor, places: Tensor, side: int) -> Tensor:
    """Cover a square of each image of `x` (N, C, H, W) with the image's mean colour.

    Cutout (DeVries and Taylor 2017, arXiv 1708.04552, section 3.2): the middle is any pixel, so
    that a part of the square may lie outside of the image.

    Args:
        places: (N, 2), where the middle is, down and right, in [0, 1).
        side: of the square, in pixels.
    """
    inside = []
    for length, place in zip(x.shape[2:], places.unbind(1), strict=True):
        first = (place * length).long() - side // 2
        pixels = torch.arange(length, device=x.device) - first[:, None]  # (N, length)
        inside.append((pixels >= 0) & (pixels < side))
    square = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return torch.where(square, x.mean((2, 3), keepdim=True), x)


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
    pixel up and left and by one down and right, six in all. The two that are not moved weigh as
    much as the four that are (Jordan 2024, arXiv 2404.00498, section 3.5 and its program).

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
