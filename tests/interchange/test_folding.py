"""Folding changes no answer: in float64, against the unfolded steps and the networks themselves."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from chains import computed
from normlab import UserError
from normlab.interchange.folding import PRECISION_LIMIT, fold, fold_before
from normlab.interchange.steps import (
    Affine,
    Chain,
    Clip,
    Conv,
    Dense,
    Flatten,
    MaxPool,
    Norm,
    Relu,
    chain_of,
)
from normlab.layers import BatchNorm
from normlab.models import FastNet, NotebookNet


def random_norm(rng: np.random.Generator, channels: int, *, positive: bool = False) -> Norm:
    """A normalisation with γ of both signs, and one that is 0."""
    gamma = rng.normal(size=channels)
    gamma[0] = 0
    return Norm(
        "norm",
        rng.normal(size=channels),
        rng.uniform(0.1, 3, channels),
        np.abs(gamma) if positive else gamma,
        rng.normal(size=channels),
    )


def random_conv(rng: np.random.Generator, c_in: int, c_out: int, **shape: int) -> Conv:
    k = shape.pop("k", 3)
    kernel = rng.normal(size=(c_out, c_in, k, k))
    return Conv(f"conv{c_out}", kernel, rng.normal(size=c_out), **shape)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    size=st.integers(5, 9),
    k=st.sampled_from([1, 3, 4]),
    padding=st.integers(0, 2),
    stride=st.integers(1, 2),
)
def test_a_norm_before_a_convolution(
    seed: int, size: int, k: int, padding: int, stride: int
) -> None:
    rng = np.random.default_rng(seed)
    conv = random_conv(rng, 4, 3, k=k, padding=padding, stride=stride)
    chain = Chain(size, (random_norm(rng, 4), conv))
    folded = fold(chain)
    assert [type(s) for s in folded.steps] == [Conv]
    assert folded.unfolded == ()
    x = rng.normal(size=(2, 4, size, size))
    np.testing.assert_allclose(computed(folded, x), computed(chain, x), rtol=0, atol=1e-11)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), pooled=st.booleans(), positive=st.booleans())
def test_a_norm_behind_a_convolution(seed: int, pooled: bool, positive: bool) -> None:
    rng = np.random.default_rng(seed)
    norm = random_norm(rng, 5, positive=positive)
    pools = (MaxPool(),) if pooled else ()
    chain = Chain(7, (random_conv(rng, 3, 5, padding=1), *pools, norm, Relu()))
    folded = fold(chain)
    exact = not pooled or bool((norm.gamma >= 0).all())
    assert any(isinstance(s, Norm) for s in folded.steps) != exact
    assert (folded.unfolded == ()) == exact
    x = rng.normal(size=(2, 3, 7, 7))
    np.testing.assert_allclose(computed(folded, x), computed(chain, x), rtol=0, atol=1e-11)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    size=st.integers(5, 9),
    order=st.permutations(["relu", "pool"]),
    pooled=st.booleans(),
    k=st.sampled_from([3, 4]),
    padding=st.integers(1, 3),
    opposite=st.booleans(),
)
def test_a_norm_between_relu_and_a_padded_convolution(
    seed: int, size: int, order: list[str], pooled: bool, k: int, padding: int, opposite: bool
) -> None:
    """What 0 becomes has the sign opposite to γ's, as one bound demands, or any sign."""
    rng = np.random.default_rng(seed)
    norm = random_norm(rng, 5)
    if opposite:  # b = β − a·μ is −|b|·sign(a); any where γ is 0
        sign = np.where(norm.gamma < 0, 1, -1)
        norm.beta[1:] = (norm.scale * norm.mean + sign * rng.uniform(1e-3, 2, 5))[1:]
    else:
        norm.beta[3] = norm.scale[3] * norm.mean[3] + np.sign(norm.gamma[3])
    middle = [{"relu": Relu(), "pool": MaxPool()}[s] for s in order if pooled or s == "relu"]
    first = random_conv(rng, 3, 5, padding=1)
    chain = Chain(size, (first, *middle, norm, random_conv(rng, 5, 4, k=k, padding=padding)))
    folded = fold(chain)
    kinds = {type(s) for s in folded.steps}
    assert kinds == {
        Conv,
        *([MaxPool] if pooled else []),
        *([Clip] if opposite else [Relu, Affine]),
    }
    assert ("what it makes of 0 has the sign of" in "".join(folded.unfolded)) != opposite
    x = rng.normal(size=(2, 3, size, size))
    expected = computed(chain, x)
    np.testing.assert_allclose(computed(folded, x), expected, rtol=1e-11, atol=1e-10)


def test_a_bound_too_near_to_nothing_is_not_divided_by() -> None:
    rng = np.random.default_rng(4)
    norm = random_norm(rng, 4, positive=True)
    norm.beta[:] = norm.scale * norm.mean - np.array([1, 1, 1, 1e-9])
    conv = random_conv(rng, 4, 2, padding=1)
    assert isinstance(fold(Chain(6, (conv, Relu(), norm, conv))).steps[2], Affine)


