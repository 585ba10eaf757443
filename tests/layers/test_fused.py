"""The fused stages equal the layers that they stand for."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu
from torch.nn.modules.module import register_module_forward_hook

from normlab import kernels
from normlab.core.streams import stream
from normlab.layers import (
    BatchNorm,
    Conv2d,
    Dropout,
    LayerNorm,
    MaxPool2d,
    NoNorm,
    conv_pool,
    norm_add_relu,
    norm_conv,
    norm_relu,
    relu_dropout,
    relu_dropout_norm,
)
from normlab.models import NotebookNet


def images(*shape: int) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


def random_norm(channels: int) -> BatchNorm:
    norm = BatchNorm(channels)
    generator = torch.Generator().manual_seed(2)
    nn.init.uniform_(norm.weight, 0.5, 2, generator=generator)
    nn.init.normal_(norm.bias, generator=generator)
    return norm


@pytest.mark.parametrize("rate", [0.0, 0.2, None])
@pytest.mark.parametrize("shape", [(6, 32, 9, 9), (5, 3, 4, 4), (33, 130), (300, 40)])
def test_relu_dropout_norm_is_the_composition(shape: tuple[int, ...], rate: float | None) -> None:
    dropout = None if rate is None else Dropout(rate)
    results, rngs = [], []
    for fused in (True, False):
        z, norm, rng = images(*shape).requires_grad_(), random_norm(shape[1]), stream(0, "drop")
        if fused:
            y = relu_dropout_norm(z, dropout, norm, rng)
        else:
            with kernels.disabled():
                h = relu(z)
                y = norm(h if dropout is None else dropout(h, rng))
        g = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        grads = torch.autograd.grad(y, [z, *norm.parameters()], g)
        results.append((y.detach(), *grads, norm.running_mean, norm.running_var))
        rngs.append(int(rng.integers(1 << 60)))
    assert rngs[0] == rngs[1]  # both drew as much
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
    assert torch.equal(results[0][1] == 0, results[1][1] == 0)  # the same values were cut


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("shape", [(6, 32, 9, 9), (5, 3, 4, 4), (33, 130), (1, 7), (2, 1)])
def test_answers_are_those_of_the_layers_one_by_one(shape: tuple[int, ...], frozen: bool) -> None:
    """Without a gradient, running statistics and ReLU go into one pass; NaN stays NaN."""
    z, norm, dropout = images(*shape), random_norm(shape[1]), Dropout(0.5).eval()
    nn.init.normal_(norm.running_mean, generator=torch.Generator().manual_seed(3))
    nn.init.uniform_(norm.running_var, 0.5, 2, generator=torch.Generator().manual_seed(4))
    z[0, 0] = float("nan")
    norm.frozen = frozen
    norm.train(frozen)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    with torch.no_grad():
        found = relu_dropout_norm(z, dropout, norm)
        expected = norm(relu(z))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert torch.equal(found.isnan(), z.isnan())
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


def test_a_network_answers_alike_with_a_gradient_and_without() -> None:
    net, x = NotebookNet().eval(), images(40, 3, 32, 32)
    with torch.no_grad():
        alone = net(x)
    torch.testing.assert_close(net(x), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 32, 9, 9), (5, 3, 4, 4), (33, 130), (1, 1)])
def test_relu_dropout_is_the_composition(shape: tuple[int, ...]) -> None:
    results: list[tuple[Tensor, ...]] = []
    for fused in (True, False):
        z, dropout, rng = images(*shape).requires_grad_(), Dropout(0.3), stream(0, "drop")
        h = relu_dropout(z, dropout, rng) if fused else dropout(relu(z), rng)
        assert ("_ReluDropout" in type(h.grad_fn).__name__) == (fused and kernels.available())
        g = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        grads = torch.autograd.grad(h, [z], g)
        results.append((h.detach(), *grads, torch.tensor(int(rng.integers(1 << 60)))))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    "shape", [(6, 32, 9, 9), (5, 3, 4, 4), (33, 130), (9, 2101), (70_000, 64), (93_207, 45)]
)
def test_norm_relu_is_the_composition(shape: tuple[int, ...], affine: bool) -> None:
    results: list[tuple[Tensor, ...]] = []
    for fused in (True, False):
        x = images(*shape).requires_grad_()
        norm = random_norm(shape[1]) if affine else BatchNorm(shape[1], scale=False, center=False)
        y = norm_relu(x, norm) if fused else relu(norm(x))
        assert ("_BatchNormRelu" in type(y.grad_fn).__name__) == (fused and kernels.available())
        g = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        grads = torch.autograd.grad(y, [x, *norm.parameters()], g)
        results.append((y.detach(), norm.running_mean, norm.running_var, *grads))
    assert (results[0][0] == 0).any()
    for ours, theirs in zip(results[0][:3], results[1][:3], strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(results[0][3:], results[1][3:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("norm", [BatchNorm(32), LayerNorm(32), NoNorm()])
def test_norm_relu_of_an_evaluated_or_other_normaliser(norm: nn.Module) -> None:
    x = images(6, 32, 9, 9)
    if isinstance(norm, BatchNorm):
        nn.init.uniform_(norm.running_mean, -1, 1)
    norm.eval()
    for graph in (torch.no_grad, torch.enable_grad):
        with graph():
            assert torch.equal(norm_relu(x, norm), relu(norm(x)))


def test_norm_relu_lets_hooks_see_the_normalised_values() -> None:
    norm, seen = BatchNorm(32), []
    norm.register_forward_hook(lambda *found: seen.append(found[2]))
    y = norm_relu(images(6, 32, 9, 9), norm)
    assert (seen[0] < 0).any()
    assert torch.equal(relu(seen[0]), y)


@pytest.mark.skipif(not kernels.available(), reason="installed without a compiler")
def test_what_is_not_finite_stays_visible_behind_norm_relu() -> None:
    x = images(8, 32, 6, 6)
    x[3, 7] = float("nan")
    y = norm_relu(x, BatchNorm(32))
    assert y[:, 7].isnan().all()
    assert y[:, :7].isfinite().all()


@pytest.mark.skipif(not kernels.available(), reason="installed without a compiler")
def test_a_dropped_value_that_is_not_finite_stays_visible() -> None:
    z = images(8, 32, 6, 6)
    z[3, 7] = float("nan")
    y = relu_dropout_norm(z, Dropout(0.9), BatchNorm(32), stream(0, "drop"))
    assert not y[:, 7].isfinite().any()
    assert y[:, :7].isfinite().all()


@pytest.mark.parametrize("gamma", [1.7, 0.0])
def test_norm_conv_is_the_composition(gamma: float) -> None:
    results = []
    for fused in (True, False):
        norm, conv = random_norm(3), Conv2d(3, 32, padding=0, rng=stream(0, "conv"))
        nn.init.constant_(norm.weight, gamma)
        x = images(5, 3, 12, 12) * 2 + 1
        y = norm_conv(x, norm, conv) if fused else conv(norm(x))
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        grads = torch.autograd.grad(y, [*norm.parameters(), *conv.parameters()], g)
        results.append((y.detach(), *grads, norm.running_mean, norm.running_var))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("norm", [NoNorm(), LayerNorm(3), BatchNorm(3).eval()])
def test_norm_conv_is_the_composition_with_any_normaliser(norm: nn.Module) -> None:
    conv, x = Conv2d(3, 32, padding=0, rng=stream(0, "conv")), images(5, 3, 12, 12)
    nn.init.normal_(conv.bias, generator=torch.Generator().manual_seed(3))
    parameters = [*norm.parameters(), *conv.parameters()]
    ours, theirs = norm_conv(x, norm, conv), conv(norm(x))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(norm_conv(x, norm, conv), theirs, rtol=1e-5, atol=1e-5)
    g = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    for a, b in zip(*(torch.autograd.grad(y, parameters, g) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-4)


def test_an_image_that_wants_its_gradient_gets_it() -> None:
    x = images(2, 3, 32, 32).requires_grad_()
    NotebookNet().train()(x, stream(0, "drop")).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("fused", [True, False])
def test_hooks_see_what_lies_between(fused: bool) -> None:
    seen: list[str] = []
    net = NotebookNet().train()
    for name, module in net.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    if fused:
        net(images(2, 3, 32, 32), stream(0, "drop"))
    else:
        with kernels.disabled():
            net(images(2, 3, 32, 32), stream(0, "drop"))
    assert len(seen) == 16


def twice(layer: nn.Module) -> Any:
    """The layer with another `forward`: of a subclass, or put in its place."""
    doubled = copy.deepcopy(layer)
    kind = type(layer)
    forward = {"forward": lambda self, *values: 2 * kind.forward(self, *values)}
    doubled.__class__ = type("Twice", (kind,), forward)
    return doubled


def replaced(layer: nn.Module) -> Any:
    doubled = copy.deepcopy(layer)
    doubled.forward = lambda *values: 2 * type(layer).forward(doubled, *values)
    return doubled


@pytest.mark.parametrize("other", [twice, replaced])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_another_forward_is_asked(
    other: Callable[[nn.Module], Any], grad: bool, training: bool
) -> None:
    x, pixels, rng = images(6, 32, 8, 8), images(5, 3, 12, 12), stream(0, "conv")
    norm, first, drop, pool = BatchNorm(32), BatchNorm(3), Dropout(0.2), MaxPool2d(2)
    conv, inner = Conv2d(32, 32, padding=1, rng=rng), Conv2d(3, 32, padding=0, rng=rng)
    nn.ModuleList([norm, first, drop, pool, conv, inner]).train(training)
    norm2, first2, drop2, pool2, conv2, inner2 = map(other, (norm, first, drop, pool, conv, inner))
    theirs = other(nn.Conv2d(3, 32, 3).train(training))

    def draws() -> np.random.Generator:
        return stream(0, "drop")

    with torch.set_grad_enabled(grad):
        pairs = [
            (norm_relu(x, norm2), relu(norm2(x))),
            (norm_add_relu(x, norm2, x), relu(norm2(x) + x)),
            (relu_dropout_norm(x, None, norm2), norm2(relu(x))),
            (relu_dropout_norm(x, drop2, norm, draws()), norm(drop2(relu(x), draws()))),
            (relu_dropout(x, drop2, draws()), drop2(relu(x), draws())),
            (conv_pool(x, conv2, pool), pool(conv2(x))),
            (conv_pool(x, conv, pool2), pool2(conv(x))),
            (norm_conv(pixels, first, inner2), inner2(first(pixels))),
            (norm_conv(pixels, first, theirs), theirs(first(pixels))),
            (norm_conv(pixels, first2, inner), inner(first2(pixels))),
        ]
    for fused, one_by_one in pairs:
        torch.testing.assert_close(fused, one_by_one, rtol=1e-4, atol=2e-4)


def test_a_hook_on_all_modules_sees_what_lies_between() -> None:
    seen: list[nn.Module] = []
    net = NotebookNet().train()
    handle = register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        net(images(2, 3, 32, 32), stream(0, "drop"))
    finally:
        handle.remove()
    assert set(seen) == set(net.modules())


def losses(net: NotebookNet, steps: int) -> list[float]:
    labels = torch.arange(8) % 10
    x = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    found = []
    for step in range(steps):
        loss = cross_entropy(net(x, stream(0, "drop", step)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_the_network_trains_the_same_without_kernels(norm: str) -> None:
    compiled = losses(NotebookNet(norm=norm).train(), 4)
    with kernels.disabled():
        plain = losses(NotebookNet(norm=norm).train(), 12)
    np.testing.assert_allclose(compiled, plain[:4], rtol=2e-4)
    assert np.mean(plain[-4:]) < plain[0]


@pytest.mark.parametrize("state", ["eval", "frozen"])
def test_running_statistics_are_used_and_kept(state: str) -> None:
    net = NotebookNet().train()
    norms = [m for m in net.modules() if isinstance(m, BatchNorm)]
    for norm in norms:
        nn.init.uniform_(norm.running_mean, -1, 1)
        if state == "frozen":
            norm.freeze()
    if state == "eval":
        net.eval()
    before = [norm.running_mean.clone() for norm in norms]
    x = images(3, 3, 32, 32)
    ours = net(x, stream(0, "drop"))
    with kernels.disabled():
        torch.testing.assert_close(net(x, stream(0, "drop")), ours, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(a, b.running_mean) for a, b in zip(before, norms, strict=True))
