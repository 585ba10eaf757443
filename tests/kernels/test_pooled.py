"""Gradients of a convolution of whose output the maxima alone went on, summed directly."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from normlab import kernels
from normlab.kernels import convolutions

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no compiled kernels here")

SHAPES = [  # images, channels in, height, width, channels out
    (3, 32, 15, 15, 64),
    (2, 64, 2, 2, 16),  # a single window
    (1, 32, 3, 70, 48),  # rows of more windows than a block has
    (2, 32, 9, 65, 32),  # of as many
    (4, 32, 7, 40, 16),  # blocks of a single row
    (1, 96, 66, 3, 16),  # blocks of a single column
    (9, 32, 8, 30, 144),  # more channels than a word has bits, and images than parts
    (70, 32, 4, 6, 16),
]


def drawn(shape: tuple[int, int, int, int, int], share: float) -> tuple[Tensor, ...]:
    """x, weight, which, and a gradient of which so many are not zero."""
    generator = torch.Generator().manual_seed(0)
    n, c_in, h, w, c_out = shape
    x = torch.randn(n, c_in, h, w, generator=generator)
    weight = torch.randn(c_out, c_in, 3, 3, generator=generator)
    x = x.contiguous(memory_format=torch.channels_last)
    y, which = kernels.conv3x3_max_pool(x, weight, None)
    g = torch.randn(y.shape, generator=generator)
    g *= torch.rand(y.shape, generator=generator) < share
    return x, weight, which, g.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.7, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_float64(
    shape: tuple[int, int, int, int, int], share: float
) -> None:
    x, weight, which, g = drawn(shape, share)
    wide = [v.double().requires_grad_() for v in (x, weight, torch.zeros(len(weight)))]
    n, _, h, w, c_out = shape
    whole = kernels.max_pool_gradient(g, which, torch.Size((n, c_out, h, w)))
    expected = torch.autograd.grad(conv2d(*wide, padding=1), wide, whole.double())
    found = kernels.conv3x3_gradients(x, weight, g, which, x_grad=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours is not None
        assert (ours - theirs).abs().max() <= 2e-6 * theirs.abs().max()
    dx, *others = kernels.conv3x3_gradients(x, weight, g, which, x_grad=False)
    assert dx is None
    for ours, same in zip(others, found[1:], strict=True):
        assert same is not None
        assert torch.equal(ours, same)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_the_bits_do_not_depend_on_the_number_of_threads(
    shape: tuple[int, int, int, int, int],
) -> None:
    arguments = drawn(shape, 0.5)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 12):
            torch.set_num_threads(threads)
            x, weight, which, g = arguments
            results.append(kernels.conv3x3_gradients(x, weight, g, which, x_grad=True))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for ours, first in zip(result, results[0], strict=True):
            assert ours is not None
            assert first is not None
            assert torch.equal(ours, first)


@pytest.mark.parametrize(
    ("c_in", "tiles", "expected"),
    [
        (32, kernels.Tiles(2), ["conv3x3_pooled_gradients"]),
        (48, kernels.Tiles(2), ["conv3x3_by2_gradient", "conv3x3_by2"]),
        (32, kernels.Tiles(4), ["conv3x3_by4_gradient", "conv3x3_by4"]),
    ],
)
def test_which_pass_is_used(
    c_in: int, tiles: kernels.Tiles, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, which, g = drawn((2, c_in, 8, 8, 16), 0.5)
    used: list[str] = []
    call = convolutions.call
    monkeypatch.setattr(convolutions, "call", lambda name, *a: (used.append(name), call(name, *a)))
    kernels.conv3x3_gradients(x, weight, g, which, tiles=tiles, x_grad=True)
    assert used == expected


def test_what_is_not_finite_is_passed_on() -> None:
    x, weight, which, g = drawn((2, 32, 8, 8, 16), 0.5)
    g[1, 3, 2, 1] = float("nan")
    dx, dw, db = kernels.conv3x3_gradients(x, weight, g, which, x_grad=True)
    assert dx is not None
    assert dx[0].isfinite().all()
    assert not dx[1].isfinite().all()
    assert dw[:3].isfinite().all()
    assert not dw[3].isfinite().any()
    assert torch.equal(db.isfinite(), torch.arange(16) != 3)
