"""Dense products, by oneDNN and our own: against float64, and where PyTorch's are taken."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from normlab import kernels
from normlab.core.streams import stream
from normlab.kernels import products
from normlab.layers import Dense

onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(),  # type: ignore[no-untyped-call, unused-ignore]
    reason="this PyTorch has no oneDNN",
)


def matrix(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@onednn
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("n", "i", "o"), [(32, 3136, 512), (7, 1000, 333), (512, 33, 70)])
def test_products_are_those_of_float64(n: int, i: int, o: int, turned: bool) -> None:
    a, b, bias = matrix(n, i, 0), matrix(o, i, 1), matrix(1, o, 2)[0]
    if turned:  # as the gradients' factors lie
        a, b = a.T.contiguous().T, b.T.contiguous().T
    assert kernels.multiplies(a, b)
    for shift in (None, bias):
        exact = linear(a.double(), b.double(), None if shift is None else shift.double())
        found = kernels.product(a, b, shift)
        assert (found - exact).abs().max() < 1e-5 * exact.abs().max()


@onednn
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("n", "i", "o"), [(32, 3136, 512), (8, 2048, 72), (64, 96, 512), (40, 544, 64), (31, 3136, 512)]
)
def test_few_rows_are_multiplied_as_float64_does(n: int, i: int, o: int, threads: int) -> None:
    x, w, b, g = matrix(n, i, 0), matrix(o, i, 1), matrix(1, o, 2)[0], matrix(n, o, 3)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = kernels.dense(x, w, b), *kernels.dense_gradients(x, w, g)
        only_x = kernels.dense_gradients(x, w, g, weight_grad=False)
        only_w = kernels.dense_gradients(x, w, g, x_grad=False)
    finally:
        torch.set_num_threads(before)
    wide = [t.double().requires_grad_() for t in (x, w, b)]
    exact = linear(*wide)
    for ours, theirs in zip(
        found, (exact, *torch.autograd.grad(exact, wide, g.double())), strict=True
    ):
        assert ours is not None
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    assert only_x[1] is None
    assert torch.equal(only_x[0], found[1])  # type: ignore[arg-type]
    assert only_w[0] is None
    assert torch.equal(only_w[1], found[2])  # type: ignore[arg-type]


@onednn
def test_an_answer_does_not_depend_on_how_many_pictures_are_asked_about() -> None:
    layer, x = Dense(3136, 512, rng=stream(0, "init", "dense")).eval(), matrix(96, 3136, 0)
    with torch.no_grad():
        assert torch.equal(layer(x)[:32], layer(x[:32]))


@onednn
def test_a_dense_layer_has_the_gradients_of_pytorchs() -> None:
    ours = Dense(1568, 384, rng=stream(0, "init", "dense"))
    theirs = nn.Linear(1568, 384)
    nn.init.normal_(ours.bias, generator=torch.Generator().manual_seed(4))
    theirs.load_state_dict(ours.state_dict())
    g, results = matrix(64, 384, 3), []
    for layer in (ours, theirs):
        x = matrix(64, 1568, 2).requires_grad_()
        y = layer(x)
        assert ("_Dense" in type(y.grad_fn).__name__) == (layer is ours)
        results.append((y, *torch.autograd.grad(y, [x, *layer.parameters()], g)))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-4)


@onednn
def test_frozen_weights_get_no_gradient_and_the_input_still_does() -> None:
    layer = Dense(2048, 64, rng=stream(0, "init", "dense")).requires_grad_(False)
    x = matrix(64, 2048, 0).requires_grad_()
    layer(x).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand_as(x), rtol=1e-4, atol=1e-5)


@onednn
def test_bits_depend_neither_on_threads_nor_on_the_rest_of_the_batch() -> None:
    a, b = matrix(64, 3136, 0), matrix(512, 3136, 1)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(kernels.product(a, b))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
    assert torch.equal(kernels.product(a[:32], b), found[0][:32])


@pytest.mark.parametrize(
    "change",
    [
        lambda a, b: (a.double(), b.double()),
        lambda a, b: (a[:1], b[:2]),  # too small to be worth the call
        lambda a, b: (a.expand(2, *a.shape), b),
        lambda a, b: (nn.Parameter(a), b),
        lambda a, b: (a.to("meta"), b.to("meta")),
    ],
)
def test_pytorch_multiplies_whatever_else_there_is(change: Any) -> None:
    a, b = change(matrix(64, 1024, 0), matrix(128, 1024, 1))
    assert not kernels.multiplies(a, b)
    assert kernels.product(a, b).shape == (*a.shape[:-1], len(b))


def test_without_onednn_or_kernels_pytorch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = matrix(64, 1024, 0), matrix(128, 1024, 1)
    with kernels.disabled():
        assert not kernels.multiplies(a, b)
        alone = kernels.product(a, b)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not kernels.multiplies(a, b)
    assert torch.equal(kernels.product(a, b), alone)


@onednn
def test_a_dense_layer_is_exported_and_compiled_as_pytorchs() -> None:
    layer = Dense(2048, 64, rng=stream(0, "init", "dense")).eval()
    x = matrix(64, 2048, 0)
    program = torch.export.export(layer, (x,))
    assert "linear_pointwise" not in str(program.graph)
    torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not kernels.available(), reason="no compiled kernels here")
@pytest.mark.parametrize(("rows", "c_in", "c_out"), [(32, 512, 10), (1, 32, 1), (7, 96, 3)])
def test_small_products_are_those_of_float64(
    rows: int, c_in: int, c_out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[str] = []
    call = products.call
    monkeypatch.setattr(products, "call", lambda name, *a: (used.append(name), call(name, *a)))
    layer = Dense(c_in, c_out, rng=stream(0, "init", "dense"))
    x, g = matrix(rows, c_in, 0).requires_grad_(), matrix(rows, c_out, 1)
    y = layer(x)
    assert "_Dense" in type(y.grad_fn).__name__
    wide = [v.detach().double().requires_grad_() for v in (x, layer.weight, layer.bias)]
    expected = linear(*wide)
    ours = torch.autograd.grad(y, [x, layer.weight, layer.bias], g)
    assert used == ["small_dense", "small_dense_gradients"]
    theirs = torch.autograd.grad(expected, wide, g.double())
    for a, b in zip((y, *ours), (expected, *theirs), strict=True):
        assert (a - b).abs().max() <= 1e-6 * b.abs().max()
