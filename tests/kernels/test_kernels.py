"""The compiled passes against float64 references in every layout, and doing without them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, max_pool2d

import normlab
from normlab import kernels
from normlab.core.streams import stream
from normlab.data.augment import Augmentation, to_input
from normlab.kernels import Tiles, convolutions
from normlab.layers import (
    BatchNorm,
    Conv2d,
    Dropout,
    MaxPool2d,
    conv3x3,
    conv_pool,
    norm_conv,
    relu_dropout_norm,
)
from oracle import batch_moments, batch_norm, batch_norm_gradients

pytestmark = pytest.mark.skipif(not kernels.available(), reason="installed without a compiler")

LAYOUTS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}
SHAPES = [(9, 3, 7, 5), (4, 32, 15, 15), (3, 70, 6, 7), (2, 1, 3, 1), (70, 33, 1, 1), (2, 10, 9, 9)]
MATRICES = [(2, 1), (2, 5), (33, 130), (300, 32), (65, 512), (32, 3136), (30, 2101), (100, 2701)]


def laid(x: Tensor, layout: str) -> Tensor:
    return x.contiguous(memory_format=LAYOUTS[layout]) if x.ndim == 4 else x


def check_layer(x: Tensor, norm: BatchNorm, tolerance: float = 3e-6) -> None:
    """Output and all gradients of `norm` at `x` against the float64 oracle."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2, generator=generator)
        norm.bias.normal_(generator=generator)
    g = torch.empty_like(x).normal_(generator=generator)
    x = x.detach().requires_grad_()
    assert kernels.layout(x) is not None
    y = norm(x)
    grads = torch.autograd.grad(y, [x, norm.weight, norm.bias], g)
    gamma, beta = norm.weight.detach().numpy(), norm.bias.detach().numpy()
    expected = (
        batch_norm(x.detach().numpy(), gamma, beta, norm.eps),
        *batch_norm_gradients(x.detach().numpy(), gamma, norm.eps, g.numpy()),
    )
    for ours, theirs in zip((y, *grads), expected, strict=True):
        scale = max(np.abs(theirs).max(), 1.0)
        assert np.abs(ours.detach().numpy() - theirs).max() <= tolerance * scale
    assert y.stride() == x.stride()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_images_match_float64(shape: tuple[int, ...], layout: str, threads: int) -> None:
    torch.set_num_threads(threads)
    x = laid(torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3 + 1, layout)
    check_layer(x, BatchNorm(shape[1]), tolerance=3e-5 if shape == (2, 1, 3, 1) else 3e-6)


