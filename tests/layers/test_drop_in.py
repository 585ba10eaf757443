"""`normlab.BatchNorm` in the place of PyTorch's: their public behaviour, tools, types and files."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrize import register_parametrization
from torch.optim.swa_utils import update_bn

import normlab
from normlab import BatchNorm, UserError, convert_batchnorm
from normlab.layers import norm_conv, norm_relu, relu_dropout_norm

PAIRS = [
    (nn.BatchNorm1d, (6, 4)),
    (nn.BatchNorm1d, (6, 4, 5)),
    (nn.BatchNorm2d, (6, 4, 3, 5)),
    (nn.BatchNorm3d, (6, 4, 2, 3, 2)),
]


def inputs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2 + 3


def same(ours: nn.Module, theirs: nn.Module) -> None:
    """Equal state, by the names that PyTorch gives."""
    expected = theirs.state_dict()
    found = ours.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


# What PyTorch's own tests ask of its layers.


@pytest.mark.parametrize(("theirs", "shape"), PAIRS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_training_then_evaluation(
    theirs: type[nn.Module],
    shape: tuple[int, ...],
    affine: bool,
    tracked: bool,
    momentum: float | None,
) -> None:
    reference = theirs(4, affine=affine, track_running_stats=tracked, momentum=momentum)
    layer = convert_batchnorm(copy.deepcopy(reference))
    assert type(layer) is BatchNorm
    for step in range(3):
        x, y = (inputs(*shape, seed=step).requires_grad_() for _ in range(2))
        g = inputs(*shape, seed=9)
        layer(x).backward(g)
        reference(y).backward(g)
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)
    same(layer, reference)
    for a, b in zip(layer.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
    x = inputs(*shape, seed=7)
    torch.testing.assert_close(layer.eval()(x), reference.eval()(x), rtol=1e-4, atol=1e-5)
    same(layer, reference)


def test_the_average_of_all_batches() -> None:
    layer = BatchNorm(4, convention="torch")
    layer.momentum = None
    found = []
    for number in (1, 2):
        layer.reset_running_stats()
        layer(inputs(5, 4, 3, 3, seed=number))
        found.append((layer.running_mean.clone(), layer.running_var.clone()))
    layer.reset_running_stats()
    assert (int(layer.num_batches_tracked), layer.running_var.tolist()) == (0, [1.0] * 4)
    for number in (1, 2):
        layer(inputs(5, 4, 3, 3, seed=number))
    torch.testing.assert_close(layer.running_mean, (found[0][0] + found[1][0]) / 2)
    torch.testing.assert_close(layer.running_var, (found[0][1] + found[1][1]) / 2)


def test_tracking_switched_off_leaves_the_statistics_as_they_are() -> None:
    layer = BatchNorm(4)
    layer(inputs(6, 4))
    layer.track_running_stats = False
    before = copy.deepcopy(layer.state_dict())
    x = inputs(6, 4, seed=1)
    torch.testing.assert_close(layer(x).mean(0), torch.zeros(4), rtol=0, atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    mean, var = layer.running_mean, layer.running_var
    expected = (x - mean) / (var + layer.eps).sqrt()
    torch.testing.assert_close(layer.eval()(x), expected, rtol=1e-4, atol=1e-5)


def test_without_running_statistics_evaluation_takes_the_batch() -> None:
    layer = BatchNorm(4, track_running_stats=False)
    assert {*layer.state_dict()} == {"weight", "bias"}
    x = inputs(6, 4, 3, 3)
    torch.testing.assert_close(layer.eval()(x), layer.train()(x))
    with pytest.raises(UserError, match="two or more"):
        layer.eval()(inputs(1, 4))
    assert "track_running_stats=False" in repr(layer)
    torch.testing.assert_close(norm_relu(x, layer), layer(x).relu())
    torch.testing.assert_close(relu_dropout_norm(x, None, layer), layer(x.relu()))
    conv = nn.Conv2d(4, 2, 3)
    torch.testing.assert_close(norm_conv(x, layer, conv), conv(layer(x)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 3, 3), (3, 4, 0, 2)])
@pytest.mark.parametrize("training", [True, False])
def test_no_images_give_no_outputs(shape: tuple[int, ...], training: bool) -> None:
    layer = BatchNorm(4).train(training)
    x = torch.zeros(shape, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert int(layer.num_batches_tracked) == 0
    assert torch.equal(layer.running_var, torch.ones(4))


def test_a_layer_without_values_can_be_made_and_filled() -> None:
    with torch.device("meta"):
        layer = BatchNorm(3)
    assert layer.running_mean.is_meta
    layer.to_empty(device="cpu").reset_parameters()
    same(layer, BatchNorm(3))
    with torch.device("meta"):
        cast = BatchNorm(3).half()
    assert cast.to_empty(device="cpu").running_var.dtype is torch.float32


@pytest.mark.parametrize("options", [{}, {"scale": False}, {"center": False}])
def test_reset_parameters(options: dict[str, bool]) -> None:
    layer = BatchNorm(3, **options)
    for step in range(3):
        layer(inputs(8, 3, seed=step)).square().sum().backward()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.sub_(1)
    layer.reset_parameters()
    same(layer, BatchNorm(3, **options))


# Tools that look for PyTorch's class.


@pytest.mark.parametrize("convention", ["torch", "keras", "onnx"])
def test_update_bn_renews_the_statistics(convention: str) -> None:
    batches = [inputs(16, 4, 5, 5, seed=n) for n in range(6)]
    network = nn.Sequential(BatchNorm(4, convention=convention), nn.Conv2d(4, 2, 3))
    momentum = network[0].momentum
    network(inputs(16, 4, 5, 5) - 50)
    update_bn(batches, network)
    means = torch.stack([x.mean((0, 2, 3)) for x in batches])
    torch.testing.assert_close(network[0].running_mean, means.mean(0), rtol=1e-5, atol=1e-5)
    assert network[0].momentum == momentum
    assert int(network[0].num_batches_tracked) == 6


def test_fusion_keeps_the_outputs() -> None:
    conv, norm = nn.Conv2d(3, 4, 3), BatchNorm(4)
    norm(inputs(8, 4, 5, 5))
    x = inputs(2, 3, 6, 6)
    expected = norm.eval()(conv.eval()(x))
    fused = torch.nn.utils.fusion.fuse_conv_bn_eval(conv, norm)
    torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-4)


def test_functional_tools() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNorm(4))
    torch.func.replace_all_batch_norm_modules_(network)
    assert network[1].running_mean is None
    x = inputs(4, 3, 6, 6)
    torch.testing.assert_close(network.eval()(x), network.train()(x))


def test_synchronised_layers_take_over_weights_and_statistics() -> None:
    layer = BatchNorm(4, convention="torch")
    layer(inputs(8, 4))
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(copy.deepcopy(layer)))
    assert type(synchronised[0]) is nn.SyncBatchNorm
    same(synchronised[0], layer)
    assert synchronised[0].momentum == pytest.approx(0.1)


# Files.


@pytest.mark.parametrize("theirs", [False, True])
def test_a_state_dict_without_a_counter_is_loaded(theirs: bool) -> None:
    source = nn.Sequential(nn.BatchNorm2d(3) if theirs else BatchNorm(3))
    source(inputs(6, 3, 4, 4))
    old = {k: v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}
    target = nn.Sequential(BatchNorm(3))
    target[0].num_batches_tracked.fill_(7)
    assert target.load_state_dict(old).missing_keys == []
    assert int(target[0].num_batches_tracked) == 7
    assert torch.equal(target[0].running_mean, source[0].running_mean)


def test_whole_layers_are_pickled() -> None:
    layer = BatchNorm(3).freeze()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    read = torch.load(file, weights_only=False)
    same(read, layer)
    assert read.frozen


# Half precision.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("convention", ["keras", "torch"])
def test_statistics_of_a_cast_network_go_on_moving(dtype: torch.dtype, convention: str) -> None:
    reference, cast = (nn.Sequential(BatchNorm(4, convention=convention)) for _ in range(2))
    cast.to(dtype)
    assert cast[0].weight.dtype is dtype
    assert cast[0].running_mean.dtype is cast[0].running_var.dtype is torch.float32
    for step in range(40):
        x = (inputs(16, 4, 4, 4, seed=step) + 7).to(dtype)
        y = cast(x)
        reference(x.float())
    assert y.dtype is dtype
    same(cast.float(), reference)


@pytest.mark.parametrize("scale", [True, False])
def test_a_variance_beyond_float16_is_kept(scale: bool) -> None:
    layer = BatchNorm(4, convention="torch", scale=scale).half()
    for step in range(60):
        layer(((inputs(16, 4, 4, 4, seed=step) - 3) * 150).half())
    assert layer.running_var.max() > 65504
    y = layer.eval()(((inputs(16, 4, 4, 4) - 3) * 150).half())
    assert y.dtype is torch.float16
    assert 0.8 < y.float().std() < 1.2


def test_casting_does_not_round_the_statistics() -> None:
    layer = BatchNorm(3)
    layer(inputs(9, 3))
    before = layer.running_mean.clone()
    assert torch.equal(layer.half().running_mean, before)
    assert torch.equal(layer.bfloat16().float().running_mean, before)
    assert layer.double().running_mean.dtype is torch.float64
    assert layer.half().running_mean.dtype is torch.float32


def test_half_statistics_in_a_file_become_float32() -> None:
    state = {k: v.half() for k, v in BatchNorm(3).state_dict().items() if v.is_floating_point()}
    for assign in (False, True):
        layer = BatchNorm(3)
        layer.load_state_dict(state, assign=assign)
        assert layer.running_var.dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cast_norm", [True, False])
def test_norm_conv_takes_half_inputs_by_float32_statistics(
    dtype: torch.dtype, cast_norm: bool
) -> None:
    x = (inputs(8, 3, 6, 6) * 0.01 + 20).to(dtype)  # its mean hides its variance in half precision
    conv, norm, reference = nn.Conv2d(3, 4, 3).to(dtype), BatchNorm(3), BatchNorm(3)
    y = norm_conv(x, norm.to(dtype) if cast_norm else norm, conv)
    reference(x.float())
    assert y.dtype is dtype
    torch.testing.assert_close(norm.running_mean, reference.running_mean)
    torch.testing.assert_close(norm.running_var, reference.running_var)
    direct = BatchNorm(3)
    torch.testing.assert_close(direct.standardize(x), reference(x.float()).to(dtype))
    torch.testing.assert_close(direct.running_var, norm.running_var)


def test_float32_inputs_of_a_cast_layer() -> None:
    x = inputs(8, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    layer, conv = BatchNorm(4).half(), nn.Conv2d(4, 2, 3)
    for stage in (
        lambda norm: norm(x),
        lambda norm: norm_relu(x, norm),
        lambda norm: relu_dropout_norm(x, None, norm),
        lambda norm: norm_conv(x, norm, conv),
    ):
        torch.testing.assert_close(stage(layer), stage(BatchNorm(4)), rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            evaluated = stage(copy.deepcopy(layer).eval())
        assert evaluated.dtype is torch.float32
        assert torch.isfinite(evaluated).all()


# Conversion.


def network() -> nn.Sequential:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, momentum=0.3, eps=1e-4))
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), inner, nn.Flatten()
    return nn.Sequential(*layers, nn.LazyLinear(5), nn.BatchNorm1d(5, affine=False))


def test_converted_there_and_back() -> None:
    model = network()
    model(inputs(6, 3, 7, 7))
    before = copy.deepcopy(model)
    parameters = [id(p) for p in model.parameters()]
    assert convert_batchnorm(model) is model
    kinds = [type(m) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert kinds == [BatchNorm] * 3
    assert [id(p) for p in model.parameters()] == parameters
    same(model, before)
    x = inputs(6, 3, 7, 7, seed=3)
    torch.testing.assert_close(model(x), before(x), rtol=1e-4, atol=1e-5)
    convert_batchnorm(model, to="torch")
    assert repr(model) == repr(before)
    assert [id(p) for p in model.parameters()] == parameters
    same(model, before)
    torch.testing.assert_close(model(x), before(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("convention", ["keras", "torch", "onnx"])
@pytest.mark.parametrize("center", [True, False])
def test_another_convention_becomes_pytorchs(convention: str, center: bool) -> None:
    layer = BatchNorm(4, convention=convention, center=center, scale=not center)
    layer(inputs(6, 4, 3, 3))
    new = convert_batchnorm(copy.deepcopy(layer), to="torch")
    assert type(new) is nn.BatchNorm2d
    assert new.eps == layer.eps
    assert new.momentum == pytest.approx(1 - layer.decay)
    x = inputs(6, 4, 3, 3, seed=1)
    torch.testing.assert_close(new.eval()(x), layer.eval()(x), rtol=1e-4, atol=1e-5)
    layer.train()(x)
    new.train()(x)
    torch.testing.assert_close(new.running_mean, layer.running_mean)
    as_vector = convert_batchnorm(BatchNorm(4), to="torch", torch_class=nn.BatchNorm1d)
    assert as_vector(inputs(6, 4)).shape == (6, 4)


def test_a_frozen_layer_and_one_that_stands_in_two_places() -> None:
    model = nn.Sequential(BatchNorm(3).freeze(), shared := BatchNorm(3), nn.ReLU(), shared)
    convert_batchnorm(model, to="torch")
    assert not model[0].training
    assert not any(p.requires_grad for p in model[0].parameters())
    assert model[1] is model[3]


def test_what_is_more_than_a_normaliser_stays() -> None:
    class AndRelu(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    model = convert_batchnorm(nn.Sequential(AndRelu(3), nn.SyncBatchNorm(3), nn.BatchNorm2d(3)))
    assert [type(m) for m in model] == [AndRelu, nn.SyncBatchNorm, BatchNorm]


def test_conversions_that_cannot_be() -> None:
    with pytest.raises(UserError, match="choose normlab or torch"):
        convert_batchnorm(nn.BatchNorm1d(3), to="keras")
    with pytest.raises(UserError, match="run one through the network first"):
        convert_batchnorm(nn.Sequential(nn.Linear(3, 4), nn.LazyBatchNorm1d()))
    assert normlab.convert_batchnorm is convert_batchnorm


class Squared(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.square()


@pytest.mark.parametrize("to", ["normlab", "torch"])
@pytest.mark.parametrize("tensor", ["weight", "bias"])
def test_pruned_layers_are_refused_until_that_is_permanent(to: str, tensor: str) -> None:
    kind = nn.BatchNorm2d if to == "normlab" else BatchNorm
    model = nn.Sequential(kind(4), nn.Sequential(kind(4)))
    layer = model[1][0]
    nn.init.normal_(getattr(layer, tensor))
    prune.random_unstructured(layer, tensor, amount=2)
    x = inputs(6, 4, 3, 3)
    expected = model(x)
    with pytest.raises(UserError, match=rf"1\.0 is pruned or .*{tensor}_orig.*prune\.remove"):
        convert_batchnorm(model, to)
    assert [type(model[0]), type(layer)] == [kind, kind]
    prune.remove(layer, tensor)
    convert_batchnorm(model, to)
    assert type(model[1][0]) is not kind
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("to", ["normlab", "torch"])
def test_a_parametrised_layer_stays(to: str) -> None:
    layer = nn.BatchNorm2d(4) if to == "normlab" else BatchNorm(4)
    nn.init.constant_(layer.weight, 3)
    register_parametrization(layer, "weight", Squared())
    model, x = nn.Sequential(layer), inputs(6, 4, 3, 3)
    expected = model(x)
    assert expected.std().item() == pytest.approx(9, rel=0.01)
    assert torch.equal(convert_batchnorm(model, to)(x), expected)
