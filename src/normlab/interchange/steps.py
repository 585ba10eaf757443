"""A trained network as a list of plain steps: what folding rewrites and the ONNX graph is built of.

Arrays are float64, so that folding rounds once, at the end. Images are (N, C, H, W) on the way;
`Flatten` therefore runs over C, H, W, and whatever follows it is reordered here from the H, W, C of
the networks.
"""

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from normlab.errors import UnexportableError
from normlab.layers import BatchNorm
from normlab.models import FastNet, NotebookNet
from normlab.models.fast import PATCH, Block

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Norm:
    """y = γ·(x − μ)/σ + β for each channel or feature; every vector (C,), σ with its ε."""

    name: str
    mean: Array
    std: Array
    gamma: Array
    beta: Array

    @property
    def scale(self) -> Array:
        """a of y = a·x + b."""
        return self.gamma / self.std

    @property
    def shift(self) -> Array:
        """b of y = a·x + b."""
        return self.beta - self.scale * self.mean


@dataclass(frozen=True)
class Conv:
    """Convolution with kernel (O, C, h, w) and bias (O,).

    Attributes:
        padding: width of the border of zeros.
        trim: how much narrower the border is below and on the right: rows and columns of the
            output that the pooling behind it would leave out.
        of_ones: a kernel (O, h, w) whose convolution of the image of ones is added, bordered as
            the input is: what a normalisation before the border of zeros adds, place by place.
    """

    name: str
    kernel: Array
    bias: Array
    padding: int
    stride: int = 1
    trim: int = 0
    of_ones: Array | None = None


@dataclass(frozen=True)
class Dense:
    """W·x + bias with kernel W (O, C)."""

    name: str
    kernel: Array
    bias: Array


@dataclass(frozen=True)
class Relu:
    """max(x, 0)."""


@dataclass(frozen=True)
class Clip:
    """max(x, low), one bound for all channels: what ReLU becomes in folding."""

    low: float


@dataclass(frozen=True)
class Affine:
    """y = scale·x + shift for each channel, each (C,): what folding leaves of a normalisation."""

    name: str
    scale: Array
    shift: Array


@dataclass(frozen=True)
class MaxPool:
    """Maxima of windows of 2 × 2; an odd last row or column is left out."""


@dataclass(frozen=True)
class GlobalMax:
    """(N, C, H, W) → (N, C), the maximum over all positions."""


@dataclass(frozen=True)
class Flatten:
    """(N, C, H, W) → (N, C·H·W)."""


@dataclass(frozen=True)
class Keep:
    """Nothing is changed; what is here is added again at the next `Add`."""


@dataclass(frozen=True)
class Add:
    """The sum with what was at the last `Keep`."""


Step = Norm | Affine | Conv | Dense | Relu | Clip | MaxPool | GlobalMax | Flatten | Keep | Add


@dataclass(frozen=True)
class Chain:
    """Steps from pixels 0 … 255 (N, 3, H, W) to logits (N, K).

    Attributes:
        image_size: H = W in pixels.
        unfolded: why a normalisation was left as it is, one sentence each.
    """

    image_size: int
    steps: tuple[Step, ...]
    unfolded: tuple[str, ...] = field(default=())


def chain_of(model: nn.Module, image_size: int) -> Chain:
    """List the steps of `model` in evaluation mode.

    Raises:
        UnexportableError: another network or normaliser.
    """
    if isinstance(model, NotebookNet):
        return Chain(image_size, tuple(_notebook(model, image_size)))
    if isinstance(model, FastNet):
        return Chain(image_size, tuple(_fast(model)))
    raise UnexportableError(
        f"network {type(model).__name__} cannot be exported, only NotebookNet, FastNet and those "
        "of timm can"
    )