@pytest.mark.parametrize("shape", MATRICES)
def test_rows_match_float64(shape: tuple[int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    # Two values a channel: dx is a difference of nearly equal terms.
    check_layer(x, BatchNorm(shape[1]), tolerance=1e-4 if shape[0] == 2 else 3e-6)


@pytest.mark.parametrize("shape", [(70_000, 64), (93_207, 45), (131_073, 40)])
def test_outputs_too_large_for_caches_match_float64(shape: tuple[int, int]) -> None:
    """From 2²² values on they are written past the caches, if their rows are whole registers."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert x.numel() >= 2**22
    check_layer(x, BatchNorm(shape[1]))


def test_large_outputs_pass_relu_and_dropout_backwards_too() -> None:
    z = torch.randn(70_000, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    g, norm, dropout = torch.randn(z.shape), BatchNorm(64), Dropout(0.2)

    def gradient() -> Tensor:
        y = relu_dropout_norm(z, dropout, norm, stream(0, "dropout"))
        return torch.autograd.grad(y, z, g)[0]

    fused = gradient()
    with kernels.disabled():
        composed = gradient()
    assert (fused != 0).any()
    torch.testing.assert_close(fused, composed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("ratio", "bound"), [(1e3, 1e-3), (1e4, 1e-2)])
def test_large_means_keep_the_error_bounds(layout: str, ratio: float, bound: float) -> None:
    x = laid(torch.randn(16, 32, 12, 12, generator=torch.Generator().manual_seed(0)), layout)
    x = x + ratio
    x[0, :, 0, 0] = 0  # an outlier in the first place must not spoil what is relative to it
    norm = BatchNorm(32)
    y, mean, var = kernels.batch_norm(x, kernels.layout(x), norm.weight, norm.bias, norm.eps, None)
    expected_mean, expected_var = batch_moments(x.numpy())
    expected = batch_norm(x.numpy(), np.ones(32), np.zeros(32), norm.eps)
    assert np.abs(y.detach().numpy() - expected).max() <= bound
    np.testing.assert_allclose(mean.numpy(), expected_mean, rtol=1e-6)
    np.testing.assert_allclose(var.numpy(), expected_var, rtol=1e-5)
    assert (var >= 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [0.1, -1e6, 3e-39])
def test_constant_channels_give_beta_exactly(layout: str, value: float) -> None:
    x = laid(torch.full((7, 33, 5, 9), value), layout)
    norm = BatchNorm(33)
    nn.init.normal_(norm.bias)
    assert torch.equal(norm(x), norm.bias.view(1, -1, 1, 1).expand_as(x))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_visible_in_its_channel(layout: str, value: float) -> None:
    x = laid(torch.randn(4, 32, 6, 6), layout)
    x[2, 5, 3, 3] = value
    y = BatchNorm(32)(x)
    assert not y[:, 5].isfinite().any()
    assert y[:, :5].isfinite().all()
    assert y[:, 6:].isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_bits_do_not_depend_on_the_number_of_threads(layout: str) -> None:
    x = laid(torch.randn(40, 32, 20, 20), layout).requires_grad_()
    convolution = Conv2d(32, 64, padding=1, rng=stream(0, "conv"))
    results = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        y = convolution(BatchNorm(32)(x).contiguous(memory_format=torch.channels_last))
        grads = torch.autograd.grad(y, [x, *convolution.parameters()], torch.ones_like(y))
        results.append((y, *grads))
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


def test_running_statistics_move_as_without_kernels() -> None:
    for convention in ("keras", "torch", "onnx"):
        x = torch.randn(6, 32, 4, 4).contiguous(memory_format=torch.channels_last)
        compiled, plain = (BatchNorm(32, convention=convention) for _ in range(2))
        for step in range(3):
            compiled(x + step)
            with kernels.disabled():
                plain(x + step)
        torch.testing.assert_close(compiled.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("scale", "center"), [(False, False), (True, False), (False, True)])
def test_gamma_and_beta_are_optional(scale: bool, center: bool) -> None:
    x = torch.randn(6, 40, requires_grad=True)
    norm = BatchNorm(40, scale=scale, center=center)
    norm(x).square().sum().backward()
    ours = x.grad
    x.grad = None
    with kernels.disabled():
        norm(x).square().sum().backward()
    torch.testing.assert_close(ours, x.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "x",
    [
        torch.ones(2, 3, dtype=torch.float64),
        torch.ones(2, 3, dtype=torch.float16),
        torch.ones(3, 2).T,
        torch.ones(4, 6)[:, ::2],
        torch.ones(0, 3),
        torch.ones(2, 3, device="meta"),
    ],
    ids=["float64", "half", "transposed", "strided", "empty", "meta"],
)
def test_other_tensors_are_left_to_pytorch(x: Tensor) -> None:
    assert kernels.layout(x) is None


@pytest.mark.parametrize("shape", [(2, 32, 6, 8), (3, 32, 15, 15), (2, 5, 7, 3), (1, 17, 2, 2)])
def test_pooling_equals_pytorch_bit_for_bit(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(-2, 3, size=shape).astype(np.float32)  # few values: many ties
    values.flat[rng.integers(0, values.size, 5)] = np.nan
    x = torch.from_numpy(values).contiguous(memory_format=torch.channels_last).requires_grad_()
    ours, theirs = MaxPool2d(2)(x), max_pool2d(x, 2)
    assert "_MaxPool" in type(ours.grad_fn).__name__
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    g = torch.randn(ours.shape)
    (dx,), (expected,) = (torch.autograd.grad(y, [x], g) for y in (ours, theirs))
    assert torch.equal(dx, expected)


CONVOLVED = [
    ((2, 32, 8, 8), 64),
    ((3, 64, 15, 15), 32),
    ((1, 32, 1, 5), 32),
    ((3, 16, 15, 9), 48),
    ((2, 80, 8, 8), 16),
    ((1, 256, 6, 6), 256),
    ((9, 256, 12, 10), 256),  # sums too large for each thread to have its own, over several blocks
]


ROUNDING = {2: 2e-6, 4: 6e-6}  # of the largest value


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize(("shape", "c_out"), CONVOLVED)
def test_convolution_matches_float64(shape: tuple[int, ...], c_out: int, tile: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).contiguous(memory_format=torch.channels_last)
    convolution = Conv2d(shape[1], c_out, padding=1, rng=stream(0, "conv"))
    convolution.tiles = Tiles(tile)
    nn.init.normal_(convolution.bias, generator=generator)
    x.requires_grad_()
    y = convolution(x)
    assert "_Conv3x3" in type(y.grad_fn).__name__
    g = torch.randn(y.shape, generator=generator)
    ours = torch.autograd.grad(y, [x, *convolution.parameters()], g)
    wide = [t.detach().double().requires_grad_() for t in (x, *convolution.parameters())]
    expected = conv2d(*wide, padding=1)
    theirs = torch.autograd.grad(expected, wide, g.double())
    for a, b in zip((y, *ours), (expected, *theirs), strict=True):
        assert (a - b).abs().max() <= ROUNDING[tile] * b.abs().max()


def test_tiles_of_four_round_three_times_as_much_as_tiles_of_two() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 256, 16, 16, generator=generator)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(32, 256, 3, 3, generator=generator)
    expected = conv2d(x.double(), weight.double(), padding=1)
    errors = [(kernels.conv3x3(x, weight, None, Tiles(tile)) - expected).norm() for tile in (2, 4)]
    assert 2 < errors[1] / errors[0] < 4
    assert errors[1] < 2e-6 * expected.norm()


bfloat16 = pytest.mark.skipif(
    not kernels.has_bfloat16(), reason="no AVX512-BF16 here, or a compiler without it"
)
ODD = [  # tiles and channels in all sorts of numbers, so that pairs of both have a half to spare
    ((1, 16, 4, 4), 16),
    ((3, 24, 6, 10), 16),
    ((7, 32, 9, 5), 48),
    ((2, 40, 7, 7), 32),
    ((9, 48, 16, 15), 80),
    ((67, 16, 8, 8), 64),
    ((17, 256, 12, 10), 256),  # several blocks of tiles
    ((3, 32, 9, 5), 96),  # from here on AMX has them, too
    ((67, 64, 8, 8), 32),
    ((40, 32, 15, 16), 64),
]


@bfloat16
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize(("shape", "c_out"), ODD)
def test_small_whole_numbers_lose_nothing_in_bfloat16(
    shape: tuple[int, ...], c_out: int, pooled: bool
) -> None:
    """Tiles of 2 add and halve such numbers exactly, so every sum must be the right one."""
    generator = torch.Generator().manual_seed(0)

    def whole(*shape: int, times: int = 1) -> Tensor:
        return times * torch.randint(-1, 2, shape, generator=generator).float()

    x = whole(*shape).contiguous(memory_format=torch.channels_last)
    x.requires_grad_(shape[1] % 16 == 0)
    conv, pool = Conv2d(shape[1], c_out, padding=1, rng=stream(0, "conv")), MaxPool2d(2)
    conv.tiles = Tiles(2, bfloat16=True)
    conv.weight.data = whole(*conv.weight.shape, times=4)
    inputs = [t for t in (x, *conv.parameters()) if t.requires_grad]
    y = conv_pool(x, conv, pool) if pooled else conv(x)
    g = whole(*y.shape)
    ours = torch.autograd.grad(y, inputs, g)
    with kernels.disabled():
        expected = pool(conv(x)) if pooled else conv(x)
        theirs = torch.autograd.grad(expected, inputs, g)
    for a, b in zip((y, *ours), (expected, *theirs), strict=True):
        assert torch.equal(a, b)


@bfloat16
@pytest.mark.parametrize(("tile", "bound"), [(2, 0.006), (4, 0.018)])
@pytest.mark.parametrize(("shape", "c_out"), ODD)
def test_bfloat16_rounds_to_about_a_hundredth(
    shape: tuple[int, ...], c_out: int, tile: int, bound: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).contiguous(memory_format=torch.channels_last)
    x.requires_grad_(shape[1] % 16 == 0)
    conv = Conv2d(shape[1], c_out, padding=1, rng=stream(0, "conv"))
    conv.tiles = Tiles(tile, bfloat16=True)
    inputs = [t for t in (x, conv.weight) if t.requires_grad]
    y = conv(x)
    g = torch.randn(y.shape, generator=generator)
    ours = torch.autograd.grad(y, inputs, g)
    with kernels.disabled():
        expected = conv(x)
        theirs = torch.autograd.grad(expected, inputs, g)
    rounds = not conv.tiles.kernel(*shape[2:], shape[1], c_out).endswith(("by2", "by4"))
    assert rounds or kernels.has_amx()
    for a, b in zip((y, *ours), (expected, *theirs), strict=True):
        assert (a - b).norm() <= bound * b.norm()
        assert bool((a - b).norm() > 1e-4 * b.norm()) is rounds


@pytest.mark.parametrize(
    ("bfloat16", "amx", "of_16", "of_32"),
    [
        (False, False, "conv3x3_by4", "conv3x3_by4"),
        (True, False, "conv3x3_by4_bfloat16", "conv3x3_by4_bfloat16"),
        (True, True, "conv3x3_by4", "conv3x3_by4_amx"),
    ],
)
def test_the_processor_and_the_channels_decide_what_is_multiplied(
    monkeypatch: pytest.MonkeyPatch, bfloat16: bool, amx: bool, of_16: str, of_32: str
) -> None:
    monkeypatch.setattr(convolutions, "has_bfloat16", lambda: bfloat16)
    monkeypatch.setattr(convolutions, "has_amx", lambda: amx)
    tiles = Tiles(4, bfloat16=True)
    assert tiles.kernel(8, 8, 64, 32) == of_32
    assert tiles.kernel(8, 8, 64, 48) == tiles.kernel(8, 8, 24, 64) == of_16
    assert tiles.kernel(8, 2, 64, 32) == of_32.replace("by4", "by2")
    assert tiles._replace(bfloat16=False).kernel(8, 8, 64, 32) == "conv3x3_by4"


@bfloat16
def test_answers_of_a_network_that_does_not_learn_are_not_rounded() -> None:
    x = torch.randn(3, 32, 8, 8).contiguous(memory_format=torch.channels_last)
    conv, pool = Conv2d(32, 32, padding=1, rng=stream(0, "conv")).eval(), MaxPool2d(2)
    plain = conv(x), conv_pool(x, conv, pool)
    conv.tiles = Tiles(2, bfloat16=True)
    assert torch.equal(conv(x), plain[0])
    assert torch.equal(conv_pool(x, conv, pool), plain[1])
    assert not torch.equal(conv.train()(x), plain[0])


@pytest.mark.parametrize(("shape", "kinds"), [((3, 5, 7), 12), ((2, 32, 32), 16), ((1, 2, 1), 1)])
def test_whitening_matches_float64(shape: tuple[int, int, int], kinds: int) -> None:
    generator = torch.Generator().manual_seed(0)
    n, height, width = shape
    x = torch.rand(n, 3, height, width, generator=generator)
    x = x.contiguous(memory_format=torch.channels_last)
    half, mean = torch.randn(kinds, 3, 3, 3, generator=generator), torch.rand(3)
    filters = torch.cat([half, -half])
    assert kernels.whitens(x, filters)
    y = kernels.whiten(x, mean, filters)
    centred = x.double() - mean.double().view(3, 1, 1)
    expected = conv2d(centred, filters.double(), padding=1).relu()
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert (y - expected).abs().max() <= 2e-6 * expected.max()


@pytest.mark.parametrize(("flip", "reach"), [(False, 0), (True, 0), (False, 2), (True, 4)])
def test_pixels_are_read_as_pytorch_has_them(flip: bool, reach: int) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (7, 5, 9, 3), np.uint8)
    images.setflags(write=False)  # as the cache's are
    chosen = rng.integers(0, 7, 12)
    vary = Augmentation(
        rng.random(7) < 0.5 if flip else None,
        rng.integers(-reach, reach + 1, (7, 2)) if reach else None,
        reach,
    )
    assert kernels.reads(images, "cpu", reach)
    found = vary(images, chosen)
    with kernels.disabled():
        expected = vary(images, chosen)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found, expected)
    assert torch.equal(kernels.read(images, np.arange(7)), to_input(images))


def test_pixels_of_other_kinds_are_left_to_pytorch() -> None:
    images = np.zeros((2, 4, 6, 3), np.uint8)
    assert not kernels.reads(images, "cpu", 4)  # no reflection reaches so far
    assert not kernels.reads(images[:, ::2], "cpu")
    assert not kernels.reads(images.astype(np.float32), "cpu")
    assert not kernels.reads(images[..., :1], "cpu")
    assert not kernels.reads(images, "meta")


def test_whitening_passes_on_what_is_not_finite_and_leaves_the_rest_to_pytorch() -> None:
    x = torch.rand(1, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    half, mean = torch.randn(4, 3, 3, 3), torch.zeros(3)
    filters = torch.cat([half, -half])
    x[0, 1, 2, 2] = float("nan")
    assert kernels.whiten(x, mean, filters)[0, :, 1:4, 1:4].isnan().all()
    assert not kernels.whitens(x, torch.cat([half, half]))
    assert not kernels.whitens(x, torch.cat([filters] * 5))
    assert not kernels.whitens(x.double(), filters)
    assert not kernels.whitens(x.requires_grad_(), filters)


def test_without_the_instructions_nothing_is_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolutions, "has_bfloat16", lambda: False)
    x = torch.randn(3, 32, 8, 8).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(16, 32, 3, 3)
    by = [kernels.conv3x3(x, weight, None, Tiles(4, half)) for half in (False, True)]
    assert torch.equal(*by)


def test_maps_of_two_pixels_are_one_tile_of_two() -> None:
    x = torch.randn(3, 32, 2, 5).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(16, 32, 3, 3)
    by = [kernels.conv3x3(x, weight, None, Tiles(tile)) for tile in (2, 4)]
    assert torch.equal(*by)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize(("c_in", "c_out"), [(24, 16), (8, 48), (40, 32)])
def test_an_input_of_half_a_strip_needs_no_gradient(c_in: int, c_out: int, pooled: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, c_in, 10, 6, generator=generator)
    x = x.contiguous(memory_format=torch.channels_last)
    conv, pool = Conv2d(c_in, c_out, padding=1, rng=stream(0, "conv")), MaxPool2d(2)
    y = conv_pool(x, conv, pool) if pooled else conv(x)
    assert ("_ConvPool" if pooled else "_Conv3x3") in type(y.grad_fn).__name__
    wide = [t.detach().double().requires_grad_() for t in conv.parameters()]
    expected = conv2d(x.double(), *wide, padding=1)
    expected = max_pool2d(expected, 2) if pooled else expected
    g = torch.randn(y.shape, generator=generator)
    ours = torch.autograd.grad(y, list(conv.parameters()), g)
    theirs = torch.autograd.grad(expected, wide, g.double())
    for a, b in zip((y, *ours), (expected, *theirs), strict=True):
        assert (a - b).abs().max() <= 2e-6 * b.abs().max()
    # PyTorch computes the gradient of an input whose channels do not fill the strips.
    x.requires_grad_()
    asking = conv_pool(x, conv, pool) if pooled else conv(x)
    (ours_dx,) = torch.autograd.grad(asking, [x], g)
    wide_x = x.detach().double().requires_grad_()
    expected = conv2d(wide_x, *wide, padding=1)
    expected = max_pool2d(expected, 2) if pooled else expected
    (theirs_dx,) = torch.autograd.grad(expected, [wide_x], g.double())
    assert (ours_dx - theirs_dx).abs().max() <= 2e-6 * theirs_dx.abs().max()


WINDOWED = [
    ((2, 32, 8, 8), 64),
    ((4, 16, 8, 6), 16),
    ((3, 48, 9, 8), 80),
    ((3, 64, 15, 15), 32),
    ((40, 32, 15, 16), 64),  # several partial sums, over other tiles than without pooling
    ((5, 32, 7, 9), 32),
    ((2, 32, 3, 2), 32),
]


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "c_out"), WINDOWED)
def test_convolution_with_pooling_is_one_after_the_other(
    shape: tuple[int, ...], c_out: int, bias: bool, tile: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).contiguous(memory_format=torch.channels_last)
    conv = Conv2d(shape[1], c_out, padding=1, bias=bias, rng=stream(0, "conv"))
    conv.tiles = Tiles(tile)
    conv.weight.data[1] = 0  # ties in every window, where the first value counts
    if conv.bias is not None:
        nn.init.normal_(conv.bias, generator=generator)
    inputs, pool = [x.requires_grad_(), *conv.parameters()], MaxPool2d(2)
    y, expected = conv_pool(x, conv, pool), pool(conv(x))
    assert "_ConvPool" in type(y.grad_fn).__name__
    assert torch.equal(y, expected)
    g = torch.randn(y.shape, generator=generator)
    ours, theirs = (torch.autograd.grad(out, inputs, g) for out in (y, expected))
    direct = (
        conv.tiles.kernel(*shape[2:], shape[1], c_out) == "conv3x3_by2" and shape[1] % 32 == 0
    )  # test_pooled.py
    assert direct or torch.equal(ours[0], theirs[0])
    for a, b in zip(ours, theirs, strict=True):  # sums over tiles, of which there are fewer
        assert (a - b).abs().max() <= 1e-6 * b.abs().max()


def test_pooling_behind_a_convolution_passes_on_what_is_not_finite() -> None:
    x = torch.zeros(1, 32, 9, 9).contiguous(memory_format=torch.channels_last)
    x[0, 3, 4, 4] = float("nan")
    y = conv_pool(x, Conv2d(32, 32, padding=1, rng=stream(0, "conv")), MaxPool2d(2))
    assert not y[0, :, 1:3, 1:3].isfinite().any()
    assert y[0, :, 0].isfinite().all()


def test_hooks_see_the_map_between_convolution_and_pooling() -> None:
    x = torch.randn(2, 32, 8, 8).contiguous(memory_format=torch.channels_last)
    conv, pool = Conv2d(32, 32, padding=1, rng=stream(0, "conv")), MaxPool2d(2)
    seen: list[Tensor] = []
    with kernels.disabled():
        expected = conv_pool(x, conv, pool)
    handle = conv.register_forward_hook(lambda *args: seen.append(args[2]))
    y = conv_pool(x, conv, pool)
    handle.remove()
    assert [m.shape for m in seen] == [(2, 32, 8, 8)]
    assert torch.equal(y, conv_pool(x, conv, pool))
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize(
    ("c_in", "tiles"),
    [(3, Tiles(2)), (32, Tiles(2)), (32, Tiles(4)), (32, Tiles(4, bfloat16=True))],
)
def test_the_bits_of_convolutions_do_not_depend_on_the_number_of_threads(
    c_in: int, tiles: Tiles
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, c_in, 16, 15, generator=generator)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_(c_in > 3)
    norm, pool = BatchNorm(3), MaxPool2d(2)
    conv = Conv2d(c_in, 32, padding=int(c_in > 3), rng=stream(0, "conv"))
    conv.tiles = tiles
    results: list[tuple[Tensor, ...]] = []
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        y = conv_pool(x, conv, pool) if c_in > 3 else norm_conv(x, norm, conv)
        inputs = [t for t in (x, *conv.parameters()) if t.requires_grad]
        results.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
    torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize(
    ("shape", "c_out"), [((4, 3, 32, 32), 32), ((3, 3, 9, 8), 64), ((1, 3, 3, 11), 32)]
)
def test_convolution_of_pixels_matches_float64(shape: tuple[int, ...], c_out: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(c_out, 3, 3, 3, generator=generator), torch.randn(c_out)
    assert kernels.convolves_pixels(x, weight)
    gamma, beta = torch.randn(3, generator=generator), torch.randn(3, generator=generator)
    y = kernels.conv_pixels(x, weight, bias, gamma, beta)
    g = torch.randn(y.shape, generator=generator)
    ours = kernels.conv_pixels_gradients(x, weight, g, gamma, beta)
    wide = [t.double().requires_grad_() for t in (weight, bias, gamma, beta)]
    scale, shift = (t[:, None, None] for t in wide[2:])
    expected = conv2d(x.double() * scale + shift, *wide[:2])
    theirs = torch.autograd.grad(expected, wide, g.double())
    for a, b in zip((y, *ours), (expected, *theirs), strict=True):
        assert (a - b).abs().max() <= 1e-6 * b.abs().max()


@pytest.mark.parametrize(
    ("shape", "kernel"),
    [
        ((2, 3, 9, 7), (32, 3, 3, 3)),  # too narrow for the windows worked on together
        ((2, 3, 9, 9), (24, 3, 3, 3)),
        ((2, 3, 9, 9), (32, 3, 5, 5)),
        ((2, 1, 9, 9), (32, 1, 3, 3)),
    ],
)
def test_other_convolutions_of_pixels_are_left_to_pytorch(
    shape: tuple[int, ...], kernel: tuple[int, ...]
) -> None:
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    assert not kernels.convolves_pixels(x, torch.randn(kernel))
    assert not kernels.convolves_pixels(x.contiguous(), torch.randn(32, 3, 3, 3))


def test_a_convolution_may_have_no_bias() -> None:
    x = torch.randn(2, 32, 6, 6).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(32, 32, 3, 3, requires_grad=True)
    grads = []
    for convolve in (conv3x3, lambda *args: conv2d(*args, padding=1)):
        grads += torch.autograd.grad(convolve(x, weight, None).square().sum(), [weight])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-2)


def test_channels_that_do_not_fit_are_refused() -> None:
    x = torch.randn(2, 32, 6, 6).contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="to have 64 channels"):
        conv3x3(x, torch.randn(32, 64, 3, 3), None)


def test_convolution_passes_on_what_is_not_finite() -> None:
    x = torch.zeros(1, 32, 9, 9).contiguous(memory_format=torch.channels_last)
    x[0, 3, 4, 4] = float("nan")
    y = Conv2d(32, 32, padding=1, rng=stream(0, "conv"))(x)
    assert not y[0, :, 3:6, 3:6].isfinite().any()


def test_disabled_is_nested_and_ends() -> None:
    with kernels.disabled():
        with kernels.disabled():
            assert not kernels.available()
        assert not kernels.available()
    assert kernels.available()


def test_a_backward_pass_ends_as_it_began() -> None:
    x = torch.randn(6, 40, requires_grad=True)
    y = BatchNorm(40)(x)
    with kernels.disabled():
        y.square().sum().backward()
    assert x.grad is not None


PROGRAM = """
import torch, normlab
from normlab import kernels
from normlab.layers import BatchNorm
from normlab.kernels.memory import keep_freed_memory
torch.set_num_threads(2)
keep_freed_memory()
y = BatchNorm(32)(torch.randn(64, 32, 20, 20).contiguous(memory_format=torch.channels_last))
print(kernels.available(), bool(y.isfinite().all()))
"""


def run(program: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("library", ["missing", "damaged"])
def test_without_a_library_pytorch_does_the_work(tmp_path: Path, library: str) -> None:
    package = Path(normlab.__file__).parent
    shutil.copytree(package, tmp_path / "normlab", ignore=shutil.ignore_patterns("*.so", "*.c"))
    if library == "damaged":
        for variant in ("default", "avx2", "avx512"):
            (tmp_path / "normlab" / "kernels" / f"_{variant}.so").write_bytes(b"no library")
    output = run(PROGRAM, PYTHONPATH=str(tmp_path), PYTHONSAFEPATH="1")
    assert output.split() == ["False", "True"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_runtime_serves_both() -> None:
    program = PROGRAM + "print(open('/proc/self/maps').read())"
    output = run(program, PYTHONPATH=str(Path(normlab.__file__).parents[1]))
    assert output.startswith("True True")
    assert len(set(re.findall(r"/\S*/lib(?:gomp|iomp|omp)\S*", output))) == 1


def test_a_library_with_other_signatures_is_not_used() -> None:
    program = "from normlab.kernels import library as l; l.INTERFACE += 1; print(l.available())"
    assert run(program, PYTHONPATH=str(Path(normlab.__file__).parents[1])).split() == ["False"]
