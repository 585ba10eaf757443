"""Normalisations taken into the convolutions and dense layers around them, where that is exact.

With y = a·x + b for each channel, a = γ/σ and b = β − a·μ (σ = √(σ² + ε)):

    dense layer or convolution without padding behind it:

        W ∗ (a·x + b) + c = (a·W) ∗ x + (c + Σ W·b)

    convolution behind it that pads with zeros: the border is 0, not b, so what b adds depends on
    the place. It is the zero-padded convolution of the constant image b, computed here once:

        W ∗₀ (a·x + b) + c = (a·W) ∗₀ x + (c + B),    B = W ∗₀ b·1,    (O, H, W)

    For a 3 × 3 kernel B has nine distinct values a channel: centre, four edges, four corners. It is
    exact for every γ, zero and negative ones included; padding with the value that normalises to 0
    (−b/a) would be undefined at γ = 0.

    convolution before it, with a maximum over windows in between or none: the maximum commutes with
    a·x + b for a ≥ 0 only, so channels with a < 0 are not folded behind a pooling.

        a·max(W ∗ x + c) + b = max((a·W) ∗ x + (a·c + b))

Folding subtracts a·μ from sums of the size of a·μ. Where |μ|/σ is large, float32 loses the
difference; beyond `PRECISION_LIMIT` the normalisation stays, computed as γ/σ·(x − μ) + β.
"""

from dataclasses import replace

import numpy as np

from normlab.export.steps import Array, Chain, Conv, Dense, MaxPool, Norm, Relu, Step

# Rounding in float32 is 6e-8 of |μ|/σ: here 6e-6 of a normalised value's spread.
PRECISION_LIMIT = 100.0


def fold(chain: Chain) -> Chain:
    """Fold every normalisation of `chain` that can be folded; the function it computes is the same.

    What is left is named in `kept`. ReLU moves before a pooling it follows, which is the same
    function, and free where a runtime computes it with the convolution.
    """
    steps, kept = list(chain.steps), list(chain.kept)
    for norm in [s for s in steps if isinstance(s, Norm)]:
        i = steps.index(norm)
        ratio = float(np.max(np.abs(norm.mean) / norm.std))
        if ratio > PRECISION_LIMIT:
            kept.append(
                f"{norm.name} was not folded: |mean|/std reaches {ratio:.3g}, "
                f"more than {PRECISION_LIMIT:g}, and float32 would lose the difference"
            )
            continue
        before, after = _conv_before(steps, i), steps[i + 1]
        if isinstance(after, Conv | Dense):
            size = map_size(steps[:i], chain.image_size)
            steps[i : i + 2] = [fold_before(norm, after, size)]
        elif before is not None:
            steps[before : i + 1] = _fold_behind(steps[before : i + 1], norm, kept)
        else:
            kept.append(f"{norm.name} was not folded: no layer that could take it is next to it")
    return Chain(chain.image_size, tuple(_relu_before_pool(steps)), tuple(kept))


def fold_before(norm: Norm, layer: Conv | Dense, size: int) -> Conv | Dense:
    """`layer` such that it does alone what `norm` and `layer` do; its input is size × size."""
    scale, shift = norm.scale, norm.shift
    if isinstance(layer, Dense):
        bias = layer.bias + layer.kernel @ shift
        return replace(layer, kernel=layer.kernel * scale, bias=bias)
    kernel = layer.kernel * scale[:, None, None]
    if layer.padding == 0:
        bias = layer.bias + np.einsum("ochw,c->o", layer.kernel, shift)
        return replace(layer, kernel=kernel, bias=bias)
    constant = np.einsum("ochw,c->ohw", layer.kernel, shift)  # what b adds at each kernel position
    border = _of_ones(constant, size, layer.padding, layer.stride)
    return replace(layer, kernel=kernel, bias=_by_place(layer.bias) + border)


def fold_after(conv: Conv, norm: Norm) -> Conv:
    """`conv` such that it does alone what `conv` and `norm` do."""
    scale = norm.scale
    bias = (conv.bias.T * scale + norm.shift).T  # (O,) or (O, H, W)
    return replace(conv, kernel=conv.kernel * scale[:, None, None, None], bias=bias)


def map_size(steps: list[Step], image_size: int) -> int:
    """Height and width of what comes out of `steps`."""
    size = image_size
    for step in steps:
        if isinstance(step, Conv):
            size = (size + 2 * step.padding - step.kernel.shape[2]) // step.stride + 1
        elif isinstance(step, MaxPool):
            size //= 2
    return size


def _of_ones(kernel: Array, size: int, padding: int, stride: int) -> Array:
    """Convolve the image of ones, size × size and zero-padded, with each of `kernel` (O, h, w)."""
    ones = np.pad(np.ones((size, size)), padding)
    windows = np.lib.stride_tricks.sliding_window_view(ones, kernel.shape[1:])
    border: Array = np.einsum("yxhw,ohw->oyx", windows[::stride, ::stride], kernel)
    return border


def _by_place(bias: Array) -> Array:
    return bias if bias.ndim == 3 else bias[:, None, None]


def _conv_before(steps: list[Step], i: int) -> int | None:
    """Where the convolution is whose output, pooled or not, is the input of step `i`."""
    j = i - 1
    while j >= 0 and isinstance(steps[j], MaxPool):
        j -= 1
    return j if j >= 0 and isinstance(steps[j], Conv) else None


def _fold_behind(steps: list[Step], norm: Norm, kept: list[str]) -> list[Step]:
    """`steps` are a convolution, poolings, `norm`: fold the channels for which it is exact."""
    conv, *pools, _ = steps
    assert isinstance(conv, Conv)
    negative = (norm.scale < 0) & bool(pools)
    if not negative.any():
        return [fold_after(conv, norm), *pools]
    identity = Norm(
        norm.name,
        *(np.full_like(norm.mean, value) for value in (0.0, 1.0, 1.0, 0.0)),
    )
    kept.append(
        f"{norm.name} was folded but for {negative.sum()} channels: γ < 0 does not commute with "
        "the pooling before it"
    )
    positive, rest = _pick(negative, identity, norm), _pick(negative, norm, identity)
    return [fold_after(conv, positive), *pools, rest]


def _pick(where: np.ndarray, yes: Norm, no: Norm) -> Norm:
    """`yes` on the channels that `where` (C,) marks, `no` on the others."""
    return Norm(
        yes.name,
        np.where(where, yes.mean, no.mean),
        np.where(where, yes.std, no.std),
        np.where(where, yes.gamma, no.gamma),
        np.where(where, yes.beta, no.beta),
    )


def _relu_before_pool(steps: list[Step]) -> list[Step]:
    steps = list(steps)
    for i in range(len(steps) - 1):
        if isinstance(steps[i], MaxPool) and isinstance(steps[i + 1], Relu):
            steps[i], steps[i + 1] = steps[i + 1], steps[i]
    return steps
