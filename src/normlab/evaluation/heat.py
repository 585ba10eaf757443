"""Where a network looks: what hiding a part of a picture does to its answer.

    heat(i, j) = logit p(class | picture) − logit p(class | picture, square (i, j) hidden)

A square of a quarter of the side, filled with the picture's mean colour, stands in turn at 8 × 8
places (occlusion, Zeiler & Fergus 2014, arXiv 1311.2901, section 4.2). Grad-CAM (Selvaraju et al.
2017, arXiv 1610.02391) takes one forward and one backward pass instead of 65 forward ones, but its
map is as coarse as the last layer's, 4 × 4 for pictures of 32 pixels, and where the maximum over
all places follows, its weights no longer say which place counted. Occlusion asks the whole network,
whatever it is made of, exported ones included.

What it cannot tell: a part that another part replaces has no heat, and a filled square is itself
something that the network has never seen.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

GRID = 8  # places, down and across
WIDTH = 4  # the square is a WIDTH-th of the side
PASSES = GRID**2 + 1
RED, BLUE = (214, 39, 24), (31, 90, 190)

Pixels = NDArray[np.uint8]
Probabilities = Callable[[Pixels], NDArray[np.floating]]


@dataclass(frozen=True)
class Heat:
    """What hiding each part of a picture does to one class.

    Attributes:
        drop: (8, 8), in logits of the class: positive where hiding speaks against it.
        whole: probability of the class for the whole picture.
        least, most: for the pictures with a part hidden.
    """

    drop: NDArray[np.float64]
    whole: float
    least: float
    most: float


def heat_of(probabilities: Probabilities, picture: Pixels, label: int) -> Heat:
    """Hide parts of a picture (S, S, 3), one at a time, and ask for the class `label`.

    probabilities: (N, S, S, 3) → (N, K).
    """
    return heat_from(probabilities(np.concatenate([picture[None], hidden(picture)]))[:, label])


def heat_from(answers: NDArray[np.floating]) -> Heat:
    """The same from the class's probabilities (65,): for the whole picture, then for `hidden`."""
    p = answers.astype(np.float64)
    sure = np.clip(p, 1e-7, 1 - 1e-7)
    logit = np.log(sure / (1 - sure))
    drop = (logit[0] - logit[1:]).reshape(GRID, GRID)
    return Heat(drop, float(p[0]), float(p[1:].min()), float(p[1:].max()))


def hidden(picture: Pixels) -> Pixels:
    """The picture (S, S, 3) with a part hidden, 64 times, row by row (64, S, S, 3)."""
    side = picture.shape[0]
    reach = max(1, round(side / WIDTH / 2))
    fill = picture.mean((0, 1)).round().astype(np.uint8)
    centres = [round((i + 0.5) * side / GRID) for i in range(GRID)]
    copies = np.repeat(picture[None], GRID**2, 0)
    for copy, (y, x) in zip(copies, ((y, x) for y in centres for x in centres), strict=True):
        copy[max(0, y - reach) : y + reach, max(0, x - reach) : x + reach] = fill
    return copies


def overlay(picture: Pixels, heat: Heat, side: int = 128) -> Pixels:
    """The picture in grey (side, side, 3), red where hiding speaks against the class, blue where
    it speaks for it; the strongest place has the full colour.
    """
    size = (side, side)
    grey = Image.fromarray(picture).convert("L").resize(size, Image.Resampling.NEAREST)
    base = np.repeat(np.asarray(grey, np.float64)[..., None], 3, axis=2)
    strongest = float(np.abs(heat.drop).max())
    share = heat.drop / strongest if strongest > 0.01 else np.zeros_like(heat.drop)
    smooth = Image.fromarray(share.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
    amount = np.clip(np.asarray(smooth, np.float64), -1, 1)[..., None]
    colour = np.where(amount > 0, np.array(RED, float), np.array(BLUE, float))
    alpha = 0.75 * np.abs(amount)
    return ((1 - alpha) * base + alpha * colour).round().astype(np.uint8)
