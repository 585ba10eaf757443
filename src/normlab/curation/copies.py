"""Near-copies of pictures: moved, zoomed, resized, recompressed, mirrored, brightened.

Three passes, each on what the one before left:

1. Pictures are described by numbers that such changes leave nearly the same: the linear
   combinations of `descriptors` with the largest ratio of variance between pictures to variance
   between a picture and its changed copies (Fisher's discriminant, on copies made of the user's
   own pictures). Each picture's nearest neighbours are candidates.
2. A candidate is laid on the other, mirrored or not, at the best of all shifts (a circular
   correlation by Fourier transforms).
3. The best of these are aligned below a pixel (shift, size, turn; Gauss-Newton steps, Lucas and
   Kanade 1981) and compared where their inner parts overlap, by three correlations: of the picture,
   of middle and of fine detail. A score weighs them.

Exact copies, of equal pixels, are grouped before and take part once.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import scipy  # its parts load when they are first used
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import affine_grid, conv2d, grid_sample, pad

from normlab.core.streams import stream
from normlab.curation.descriptors import SIDE, describe
from normlab.curation.planting import CHANGES
from normlab.data import load

Pixels = NDArray[np.uint8]
Features = NDArray[np.float32]
Indices = NDArray[np.int64]
Progress = Callable[[str], None]

DIMENSIONS = 64
NEIGHBOURS = 8
FIT_ON = 4_000  # pictures whose changed copies the discriminant is fitted to
LEAST = 1_000  # of fewer pictures, those of the package's sample join in
FLOOR = 0.4  # cosine of the descriptions below which a neighbour is no candidate
REACH = 5  # pixels of 32 that a copy may have been moved by
ROUGH = 0.2  # correlation at the best shift below which a candidate is dropped
MOST = 60_000  # candidates that are aligned, or as many as there are pictures
TAPER = 4  # pixels over which detail fades towards the border, which moves with the frame
MARGIN = 3  # pixels at each side that are not compared: of a moved copy they show something else
STEPS = 4
_BATCH = 1_000
_ROWS = 1_000

# Of a logistic regression that tells 2,000 planted copies (250 of each change) from 70,000
# candidates among 12,000 training pictures of CIFAR-10, compared without a margin: picture, middle,
# fine, constant. Its own constant was 2 higher; at this one 98 % of the copies pass, and five
# candidates in a thousand, many of which are copies by the eye.
WEIGHTS = (7.3, 2.8, 12.5, -15.3)
THRESHOLD = 0.0
SURE = 2.0  # from which on pairs are joined into groups


@dataclass(frozen=True)
class Copies:
    """Pairs of pictures that show the same.

    pairs: (P, 2) indices i < j, the surest first.
    scores: (P,) of each pair; infinite for exact copies.
    compared: how many pairs were laid on each other.
    found: share of each kind of planted copy that is found among these pictures, by this search.
    """

    pairs: Indices
    scores: NDArray[np.float64]
    compared: int
    found: dict[str, float]


@dataclass(frozen=True, eq=False)
class Discriminant:
    """Combinations of descriptions that tell pictures apart and leave their copies together."""

    mean: Features
    scale: Features
    weights: Features

    def __call__(self, features: Features) -> Features:
        """(N, D) → (N, `DIMENSIONS`) of length 1."""
        z = ((features - self.mean) / self.scale) @ self.weights
        unit: Features = z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-9)
        return unit


def fit_discriminant(pixels: Pixels, features: Features, on: int = FIT_ON) -> Discriminant:
    """Fit it to changed copies of `pixels` (N, 32, 32, 3), whose descriptions are `features`."""
    if len(pixels) < LEAST:
        sample = load("sample")
        extra = np.concatenate([sample.x_train, sample.x_test])
        pixels = np.concatenate([pixels, extra])
        features = np.concatenate([features, describe(extra)])
    rng = stream(0, "check", "discriminant")
    chosen = rng.permutation(len(pixels))[:on]
    kinds = [*CHANGES.values(), *(CHANGES[k] for k in ("moved", "several", "several", "mirrored"))]
    changed = np.stack([kinds[k % len(kinds)](pixels[i], rng) for k, i in enumerate(chosen)])
    mean, scale = features.mean(0), features.std(0) + 1e-4
    own = ((features[chosen] - mean) / scale).astype(np.float64)
    other = ((describe(changed) - mean) / scale).astype(np.float64)
    within = (other - own).T @ (other - own) / len(own)
    within += 1e-3 * np.diag(within).mean() * np.eye(len(within))
    between = own.T @ own / len(own)
    last = len(within) - 1
    _, vectors = scipy.linalg.eigh(between, within, subset_by_index=[last - DIMENSIONS + 1, last])
    return Discriminant(mean, scale, vectors.astype(np.float32))


def find_copies(pixels: Pixels, prints: Sequence[bytes], features: Features) -> Copies:
    """Search all pictures against all.

    pixels: (N, 32, 32, 3); prints: N, equal where pictures are equal before they were resized.
    features: (N, D), by `describe`.
    """
    exact = _exact(prints)
    first = np.array([indices[0] for indices in exact])
    small, described = pixels[first], features[first]
    discriminant = fit_discriminant(small, described)
    unit = discriminant(described)
    a, b, cosines = _neighbours(unit)
    bands = _bands(small)
    pairs, scores = _compare(small, bands, a, b, cosines, max(MOST, len(pixels)))
    kept = scores > THRESHOLD
    near = first[pairs[kept]]
    chains = [(i, j) for indices in exact for i, j in pairwise(indices)]
    every = np.concatenate([np.array(chains, np.int64).reshape(-1, 2), near])
    sure = np.concatenate([np.full(len(chains), np.inf), scores[kept]])
    order = np.argsort(-sure, kind="stable")
    found = measure(small, bands, unit, discriminant)
    return Copies(np.sort(every[order], 1), sure[order], len(pairs), found)


def leaks(train: Pixels, test: Pixels, *, most: int) -> Indices:
    """Pairs (P, 2) of a training and a test picture that show the same, the surest first.

    A quick search: the discriminant is fitted on fewer copies, and `most` candidates are aligned.
    """
    pixels = np.concatenate([train, test])
    features = describe(pixels)
    unit = fit_discriminant(pixels, features, LEAST)(features)
    a, b, cosines = _neighbours(unit)
    across = (a < len(train)) & (b >= len(train))
    bands = _bands(pixels)
    pairs, scores = _compare(pixels, bands, a[across], b[across], cosines[across], most)
    found = pairs[np.argsort(-scores, kind="stable")][: int((scores > SURE).sum())]
    found[:, 1] -= len(train)
    return found


def measure(
    pixels: Pixels, bands: Tensor, unit: Features, discriminant: Discriminant, n: int = 100
) -> dict[str, float]:
    """The share of `n` planted copies of each kind that are found: candidates, and above the mark.

    A copy counts if its picture is among its nearest `NEIGHBOURS`, and the pair passes.
    """
    rng = stream(0, "check", "measure")
    found: dict[str, float] = {}
    for name, change in CHANGES.items():
        chosen = rng.permutation(len(pixels))[:n]
        copies = np.stack([change(pixels[i], rng) for i in chosen])
        cosines = discriminant(describe(copies)) @ unit.T
        own = cosines[np.arange(len(chosen)), chosen]
        near = ((cosines > own[:, None]).sum(1) < NEIGHBOURS) & (own > FLOOR)
        scores, rough = compare(pixels[chosen], copies, bands[chosen], _bands(copies))
        passed = near & (rough > ROUGH) & (scores > THRESHOLD)
        found[name] = float(passed.mean())
    return found


def _exact(prints: Sequence[bytes]) -> list[list[int]]:
    """Indices of equal pictures together, in the order of their first."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for i, digest in enumerate(prints):
        groups[digest].append(i)
    return list(groups.values())


