"""The layer against second implementations, closed forms and its own promises."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from normlab import BatchNorm, UserError
from normlab.layers import CONVENTIONS, moments, normalize

SHAPES = st.integers(2, 5).flatmap(
    lambda ndim: st.tuples(
        st.integers(2, 9), st.integers(1, 20), *[st.integers(1, 7) for _ in range(ndim - 2)]
    )
)


def random_layer(channels: int, seed: int = 0, **options: object) -> BatchNorm:
    torch.manual_seed(seed)
    layer = BatchNorm(channels, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(1, 0.5)
    return layer


@given(shape=SHAPES, seed=st.integers(0, 2**31), convention=st.sampled_from(sorted(CONVENTIONS)))
@settings(max_examples=400, deadline=None)
def test_output_and_gradients_match_the_paper_in_float64(
    shape: tuple[int, ...], seed: int, convention: str
) -> None:
    layer = random_layer(shape[1], seed, convention=convention).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    g = torch.randn(shape, dtype=torch.float64)
    y = layer(x)
    y.backward(g)
    gamma, beta = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    expected = oracle.batch_norm(x.detach(), gamma, beta, layer.eps)
    dx, dgamma, dbeta = oracle.batch_norm_gradients(x.detach(), gamma, layer.eps, g)
    np.testing.assert_allclose(y.detach(), expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(x.grad, dx, rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(layer.weight.grad, dgamma, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(layer.bias.grad, dbeta, rtol=1e-9, atol=1e-9)


@given(shape=SHAPES, seed=st.integers(0, 2**31), channels_last=st.booleans())
@settings(max_examples=200, deadline=None)
def test_float32_is_within_rounding_of_float64_in_any_layout(
    shape: tuple[int, ...], seed: int, channels_last: bool
) -> None:
    layer = random_layer(shape[1], seed)
    x = torch.randn(shape)
    if channels_last and len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    g = torch.randn(shape)
    y = layer(x)
    y.backward(g)
    gamma, beta = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    dx, _, _ = oracle.batch_norm_gradients(x.detach(), gamma, layer.eps, g)
    expected = oracle.batch_norm(x.detach(), gamma, beta, layer.eps)
    np.testing.assert_allclose(y.detach(), expected, rtol=1e-4, atol=1e-4)
    # The gradient is of the size γ/√(σ² + ε), which is large where a channel hardly varies.
    scale = np.abs(gamma).max() / np.sqrt(oracle.batch_moments(x.detach())[1].min() + layer.eps)
    np.testing.assert_allclose(x.grad, dx, atol=2e-5 * max(1.0, float(scale)) * 10)
    assert y.stride() == x.stride()


@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 5), (3, 2, 3, 4), (2, 2, 2, 3, 2)])
@pytest.mark.parametrize(("scale", "center"), [(True, True), (False, True), (True, False)])
def test_gradients_match_numerical_ones(shape: tuple[int, ...], scale: bool, center: bool) -> None:
    layer = random_layer(shape[1], scale=scale, center=center).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def call(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *layer.parameters()))


@pytest.mark.parametrize("shape", [(6, 3), (4, 2, 3, 3)])
def test_the_gradient_of_the_gradient_matches_a_numerical_one(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    norm = BatchNorm(shape[1]).double()
    assert torch.autograd.gradgradcheck(norm, (x,))


def test_the_compiled_layer_has_a_gradient_of_the_gradient() -> None:
    x = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    norm, reference = BatchNorm(3), BatchNorm(3).double()

    def penalty(norm: BatchNorm, x: torch.Tensor) -> torch.Tensor:
        (gradient,) = torch.autograd.grad(norm(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    torch.testing.assert_close(
        penalty(norm, x), penalty(reference, x.double()).float(), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("convention", sorted(CONVENTIONS))
def test_running_statistics_follow_the_closed_form(convention: str) -> None:
    """After t batches r_t = m^t·r_0 + (1 − m)·Σ m^(t−i)·batch_i."""
    layer = BatchNorm(4, convention=convention).double()
    batches = torch.randn(7, 6, 4, 3, 3, dtype=torch.float64) * 3 + 1
    m, count = layer.decay, 6 * 9
    unbiased = count / (count - 1) if convention == "torch" else 1.0
    for x in batches:
        layer(x)
    weights = [(1 - m) * m ** (7 - i) for i in range(1, 8)]
    stats = [oracle.batch_moments(x) for x in batches]
    mean = sum(w * s[0] for w, s in zip(weights, stats, strict=True))
    var = m**7 + sum(w * s[1] * unbiased for w, s in zip(weights, stats, strict=True))
    np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-12)
    np.testing.assert_allclose(layer.running_var, var, rtol=1e-12)
    assert layer.num_batches_tracked == 7


@pytest.mark.parametrize("shape", [(8, 5), (8, 5, 3), (8, 5, 3, 4), (4, 5, 2, 3, 2)])
def test_torch_convention_equals_torch(shape: tuple[int, ...]) -> None:
    theirs = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d}.get(
        len(shape), torch.nn.BatchNorm3d
    )(shape[1])
    ours = BatchNorm(shape[1], convention="torch")
    ours.load_state_dict(theirs.state_dict())  # the state's names are PyTorch's
    for step in range(3):
        torch.manual_seed(step)
        x = torch.randn(shape) * 2 + 3
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    x = torch.randn(shape)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)


def test_keras_convention_equals_keras() -> None:
    import keras

    theirs = keras.layers.BatchNormalization(axis=1)
    theirs.build((None, 5, 4, 4))
    ours = BatchNorm(5)
    for step in range(4):
        torch.manual_seed(step)
        x = torch.randn(6, 5, 4, 4) * 2 + 1
        torch.testing.assert_close(ours(x), theirs(x, training=True), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.running_mean, theirs.moving_mean.value.data)
    torch.testing.assert_close(
        ours.running_var, theirs.moving_variance.value.data, rtol=1e-5, atol=1e-6
    )
    x = torch.randn(6, 5, 4, 4)
    expected = theirs(x, training=False)
    torch.testing.assert_close(ours.eval()(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("ratio", "bound"), [(1e3, 1e-3), (1e4, 1e-2)])
@pytest.mark.parametrize("shape", [(32, 8, 30, 30), (256, 4, 15, 15), (256, 16)])
def test_a_large_mean_costs_little_precision(
    ratio: float, bound: float, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    x = (torch.randn(shape, dtype=torch.float64) + ratio).float()
    for layout in (torch.contiguous_format, torch.channels_last):
        if layout is torch.channels_last and len(shape) != 4:
            continue
        layer = BatchNorm(shape[1])
        y = layer(x.contiguous(memory_format=layout))
        expected = oracle.batch_norm(x, np.ones(shape[1]), np.zeros(shape[1]), layer.eps)
        assert np.abs(y.detach().numpy() - expected).max() <= bound


@given(
    value=st.floats(-(2.0**99), 2.0**99, width=32),
    count=st.integers(2, 400),
    eps=st.sampled_from([1e-3, 1e-5, 1e-12]),
)
@settings(max_examples=200, deadline=None)
def test_constant_channels_give_exactly_beta(value: float, count: int, eps: float) -> None:
    layer = random_layer(3, eps=eps)
    x = torch.full((count, 3), value)
    mean, var = moments(x)
    assert (mean == x[0]).all()
    assert (var == 0).all()
    torch.testing.assert_close(layer(x), layer.bias.expand(count, 3), rtol=0, atol=0)


@given(seed=st.integers(0, 2**31), exponent=st.integers(-18, 15))
@settings(max_examples=200, deadline=None)
def test_variance_is_never_negative(seed: int, exponent: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(16, 6) * 10.0**exponent + torch.randn(6) * 10.0 ** (exponent + 3)
    _, var = moments(x)
    assert (var >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_have_float32_statistics(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(512, 4, 8, 8) * 0.1 + 30).to(dtype)
    layer = BatchNorm(4)
    y = layer(x)
    assert y.dtype == dtype
    assert layer.running_mean.dtype == torch.float32
    expected = oracle.batch_norm(x.float(), np.ones(4), np.zeros(4), layer.eps)
    np.testing.assert_allclose(y.detach().float(), expected, rtol=1e-2, atol=1e-2)
    y.sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32


def test_one_value_a_channel_is_refused_with_a_remedy() -> None:
    layer = BatchNorm(4)
    with pytest.raises(UserError, match="two or more"):
        layer(torch.randn(1, 4))
    assert layer.num_batches_tracked == 0
    layer(torch.randn(1, 4, 2, 1))  # two values a channel are enough
    layer.eval()(torch.randn(1, 4))


@pytest.mark.parametrize("shape", [(4,), (2, 3), (1, 2, 4, 4, 4, 4)])
def test_other_shapes_are_refused_by_name(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"takes 2 to 5 dimensions, the second of size 4"):
        BatchNorm(4)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"convention": "tf"}, "keras, torch, onnx"),
        ({"momentum": 1.5}, "from 0 to 1"),
        ({"eps": -1.0}, "≥ 0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], word: str) -> None:
    with pytest.raises(UserError, match=word):
        BatchNorm(4, **options)


def test_frozen_stays_frozen_through_train() -> None:
    layer = random_layer(3)
    layer(torch.randn(8, 3))
    layer.freeze()
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(8, 3) * 5 + 2
    y = torch.nn.Sequential(layer).train()(x)
    expected = normalize(
        x, layer.running_mean, layer.running_var, layer.weight, layer.bias, layer.eps
    )
    torch.testing.assert_close(y, expected)
    assert not y.requires_grad
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])
    layer.freeze(False)
    layer(x)
    assert layer.num_batches_tracked == 2
    assert layer.weight.requires_grad


def test_evaluation_uses_running_statistics_and_changes_nothing() -> None:
    layer = random_layer(3).eval()
    with torch.no_grad():
        layer.running_mean.copy_(torch.tensor([1.0, 2, 3]))
        layer.running_var.copy_(torch.tensor([4.0, 9, 16]))
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(5, 3)
    x_hat = (x - torch.tensor([1.0, 2, 3])) / torch.sqrt(torch.tensor([4.0, 9, 16]) + 1e-3)
    torch.testing.assert_close(layer(x), x_hat * layer.weight + layer.bias)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_evaluation_mode_has_gradients() -> None:
    layer = random_layer(3).double().eval()
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


def test_non_finite_input_is_not_hidden() -> None:
    x = torch.randn(8, 3)
    x[2, 1] = float("inf")
    y = BatchNorm(3)(x)
    assert not torch.isfinite(y[:, 1]).all()
    assert torch.isfinite(y[:, [0, 2]]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ghost_batches_are_layers_on_the_pieces(dtype: torch.dtype) -> None:
    """Outputs and gradients piece by piece; running statistics see the mean of the pieces."""
    x = torch.randn(10, 3, 4, 4, dtype=dtype, generator=torch.Generator().manual_seed(0))
    g = torch.randn(10, 3, 4, 4, dtype=dtype)
    ghost, x_ghost = random_layer(3, ghost=4).to(dtype), x.clone().requires_grad_()
    y = ghost(x_ghost)
    y.backward(g)
    plain, found = random_layer(3).to(dtype), []
    x_plain, statistics = x.clone().requires_grad_(), []
    for a, b in ((0, 4), (4, 8), (8, 10)):
        plain.reset_running_stats()
        found.append(plain(x_plain[a:b]))
        statistics.append((plain.running_mean.clone(), plain.running_var.clone()))
    torch.cat(found).backward(g)
    torch.testing.assert_close(y, torch.cat(found))
    torch.testing.assert_close(x_ghost.grad, x_plain.grad)
    torch.testing.assert_close(ghost.weight.grad, plain.weight.grad)
    torch.testing.assert_close(ghost.bias.grad, plain.bias.grad)
    means, variances = zip(*statistics, strict=True)
    torch.testing.assert_close(ghost.running_mean, torch.stack(means).mean(0))
    torch.testing.assert_close(ghost.running_var, torch.stack(variances).mean(0))
    assert int(ghost.num_batches_tracked) == 1


@pytest.mark.parametrize("convention", ["keras", "torch"])
def test_a_ghost_batch_of_one_value_is_refused(convention: str) -> None:
    with pytest.raises(UserError, match="a piece holds 1 value a channel"):
        BatchNorm(5, ghost=1, convention=convention)(torch.randn(9, 5))
    assert BatchNorm(5, ghost=1, convention=convention)(torch.randn(9, 5, 2)).isfinite().all()


def test_a_ghost_batch_of_the_whole_batch_is_the_layer_and_a_single_value_joins() -> None:
    x = torch.randn(9, 5)
    for ghost in (9, 20):
        torch.testing.assert_close(BatchNorm(5, ghost=ghost)(x), BatchNorm(5)(x))
    pieces = BatchNorm(5, ghost=4).pieces(x)
    assert [len(piece) for piece in pieces] == [4, 5]
    frozen = BatchNorm(5, ghost=4).freeze()
    torch.testing.assert_close(frozen(x), BatchNorm(5).eval()(x))
    layer = BatchNorm(3, ghost=3).double()
    assert torch.autograd.gradcheck(layer, (torch.randn(7, 3).double().requires_grad_(),))
    assert torch.autograd.gradgradcheck(layer, (torch.randn(6, 3).double().requires_grad_(),))
    with pytest.raises(UserError, match="ghost=0"):
        BatchNorm(3, ghost=0)