def test_pixels_keep_the_subtraction_of_their_mean() -> None:
    rng = np.random.default_rng(5)
    norm = random_norm(rng, 3)
    norm.beta[:] = 0
    chain = Chain(6, (norm, random_conv(rng, 3, 2, padding=1)))
    folded = fold(chain)
    assert [type(s) for s in folded.steps] == [Affine, Conv]
    assert folded.unfolded == ()
    x = rng.normal(size=(2, 3, 6, 6))
    np.testing.assert_allclose(computed(folded, x), computed(chain, x), rtol=0, atol=1e-11)


@pytest.mark.parametrize(("size", "trim"), [(6, 0), (7, 1)])
def test_what_a_pooling_leaves_out_is_not_computed(size: int, trim: int) -> None:
    rng = np.random.default_rng(6)
    conv = random_conv(rng, 3, 4, padding=1)
    norm = random_norm(rng, 3)  # what it adds at the border is trimmed, too
    chain = Chain(size, (norm, conv, MaxPool(), Relu(), random_conv(rng, 4, 2, padding=1)))
    folded = fold(chain)
    assert [s.trim for s in folded.steps if isinstance(s, Conv)] == [trim, 0]
    x = rng.normal(size=(2, 3, size, size))
    np.testing.assert_allclose(computed(folded, x), computed(chain, x), rtol=0, atol=1e-11)


def test_a_norm_before_a_dense_layer() -> None:
    rng = np.random.default_rng(0)
    dense = Dense("dense", rng.normal(size=(3, 6)), rng.normal(size=3))
    chain = Chain(1, (Flatten(), random_norm(rng, 6), dense))
    folded = fold(chain)
    assert [type(s) for s in folded.steps] == [Flatten, Dense]
    x = rng.normal(size=(4, 6, 1, 1))
    np.testing.assert_allclose(computed(folded, x), computed(chain, x), atol=1e-12)


def test_the_border_has_nine_values() -> None:
    rng = np.random.default_rng(1)
    conv = random_conv(rng, 4, 2, padding=1)
    folded = fold_before(random_norm(rng, 4), conv)
    assert isinstance(folded, Conv)
    only = replace(folded, kernel=np.zeros_like(folded.kernel))
    added = computed(Chain(8, (only,)), np.zeros((1, 4, 8, 8)))[0]
    for values in added:
        assert len(np.unique(values.round(10))) == 9
        assert np.ptp(values[1:-1, 1:-1]) < 1e-12


@pytest.mark.parametrize(("ratio", "left"), [(0.9, 0), (1.1, 1)])
def test_large_means_stay(ratio: float, left: int) -> None:
    rng = np.random.default_rng(2)
    norm = random_norm(rng, 4)
    norm.mean[3], norm.std[3] = -ratio * PRECISION_LIMIT * 0.01, 0.01
    folded = fold(Chain(6, (norm, random_conv(rng, 4, 2, padding=1))))
    assert sum(isinstance(s, Norm) for s in folded.steps) == left
    assert ["not folded: |mean|/std reaches 110" in s for s in folded.unfolded] == [True] * left


def scrambled(model: nn.Module, seed: int = 0) -> nn.Module:
    """`model` in float64 with statistics, γ (zero and negative ones, too) and β at random."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.running_mean.normal_(0, 0.5, generator=generator)
            module.running_var.uniform_(0.2, 2, generator=generator)
            assert module.weight is not None
            assert module.bias is not None
            with torch.no_grad():
                module.weight.normal_(0.5, 0.5, generator=generator)
                module.bias.normal_(0, 0.5, generator=generator)
                module.weight[0] = 0
    return model.double().eval()


skipping = partial(FastNet, stages=((8, 8, 8), (12,), (16, 16, 16, 16)))


@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize(
    "network",
    [NotebookNet, FastNet, skipping, partial(skipping, norm_position="after")],
    ids=["notebook", "fast", "skipping", "skipping, norm after"],
)
@pytest.mark.parametrize("size", [17, 32])
def test_networks_fold_to_what_they_compute(
    network: Callable[..., nn.Module], norm: str, size: int
) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (6, size, size, 3)).astype(np.uint8)
    model = network(image_size=size, norm=norm)
    if isinstance(model, FastNet):
        model.fit_to(pixels)
    model = scrambled(model)
    x = pixels.transpose(0, 3, 1, 2).astype(np.float64)
    with torch.no_grad():
        expected = model(torch.from_numpy(x) / 255).numpy()
    chain = chain_of(model, size)
    folded = fold(chain)
    np.testing.assert_allclose(computed(chain, x), expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(computed(folded, x), expected, rtol=1e-9, atol=1e-9)
    if isinstance(model, NotebookNet):
        assert not any(isinstance(s, Norm) for s in folded.steps)


def test_other_networks_are_refused() -> None:
    with pytest.raises(UserError, match="network Linear cannot be exported"):
        chain_of(nn.Linear(2, 2), 32)
    model = NotebookNet()
    model.batch_normalization_1 = nn.GroupNorm(1, 32)
    with pytest.raises(UserError, match="normaliser GroupNorm cannot be exported"):
        chain_of(model, 32)
