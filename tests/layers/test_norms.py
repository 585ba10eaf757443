"""Layer, group and instance normalisation against PyTorch's own, and the identities among them."""

import pytest
import torch
from torch import Tensor, nn

from normlab.errors import UserError
from normlab.layers import NORMS, GroupNorm, InstanceNorm, LayerNorm, normalizer
from normlab.layers.norms import default_groups

SHAPES = [(4, 12, 5, 3), (2, 64, 4, 4), (3, 12)]


def with_parameters(norm: nn.Module, seed: int = 1) -> nn.Module:
    """Give γ and β values that show when they are used wrongly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return norm


def outputs_and_gradients(norm: nn.Module, x: Tensor) -> list[Tensor]:
    """y, then dL/dx, dL/dγ, dL/dβ for a loss that weighs every output differently."""
    x = x.clone().requires_grad_()
    y = norm(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    return [y, x.grad, norm.weight.grad, norm.bias.grad]


def assert_same(a: nn.Module, b: nn.Module, x: Tensor) -> None:
    for ours, theirs in zip(outputs_and_gradients(a, x), outputs_and_gradients(b, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def inputs(shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return 3 + 2 * torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_group_norm_is_pytorchs(shape: tuple[int, ...], groups: int) -> None:
    ours = with_parameters(GroupNorm(shape[1], groups, eps=1e-5).double())
    theirs = with_parameters(nn.GroupNorm(groups, shape[1], eps=1e-5).double())
    assert_same(ours, theirs, inputs(shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm_is_pytorchs_over_c_h_w_with_parameters_per_channel(
    shape: tuple[int, ...],
) -> None:
    ours = with_parameters(LayerNorm(shape[1]).double())
    theirs = nn.LayerNorm(shape[1:], eps=ours.eps, elementwise_affine=False)
    x, per_channel = inputs(shape), (1, -1, *[1] * (len(shape) - 2))
    expected = theirs(x) * ours.weight.view(per_channel) + ours.bias.view(per_channel)
    torch.testing.assert_close(ours(x), expected)


def test_instance_norm_is_pytorchs() -> None:
    ours = with_parameters(InstanceNorm(12, eps=1e-5).double())
    theirs = with_parameters(nn.InstanceNorm2d(12, eps=1e-5, affine=True).double())
    assert_same(ours, theirs, inputs((4, 12, 5, 3)))


@pytest.mark.parametrize("shape", [(4, 12), (4, 12, 5, 3)])
def test_rms_norm_is_its_formula_and_pytorchs(shape: tuple[int, ...]) -> None:
    x, norm = inputs(shape), with_parameters(normalizer("rms", 12, epsilon=1e-5).double())
    channel = (1, 12, *[1] * (len(shape) - 2))
    scale = (x.numpy() ** 2).mean(axis=tuple(range(1, len(shape))), keepdims=True) + 1e-5
    expected = x.numpy() / scale**0.5 * norm.weight.detach().numpy().reshape(channel)
    expected += norm.bias.detach().numpy().reshape(channel)
    torch.testing.assert_close(norm(x).detach(), torch.from_numpy(expected))
    plain = nn.RMSNorm(shape[1:], eps=1e-5, elementwise_affine=False)(x)
    torch.testing.assert_close(normalizer("rms", 12, epsilon=1e-5).double()(x).detach(), plain)


def test_one_group_is_layer_norm_and_c_groups_are_instance_norm() -> None:
    x = inputs((4, 12, 5, 3))
    for special, groups in ((LayerNorm, 1), (InstanceNorm, 12)):
        assert_same(
            with_parameters(special(12).double()),
            with_parameters(GroupNorm(12, groups).double()),
            x,
        )


@pytest.mark.parametrize("name", ["layer", "rms", "group", "instance"])
def test_gradients_are_numerically_right(name: str) -> None:
    norm = with_parameters(normalizer(name, 4).double())
    x = inputs((2, 4, 3, 2)).requires_grad_()
    assert torch.autograd.gradcheck(norm, (x,))


@pytest.mark.parametrize("name", ["layer", "rms", "group", "instance"])
def test_an_image_does_not_depend_on_its_batch_nor_on_the_mode(name: str) -> None:
    norm = with_parameters(normalizer(name, 12).double())
    x = inputs((4, 12, 5, 3))
    alone = torch.cat([norm.eval()(x[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(alone, norm.train()(x))


@pytest.mark.parametrize("name", ["layer", "rms", "group", "instance"])
def test_memory_layout_and_type_are_kept(name: str) -> None:
    norm = normalizer(name, 12)
    x = inputs((4, 12, 5, 3)).float()
    channels_last = norm(x.contiguous(memory_format=torch.channels_last))
    assert channels_last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(channels_last, norm(x))
    assert norm(x.bfloat16()).dtype == torch.bfloat16


def test_a_large_mean_costs_no_variance() -> None:
    x = inputs((4, 12, 16, 16))
    far = (x.float() * 0.01 + 1000).double()  # what float32 holds of it
    exact = GroupNorm(12, 3).double()(far)
    torch.testing.assert_close(GroupNorm(12, 3)(far.float()).double(), exact, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("channels", "groups"), [(64, 32), (48, 24), (3, 3), (31, 31), (37, 1), (1, 1)]
)
def test_default_groups_are_the_largest_divisor_up_to_32(channels: int, groups: int) -> None:
    assert default_groups(channels) == GroupNorm(channels).num_groups == groups


def test_what_is_undefined_is_refused() -> None:
    with pytest.raises(UserError, match=r"InstanceNorm on .* \(5, 8\): with one value"):
        InstanceNorm(8)(torch.randn(5, 8))
    with pytest.raises(UserError, match=r"GroupNorm on .* \(5, 8, 1, 1\): with one value"):
        GroupNorm(8)(torch.randn(5, 8, 1, 1))
    with pytest.raises(UserError, match=r"num_groups=5: choose a divisor of the 8 channels"):
        GroupNorm(8, 5)
    with pytest.raises(UserError, match="the second of size 8"):
        LayerNorm(8)(torch.randn(5, 7))


def test_every_norm_is_made_by_its_name() -> None:
    assert set(NORMS) >= {"batch", "none", "layer", "rms", "group", "instance"}
    with pytest.raises(UserError, match="unknown norm 'bacth': did you mean 'batch'"):
        normalizer("bacth", 3)
