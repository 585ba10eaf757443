"""Normalisations taken into the convolutions and dense layers around them, where that is exact.

With y = a·x + b for each channel, a = γ/σ and b = β − a·μ (σ = √(σ² + ε)):

    dense layer or convolution without padding behind it:

        W ∗ (a·x + b) + c = (a·W) ∗ x + (c + Σ W·b)

    convolution behind it that pads with zeros: the border is 0, not b, so b has to be added before
    the padding. Where x = max(z, 0), z of a convolution with or without pooling behind it, that
    convolution adds it, and ReLU's bound moves along. With s the sign of a:

        a·max(z, 0) + b = s·max(|a|·z + s·b, s·b)

    A bound that differs by channel would be a pass of its own. So where every s·b < 0, each channel
    is divided by |b|, and one bound does for all; s and |b| go into the kernels behind:

        = s·|b| · max((|a|·z + s·b)/|b|, −1)

    A runtime computes that with the convolution, as it does ReLU.

    Where some s·b ≥ 0 the normalisation stays, as a 1 × 1 convolution of each channel: the pass
    over the output that the way below takes is dearer than that.

    Where no ReLU is before: what b adds to a zero-padded convolution depends on the place. It is
    the same convolution of the image of ones, 1, with another kernel:

        W ∗₀ (a·x + b) + c = (a·W) ∗₀ x + c + (Σ W·b) ∗₀ 1,    Σ over input channels

    For a 3 × 3 kernel it has nine distinct values a channel: centre, four edges, four corners. It
    is exact for every γ, zero and negative ones included, and costs a pass over the output.

    The subtraction of a mean from pixels before such a convolution stays: three channels are less.

    convolution before it, with a maximum over windows in between or none: the maximum commutes with
    a·x + b for a ≥ 0 only, so channels with a < 0 are not folded behind a pooling.

        a·max(W ∗ x + c) + b = max((a·W) ∗ x + (a·c + b))

Folding subtracts a·μ from sums of the size of a·μ. Where |μ|/σ is large, float32 loses the
difference; beyond `PRECISION_LIMIT` the normalisation stays, computed as γ/σ·(x − μ) + β.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from normlab.interchange.steps import (
    Affine,
    Array,
    Chain,
    Clip,
    Conv,
    Dense,
    Flatten,
    MaxPool,
    Norm,
    Relu,
    Step,
)

# Rounding in float32 is 6e-8 of |μ|/σ: here 6e-6 of a normalised value's spread.
PRECISION_LIMIT = 100.0
# Of |b|/|γ|: dividing by less would make values larger than is good for float32.
SMALLEST_BOUND = 1e-6


def fold(chain: Chain) -> Chain:
    """Fold every normalisation of `chain` that can be folded; the function it computes is the same.

    What is left is named in `unfolded`. ReLU moves before a pooling it follows, which is the same
    function, and free where a runtime computes it with the convolution. What a pooling leaves out
    is not computed.
    """
    steps, unfolded = list(chain.steps), list(chain.unfolded)
    for norm in [s for s in steps if isinstance(s, Norm)]:
        i = steps.index(norm)
        ratio = float(np.max(np.abs(norm.mean) / norm.std))
        if ratio > PRECISION_LIMIT:
            unfolded.append(
                f"{norm.name} was not folded: |mean|/std reaches {ratio:.3g}, "
                f"more than {PRECISION_LIMIT:g}, and float32 would lose the difference"
            )
            continue
        before, after = _conv_before(steps, i), steps[i + 1]
        if isinstance(after, Conv) and after.padding and _conv_of_relu(steps, i) is not None:
            _fold_around_relu(steps, i, unfolded)
        elif i == 0 and isinstance(after, Conv) and after.padding and not norm.beta.any():
            steps[:2] = _fold_scale(norm, after)
        elif isinstance(after, Conv | Dense):
            steps[i : i + 2] = [fold_before(norm, after)]
        elif before is not None:
            steps[before : i + 1] = _fold_behind(steps[before : i + 1], norm, unfolded)
        else:
            unfolded.append(
                f"{norm.name} was not folded: no layer that could take it is next to it"
            )
    steps = _trimmed(_relu_before_pool(steps), chain.image_size)
    return Chain(chain.image_size, tuple(steps), tuple(unfolded))


def fold_before(norm: Norm, layer: Conv | Dense) -> Conv | Dense:
    """`layer` such that it does alone what `norm` and `layer` do."""
    scale, shift = norm.scale, norm.shift
    if isinstance(layer, Dense):
        bias = layer.bias + layer.kernel @ shift
        return replace(layer, kernel=layer.kernel * scale, bias=bias)
    kernel = layer.kernel * scale[:, None, None]
    added = np.einsum("ochw,c->ohw", layer.kernel, shift)  # at each position of the kernel
    if layer.padding:
        return replace(layer, kernel=kernel, of_ones=added)
    return replace(layer, kernel=kernel, bias=layer.bias + added.sum((1, 2)))


def fold_after(conv: Conv, scale: Array, shift: Array) -> Conv:
    """`conv` such that it does alone what `conv` and scale·x + shift, each (O,), do."""
    return replace(
        conv,
        kernel=conv.kernel * scale[:, None, None, None],
        bias=conv.bias * scale + shift,
        of_ones=None if conv.of_ones is None else conv.of_ones * scale[:, None, None],
    )


def map_size(steps: Sequence[Step], image_size: int) -> int:
    """Height and width of what comes out of `steps`."""
    size = image_size
    for step in steps:
        if isinstance(step, Conv):
            padded = size + 2 * step.padding - step.trim
            size = (padded - step.kernel.shape[2]) // step.stride + 1
        elif isinstance(step, MaxPool):
            size //= 2
    return size


def _conv_before(steps: list[Step], i: int) -> int | None:
    """Where the convolution is whose output, pooled or not, is the input of step `i`."""
    j = i - 1
    while j >= 0 and isinstance(steps[j], MaxPool):
        j -= 1
    return j if j >= 0 and isinstance(steps[j], Conv) else None


def _conv_of_relu(steps: list[Step], i: int) -> int | None:
    """The same where one ReLU, too, is between the convolution and step `i`."""
    j = i - 1
    while j >= 0 and isinstance(steps[j], MaxPool):
        j -= 1
    return _conv_before(steps, j) if j >= 0 and isinstance(steps[j], Relu) else None


def _fold_around_relu(steps: list[Step], i: int, unfolded: list[str]) -> None:
    """Fold the normalisation at `i` into the bound of the ReLU before it, or make it an `Affine`.

    Around the ReLU may be poolings; before these is a convolution, and behind `i` a padded one.
    """
    norm, after, j = steps[i], steps[i + 1], _conv_of_relu(steps, i)
    assert isinstance(norm, Norm)
    assert isinstance(after, Conv)
    assert j is not None
    a, b = norm.scale, norm.shift
    zero = a == 0  # then y is b: whatever the convolution before computes is multiplied by 0
    sign = np.where(zero, np.where(b < 0, -1, 1), np.sign(a))
    bound = sign * b
    hopeless = ~zero & (bound > -SMALLEST_BOUND * np.abs(norm.gamma))
    if hopeless.any():
        steps[i] = Affine(norm.name, a, b)
        unfolded.append(
            f"{norm.name} stays, as a 1 × 1 convolution of each channel: in {hopeless.sum()} of "
            f"{len(a)} channels what it makes of 0 has the sign of γ, and with {after.name}'s "
            "padding of zeros a dearer pass would have to replace it"
        )
        return
    size = np.where(zero, 1, np.abs(b))
    before = steps[j]
    assert isinstance(before, Conv)
    steps[j] = fold_after(before, np.abs(a) / size, bound / size)
    between: list[Step] = [Clip(-1.0) if isinstance(s, Relu) else s for s in steps[j + 1 : i]]
    scaled = replace(after, kernel=after.kernel * (sign * size)[:, None, None])
    steps[j + 1 : i + 2] = [*between, scaled]


def _fold_scale(norm: Norm, conv: Conv) -> list[Step]:
    """Leave only the subtraction of the mean before `conv`; β is 0, so 0 stays what is padded."""
    centring = Affine(norm.name, np.ones_like(norm.mean), -norm.mean)
    return [centring, replace(conv, kernel=conv.kernel * norm.scale[:, None, None])]


def _fold_behind(steps: list[Step], norm: Norm, unfolded: list[str]) -> list[Step]:
    """`steps` are a convolution, poolings, `norm`: fold the channels for which it is exact."""
    conv, *pools, _ = steps
    assert isinstance(conv, Conv)
    negative = (norm.scale < 0) & bool(pools)
    if not negative.any():
        return [fold_after(conv, norm.scale, norm.shift), *pools]
    identity = Norm(
        norm.name,
        *(np.full_like(norm.mean, value) for value in (0.0, 1.0, 1.0, 0.0)),
    )
    unfolded.append(
        f"{norm.name} was folded but for {negative.sum()} channels: γ < 0 does not commute with "
        "the pooling before it"
    )
    positive, rest = _pick(negative, identity, norm), _pick(negative, norm, identity)
    return [fold_after(conv, positive.scale, positive.shift), *pools, rest]


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
    """Move ReLU to the convolution before it, past poolings and flattening."""
    done: list[Step] = []
    for step in steps:
        i = len(done)
        if isinstance(step, Relu | Clip):
            while i and isinstance(done[i - 1], MaxPool | Flatten):
                i -= 1
        done.insert(i, step)
    return done


def _trimmed(steps: list[Step], image_size: int) -> list[Step]:
    """Let no convolution compute the odd last row and column that the pooling behind it drops."""
    steps = list(steps)
    for i, conv in enumerate(steps):
        if not isinstance(conv, Conv) or not conv.padding or conv.stride > 1:
            continue
        behind = [s for s in steps[i + 1 :] if not isinstance(s, Relu | Clip)]
        if behind and isinstance(behind[0], MaxPool) and map_size(steps[: i + 1], image_size) % 2:
            steps[i] = replace(conv, trim=1)
    return steps