def _notebook(model: NotebookNet, image_size: int) -> list[Step]:
    side = (image_size - 2) // 2 // 2
    order = np.arange(side * side * 64).reshape(side, side, 64).transpose(2, 0, 1).ravel()
    first = _norm("batch_normalization", model.batch_normalization)
    hidden_norm = _norm("batch_normalization_3", model.batch_normalization_3)
    hidden = _dense("hidden", model.hidden)

    def activate(norm: list[Norm]) -> list[Step]:
        return [*norm, Relu()] if model.norm_first else [Relu(), *norm]

    return [
        _of_pixels(*first),
        _conv("conv1", model.conv1),
        *activate(_norm("batch_normalization_1", model.batch_normalization_1)),
        _conv("conv2", model.conv2),
        MaxPool(),
        *activate(_norm("batch_normalization_2", model.batch_normalization_2)),
        _conv("conv3", model.conv3),
        MaxPool(),
        Flatten(),
        *activate([_reordered(norm, order) for norm in hidden_norm]),
        replace(hidden, kernel=hidden.kernel[:, order]),
        *activate(_norm("batch_normalization_4", model.batch_normalization_4)),
        _dense("output", model.output, model.logit_scale),
    ]


def _fast(model: FastNet) -> list[Step]:
    mean, ones = _array(model.whitening.mean), np.ones(3)
    kernel = _array(model.whitening.kernel)
    steps: list[Step] = [
        _of_pixels(Norm("whitening.mean", mean, ones, ones, np.zeros(3))),
        Conv("whitening", kernel, np.zeros(len(kernel)), PATCH // 2),
        Relu(),
    ]
    for i, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        norm = _norm(f"blocks.{i}.norm", block.norm)
        keep: list[Step] = [Keep()] if block.skips else []
        add: list[Step] = [Add()] if block.skips else []
        steps += [*keep, _conv(f"blocks.{i}.conv", block.conv)]
        if isinstance(block.pool, nn.MaxPool2d):
            steps.append(MaxPool())
        steps += [*add, Relu(), *norm] if block.norm_last else [*norm, *add, Relu()]
    output = _array(model.output.weight) * model.logit_scale
    return [*steps, GlobalMax(), Dense("output", output, np.zeros(len(output)))]


def _array(t: Tensor) -> Array:
    return t.detach().cpu().double().numpy()


def _conv(name: str, conv: nn.Conv2d) -> Conv:
    padding, stride = conv.padding[0], conv.stride[0]
    assert isinstance(padding, int)
    bias = np.zeros(conv.out_channels) if conv.bias is None else _array(conv.bias)
    return Conv(name, _array(conv.weight), bias, padding, stride)


def _dense(name: str, dense: nn.Linear, scale: float = 1.0) -> Dense:
    return Dense(name, _array(dense.weight) * scale, _array(dense.bias) * scale)


def batch_norm(place: nn.Module) -> BatchNorm | None:
    """The normaliser at its place in a network; None where it was left out.

    Raises:
        UnexportableError: another normaliser.
    """
    if isinstance(place, nn.Identity):
        return None
    if not isinstance(place, BatchNorm):
        raise UnexportableError(
            f"normaliser {type(place).__name__} cannot be exported, only batch and none can"
        )
    return place


def _norm(name: str, place: nn.Module) -> list[Norm]:
    """No step at all where the network has no normaliser."""
    norm = batch_norm(place)
    if norm is None:
        return []
    mean, var = _array(norm.running_mean), _array(norm.running_var)
    gamma = np.ones_like(mean) if norm.weight is None else _array(norm.weight)
    beta = np.zeros_like(mean) if norm.bias is None else _array(norm.bias)
    return [Norm(name, mean, np.sqrt(var + norm.eps), gamma, beta)]


def _of_pixels(norm: Norm | None = None) -> Norm:
    """What `norm` does to pixels in [0, 1], done to pixels 0 … 255."""
    if norm is None:
        return Norm("scaling", np.zeros(3), np.full(3, 255.0), np.ones(3), np.zeros(3))
    return replace(norm, mean=255 * norm.mean, std=255 * norm.std)


def _reordered(norm: Norm, order: NDArray[np.int64]) -> Norm:
    return Norm(norm.name, norm.mean[order], norm.std[order], norm.gamma[order], norm.beta[order])