def _neighbours(unit: Features) -> tuple[Indices, Indices, Features]:
    """Pairs i < j, one of them among the other's nearest `NEIGHBOURS`, and their cosines."""
    z = torch.from_numpy(unit)
    n = len(z)
    near, cosines = [], []
    for a in range(0, n, _ROWS):
        similar = z[a : a + _ROWS] @ z.T
        similar[torch.arange(len(similar)), torch.arange(a, a + len(similar))] = -2
        values, which = similar.topk(min(NEIGHBOURS, n - 1), 1)
        near.append(which)
        cosines.append(values)
    j, c = torch.cat(near).numpy(), torch.cat(cosines).numpy()
    i = np.repeat(np.arange(n), j.shape[1])
    low, high = np.minimum(i, j.ravel()), np.maximum(i, j.ravel())
    keep = c.ravel() > FLOOR
    _, once = np.unique((low * n + high)[keep], return_index=True)
    return low[keep][once], high[keep][once], c.ravel()[keep][once]


def _compare(
    pixels: Pixels, bands: Tensor, a: Indices, b: Indices, cosines: Features, most: int
) -> tuple[Indices, NDArray[np.float64]]:
    """Lay candidates on each other, the likeliest `most` of them to a fraction of a pixel."""
    rough = np.concatenate(
        [_lay(bands[a[s]], bands[b[s]])[0].numpy() for s in _slices(len(a))] or [np.empty(0)]
    )
    promise = 2 * rough + cosines
    kept = np.flatnonzero(rough > ROUGH)
    kept = kept[np.argsort(-promise[kept], kind="stable")][:most]
    a, b = a[kept], b[kept]
    scores = [
        compare(pixels[a[s]], pixels[b[s]], bands[a[s]], bands[b[s]])[0] for s in _slices(len(a))
    ]
    return np.stack([a, b], 1), np.concatenate(scores or [np.empty(0)])


