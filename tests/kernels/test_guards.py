"""What the compiled passes are not made for is PyTorch's work, or PyTorch's error."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from normlab import kernels
from normlab.core.streams import stream
from normlab.layers import (
    BatchNorm,
    Conv2d,
    Dense,
    MaxPool2d,
    conv_pool,
    norm_conv,
    norm_relu,
    relu_dropout_norm,
)
from normlab.models import NotebookNet
from normlab.training.optimisers import Adam

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no compiled kernels here")
RNG = stream(0, "guards")


def maps(*shape: int) -> Tensor:
    x = torch.from_numpy(stream(0, "maps").standard_normal(shape, np.float32))
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("rows", "width"), [(4, 16), (4, 64), (600, 64)])
def test_a_dense_layer_refuses_rows_of_another_width(rows: int, width: int) -> None:
    layer = Dense(32, 64, rng=RNG)
    for x in (torch.randn(rows, width), torch.randn(rows, width, requires_grad=True)):
        with pytest.raises(RuntimeError, match="shape"):
            layer(x)
        with torch.no_grad(), pytest.raises(RuntimeError, match="shape"):
            layer(x)


def test_the_notebooks_network_without_a_normaliser_refuses_another_size() -> None:
    with pytest.raises(RuntimeError, match="shape"):
        NotebookNet(norm="none")(maps(2, 3, 24, 24), RNG)


@pytest.fixture
def default() -> Iterator[Callable[[torch.dtype], None]]:
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


def step(network: nn.Module) -> list[Tensor]:
    """A pass forward and back through every compiled layer, and a step of Adam."""
    network.train()
    optimizer = Adam(list(network.parameters()))
    y = network(maps(8, 3, 32, 32), stream(0, "dropout"))
    y.square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        network.eval()
        return [y.detach(), network(maps(8, 3, 32, 32)), *network.state_dict().values()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_pytorchs_default_type_changes_nothing(
    default: Callable[[torch.dtype], None], dtype: torch.dtype
) -> None:
    expected, network = step(NotebookNet()), NotebookNet()
    default(dtype)
    found = step(network)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def expanded(norm: BatchNorm) -> None:
    norm.weight = nn.Parameter(torch.full((1,), 2.0).expand(32))


def strided(norm: BatchNorm) -> None:
    norm.running_mean = torch.arange(64.0)[::2]
    norm.running_var = torch.arange(1.0, 65.0)[::2]


def wide_variance(norm: BatchNorm) -> None:
    norm.running_var = norm.running_var.double()


def narrow_count(norm: BatchNorm) -> None:
    norm.num_batches_tracked = norm.num_batches_tracked.int()


def pruned(norm: BatchNorm) -> None:
    prune.l1_unstructured(norm, "weight", 0.5)  # type: ignore[no-untyped-call]


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrised(norm: BatchNorm) -> None:
    parametrize.register_parametrization(norm, "weight", Twice())


@pytest.mark.parametrize(
    "change", [expanded, strided, wide_variance, narrow_count, pruned, parametrised]
)
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_whose_state_lies_otherwise_gives_the_same(
    change: Callable[[BatchNorm], Any], training: bool
) -> None:
    found: list[list[Tensor]] = []
    for compiled in (True, False):
        norm = BatchNorm(32)
        change(norm)
        norm.train(training)
        x = maps(6, 32, 5, 4)
        with nullcontext() if compiled else kernels.disabled():
            results = [norm(x), norm_relu(x, norm), relu_dropout_norm(x, None, norm)]
        found.append([*results, norm.running_mean, norm.running_var, norm.num_batches_tracked])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_layer_in_no_memory_is_not_computed_with_nothing() -> None:
    with pytest.raises(RuntimeError, match="meta"):
        BatchNorm(32).to("meta")(maps(6, 32, 5, 4))


NORM, GHOSTS = BatchNorm(32), BatchNorm(32, ghost=3)
CONV, POOL = Conv2d(32, 32, padding=1, rng=RNG), MaxPool2d(2)


@pytest.mark.parametrize(
    "layer",
    [
        *(CONV, NORM, GHOSTS, POOL),
        lambda x: norm_relu(x, NORM),
        lambda x: relu_dropout_norm(x, None, NORM),
        lambda x: conv_pool(x, CONV, POOL),
    ],
)
def test_saved_tensors_may_come_back_laid_out_otherwise(layer: Callable[[Tensor], Tensor]) -> None:
    x = maps(6, 32, 9, 8)
    g = torch.randn(layer(x).shape)
    grads = []
    for pack in (lambda t: t, lambda t: t.contiguous()):  # as `save_on_cpu` gives them back
        given = x.clone(memory_format=torch.preserve_format).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = layer(given)
        grads.append(torch.autograd.grad(y, given, g)[0])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-5)


def test_a_second_backward_after_a_step_is_refused() -> None:
    layer = Dense(32, 16, rng=RNG)
    optimizer = Adam(list(layer.parameters()))
    loss = layer(torch.randn(8, 32, requires_grad=True)).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_numbers_of_numpy_are_numbers() -> None:
    norm = BatchNorm(8, momentum=np.float64(0.9), eps=np.float64(1e-3))
    assert norm(maps(4, 8, 3, 3)).isfinite().all()


def test_an_empty_batch_has_no_statistics() -> None:
    norm, conv = BatchNorm(3), Conv2d(3, 32, padding=0, rng=RNG)
    assert norm_conv(maps(0, 3, 32, 32), norm, conv).shape == (0, 32, 30, 30)
    assert int(norm.num_batches_tracked) == 0
