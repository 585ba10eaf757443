"""The place of the normaliser: before or after the activation, in every network that has one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normlab
from chains import computed
from normlab.__main__ import run as command
from normlab.errors import UserError
from normlab.interchange.steps import chain_of
from normlab.models import FastNet, NotebookNet, SigmoidNet
from normlab.study.arms import Arm, parse_arm


def settled(model: nn.Module) -> nn.Module:
    """Parameters and statistics that make every normaliser matter; evaluation mode."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name and p.ndim == 1:
                p.copy_(torch.rand(p.shape, generator=rng) + 0.5)
    return model.eval()


def bn(model: nn.Module, name: str, h: Tensor) -> Tensor:
    layer = model.get_submodule(name)
    return F.batch_norm(
        h, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps
    )


def notebook_before(model: NotebookNet, x: Tensor) -> Tensor:
    """Convolution, pooling, normaliser, ReLU; the input's normaliser as ever."""
    h = model.conv1(bn(model, "batch_normalization", x))
    h = bn(model, "batch_normalization_1", h).relu()
    h = bn(model, "batch_normalization_2", F.max_pool2d(model.conv2(h), 2)).relu()
    h = model.flatten(F.max_pool2d(model.conv3(h), 2))
    h = bn(model, "batch_normalization_3", h).relu()
    h = bn(model, "batch_normalization_4", model.hidden(h)).relu()
    return model.output(h)


def fast_after(model: FastNet, x: Tensor) -> Tensor:
    h = model.whitening(x)
    for i, block in enumerate(model.blocks):
        h = bn(model, f"blocks.{i}.norm", block.pool(block.conv(h)).relu())
    return model.output(h.amax((2, 3))) / 3


def skipping_as_defined(model: FastNet, x: Tensor) -> Tensor:
    """The third block of a stage adds its input right before the ReLU."""
    h = model.whitening(x)
    for i, block in enumerate(model.blocks):
        z = block.pool(block.conv(h))
        if block.norm_last:
            h = bn(model, f"blocks.{i}.norm", (z + h if i == 5 else z).relu())
        else:
            z = bn(model, f"blocks.{i}.norm", z)
            h = (z + h if i == 5 else z).relu()
    return model.output(h.amax((2, 3))) / 3


def sigmoid_after(model: SigmoidNet, x: Tensor) -> Tensor:
    h = (x[:, :, 2:30, 2:30] * model.luma).sum(1).flatten(1)
    for i in (1, 2, 3):
        h = bn(model, f"norm{i}", model.get_submodule(f"dense{i}")(h).sigmoid())
    return model.output(h)


@pytest.mark.parametrize(
    ("network", "position", "definition"),
    [
        (NotebookNet, "before", notebook_before),
        (FastNet, "after", fast_after),
        (SigmoidNet, "after", sigmoid_after),
    ],
)
def test_the_other_place(network: type[nn.Module], position: str, definition: object) -> None:
    model = settled(network(image_size=32, norm_position=position))
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(x), definition(model, x), rtol=1e-5, atol=1e-5)  # type: ignore[operator]
    usual = settled(network(image_size=32))
    other = "after" if position == "before" else "before"
    assert torch.equal(usual(x), settled(network(image_size=32, norm_position=other))(x))
    assert not torch.allclose(usual(x), model(x), atol=1e-3)


@pytest.mark.parametrize("position", ["before", "after"])
def test_a_third_block_adds_its_input(position: str) -> None:
    model = settled(FastNet(stages=((8,), (12, 12), (16, 16, 16)), norm_position=position))
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(x), skipping_as_defined(model, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("network", "position"), [(NotebookNet, "before"), (FastNet, "after")])
def test_export_follows(network: type[nn.Module], position: str) -> None:
    model = settled(network(image_size=32, norm_position=position))
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32)).astype(np.float64)
    expected = model(torch.from_numpy(pixels).float() / 255).detach().double().numpy()
    found = computed(chain_of(model, 32), pixels)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_a_comparison_of_places(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_arm("late: norm_position=after") == Arm("late", {"norm_position": "after"})
    assert parse_arm("own: norm_position=none") == Arm("own", {"norm_position": None})
    words = ["--seeds", "1", "--epochs", "1", "--data", "sample", "--jobs", "1", "--out", "s"]
    arms = ["--arm", "late: norm_position=after", "--arm", "early: norm_position=before"]
    assert command(["compare", "fast79", *arms, *words]) == 0
    assert "cannot tell late from early" in capsys.readouterr().out
    with pytest.raises(UserError, match="unknown norm_position 'within'"):
        normlab.train("notebook", norm_position="within")