def _slices(n: int) -> list[slice]:
    return [slice(start, start + _BATCH) for start in range(0, n, _BATCH)]


def compare(
    a: Pixels, b: Pixels, bands_a: Tensor, bands_b: Tensor
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scores (P,) of pairs a[i], b[i], and their correlations at the best shift."""
    correlations, rough = correlate(a, b, bands_a, bands_b)
    return correlations @ np.array(WEIGHTS[:-1]) + WEIGHTS[-1], rough


def correlate(
    a: Pixels, b: Pixels, bands_a: Tensor, bands_b: Tensor
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Correlations (P, 3) of aligned pairs: picture, middle, fine; and at the best shift (P,)."""
    rough, flipped, shift = _lay(bands_a, bands_b)
    mirror = flipped.view(-1, 1, 1, 1)
    grey_a, grey_b = _grey(a), _grey(b)
    fine_a, fine_b = grey_a - _blur(grey_a, 1), grey_b - _blur(grey_b, 1)
    layers = torch.cat([bands_b, grey_b, fine_b], 1)
    layers = torch.where(mirror, layers.flip(3), layers)
    middle, place = _align(bands_a, layers[:, :1], shift)
    moved, inside = _warp(layers[:, 1:], place)
    whole = _correlation(grey_a, moved[:, :1], inside)
    fine = _correlation(fine_a, moved[:, 1:], inside)
    return torch.stack([whole, middle, fine], 1).double().numpy(), rough.double().numpy()


def _grey(pixels: Pixels) -> Tensor:
    """(N, 32, 32, 3) → (N, 1, 32, 32) luminance in [0, 1]."""
    x = torch.from_numpy(np.array(pixels)).float() / 255
    return (x @ torch.tensor([0.299, 0.587, 0.114]))[:, None]


def _bands(pixels: Pixels) -> Tensor:
    """Middle detail: luminance less what is wider than 4 pixels and finer than 0.8; mean 0."""
    edge = ((torch.arange(SIDE) + 0.5) / TAPER).clamp(max=1)
    edge = edge * edge.flip(0)
    window, parts = edge[:, None] * edge, []
    for s in _slices(len(pixels)):
        grey = _grey(pixels[s])
        band = (_blur(grey, 0.8) - _blur(grey, 4)) * window
        parts.append(band - band.mean((1, 2, 3), keepdim=True))
    return torch.cat(parts)


def _blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (N, 1, H, W) by `sigma` pixels."""
    radius = round(3 * sigma)
    kernel = torch.exp(-(torch.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    kernel /= kernel.sum()
    padded = pad(x, (radius,) * 4, mode="reflect")
    return conv2d(conv2d(padded, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))


_DARK = 0.05  # added to lengths, so that noise in plain pictures does not correlate


def _lay(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best correlation (P,) of bands a and b over shifts, whether mirrored, and the shift."""
    side = 2 * REACH + 1
    lengths = (a.flatten(1).norm(dim=1) + _DARK) * (b.flatten(1).norm(dim=1) + _DARK)
    transformed = torch.fft.rfft2(a[:, 0])
    values, places = [], []
    for other in (b, b.flip(3)):
        product = transformed * torch.fft.rfft2(other[:, 0]).conj()
        c = torch.fft.irfft2(product, s=(SIDE, SIDE)).roll((REACH, REACH), (1, 2))
        value, place = c[:, :side, :side].flatten(1).max(1)
        values.append(value / lengths)
        places.append(place)
    value, which = torch.stack(values).max(0)
    place = torch.stack(places).gather(0, which[None])[0]
    return value, which == 1, torch.stack([place // side, place % side], 1) - REACH


def _align(a: Tensor, b: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Align b (P, 1, 32, 32) with a, from `shift` on; the correlation and the affine map (P, 2, 3).

    Each step fits shift, size and turn to what differs, brightness and contrast aside.
    """
    n = len(a)
    place = torch.zeros(n, 2, 3)
    place[:, 0, 0] = place[:, 1, 1] = 1
    place[:, :, 2] = -shift.flip(1) * 2 / SIDE
    down = torch.zeros_like(b)
    right = torch.zeros_like(b)
    right[..., 1:-1] = (b[..., 2:] - b[..., :-2]) * SIDE / 4
    down[..., 1:-1, :] = (b[..., 2:, :] - b[..., :-2, :]) * SIDE / 4
    layers = torch.cat([b, right, down], 1)
    grid = affine_grid(torch.eye(2, 3)[None], [1, 1, SIDE, SIDE], align_corners=False)
    x, y = grid[0, ..., 0].flatten(), grid[0, ..., 1].flatten()
    best, best_place = torch.full((n,), -1.0), place
    for step in range(STEPS + 1):
        moved, inside = _warp(layers, place)
        value = _correlation(a, moved[:, :1], inside)
        better = value > best
        best = torch.where(better, value, best)
        best_place = torch.where(better.view(-1, 1, 1), place, best_place)
        if step == STEPS:
            break
        mask = inside.flatten(1)
        target, source = _centred(a, inside), _centred(moved[:, :1], inside)
        gain = (target.norm(dim=1) + _DARK) / (source.norm(dim=1) + _DARK)
        dx, dy = moved[:, 1].flatten(1), moved[:, 2].flatten(1)
        slopes = torch.stack([dx * x + dy * y, dy * x - dx * y, dx, dy], 2)
        slopes = slopes * (mask * gain[:, None])[:, :, None]  # (P, 1024, 4)
        square = slopes.transpose(1, 2) @ slopes
        damping = 1e-3 * square.diagonal(dim1=1, dim2=2).mean(1) + 1e-6
        square = square + damping.view(-1, 1, 1) * torch.eye(4)
        rest = (target - source * gain[:, None])[:, :, None]
        change = torch.linalg.solve(square, slopes.transpose(1, 2) @ rest)[:, :, 0].clamp(-0.2, 0.2)
        size, turn = change[:, 0], change[:, 1]
        move = torch.stack([size, -turn, change[:, 2], turn, size, change[:, 3]], 1)
        place = place + move.view(-1, 2, 3)
    return best, best_place


def _warp(layers: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Layers (P, L, 32, 32) seen through affine maps; (P, 1, 32, 32), 1 where they are compared."""
    inner = torch.zeros(1, 1, SIDE, SIDE)
    inner[..., MARGIN:-MARGIN, MARGIN:-MARGIN] = 1
    every = torch.cat([layers, inner.expand(len(layers), -1, -1, -1)], 1)
    grid = affine_grid(place, list(every.shape), align_corners=False)
    moved = grid_sample(every, grid, align_corners=False)
    return moved[:, :-1], (moved[:, -1:] > 0.99).float() * inner


def _centred(x: Tensor, inside: Tensor) -> Tensor:
    """(P, 1, 32, 32) → (P, 1024): less the mean of what is inside, 0 outside."""
    flat, mask = x.flatten(1), inside.flatten(1)
    mean = (flat * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)
    return (flat - mean) * mask


def _correlation(a: Tensor, b: Tensor, inside: Tensor) -> Tensor:
    """(P,) over what is inside; −1 where that is less than a third of the picture."""
    first, second = _centred(a, inside), _centred(b, inside)
    value = (first * second).sum(1)
    value = value / ((first.norm(dim=1) + _DARK) * (second.norm(dim=1) + _DARK))
    return torch.where(inside.flatten(1).sum(1) > SIDE * SIDE / 3, value, -1.0)
