"""A batch that lies in parts with several processes, against the layer that has it whole."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, distributed, nn

import normlab
import oracle
from normlab import BatchNorm, UserError, convert_sync_batchnorm
from normlab.core.groups import Group
from normlab.layers import Dropout, norm_relu, relu_dropout_norm
from normlab.layers.parts import join
from together import together

# How many images of a batch lie with each rank, by the number of ranks.
SPLITS = {
    1: [(8,)],
    2: [(4, 4), (1, 7), (0, 8), (8, 0), (1, 1)],
    3: [(2, 3, 3), (1, 6, 1), (0, 0, 8), (1, 0, 1)],
    4: [(1, 1, 1, 1), (0, 1, 0, 2)],
}
Case = tuple[str, Tensor, Tensor, tuple[int, ...]]  # what stage, x, dL/dy, the split


def layer_of(channels: int, dtype: torch.dtype) -> BatchNorm:
    layer = BatchNorm(channels, convention="torch", group="world").to(dtype)
    values = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(1, 0.5, generator=values)
    return layer


def stage_of(kind: str, layer: BatchNorm, x: Tensor) -> Tensor:
    if kind == "relu after":
        return norm_relu(x, layer)
    if kind == "relu before":
        return relu_dropout_norm(x, Dropout(0.0), layer, np.random.default_rng(0))
    return layer(x)


def run_cases(rank: int, cases: list[Case]) -> list[Any]:
    return [whole_and_parts(rank, *case) for case in cases]


def whole_and_parts(
    rank: int, kind: str, x: Tensor, g: Tensor, split: tuple[int, ...]
) -> dict[str, Any]:
    """What this rank's part gives, beside what the same layer gives with the whole batch."""

    def passes(layer: BatchNorm, x: Tensor, g: Tensor) -> dict[str, Tensor]:
        x = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = stage_of(kind, layer, x)
        y.backward(g)
        return {
            "y": y.detach(),
            "dx": x.grad,
            "dw": layer.weight.grad,
            "db": layer.bias.grad,
            "mean": layer.running_mean,
            "var": layer.running_var,
            "batches": layer.num_batches_tracked,
        }

    layer = layer_of(x.shape[1], x.dtype)
    alone = copy.deepcopy(layer)
    alone.group = None
    whole = passes(alone, x, g)
    starts = np.cumsum((0, *split))
    part = slice(int(starts[rank]), int(starts[rank + 1]))
    mine = passes(layer, x[part], g[part])
    return {name: (mine[name].numpy(), whole[name].numpy()) for name in mine}


def compare(ranks: tuple[dict[str, Any], ...], tolerance: float) -> None:
    for name in ("y", "dx"):
        check(np.concatenate([r[name][0] for r in ranks]), ranks[0][name][1], tolerance)
    for name in ("dw", "db"):  # each rank has its own images' share
        check(sum(r[name][0] for r in ranks), ranks[0][name][1], tolerance)
    for name in ("mean", "var", "batches"):
        for r in ranks:
            check(r[name][0], ranks[0][name][1], tolerance)
            np.testing.assert_array_equal(r[name][0], ranks[0][name][0])  # the same bits in all


def check(found: Any, expected: Any, tolerance: float) -> None:
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("size", SPLITS)
def test_parts_give_what_the_whole_batch_gives(size: int) -> None:
    """In float64, and in float32 by the compiled passes of each stage."""
    values = torch.Generator().manual_seed(0)
    cases: list[Case] = []
    for split in SPLITS[size]:
        shape = (2, sum(split), 16, 5, 3)
        x, g = torch.randn(shape, generator=values, dtype=torch.float64)
        cases.append(("plain", x, g, split))
        for kind in ("plain", "relu after", "relu before"):
            x, g = (v.float().contiguous(memory_format=torch.channels_last) for v in (x, g))
            cases.append((kind, x, g, split))
            if sum(split) > 2:  # with two, ReLU leaves channels that are constant
                cases.append((kind, x[..., 0, 0].contiguous(), g[..., 0, 0].contiguous(), split))
    for case, ranks in zip(cases, zip(*together(size, run_cases, cases), strict=True), strict=True):
        compare(ranks, 1e-13 if case[1].dtype == torch.float64 else 1e-5)


@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=9).filter(any),
    offset=st.sampled_from([0.0, 1.0, 1e4, 1e6]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=200, deadline=None)
def test_moments_of_parts_join_to_those_of_the_whole(
    counts: list[int], offset: float, seed: int
) -> None:
    """In whatever number and sizes, a mean of 10⁶ standard deviations included."""
    x = offset + np.random.default_rng(seed).standard_normal((sum(counts), 3))
    parts = np.split(x, np.cumsum(counts)[:-1])
    means = [p.mean(0) if len(p) else np.zeros(3) for p in parts]
    squares = [((p - m) ** 2).sum(0) for p, m in zip(parts, means, strict=True)]
    found = join(*(torch.tensor(np.array(v)) for v in (np.array(counts, float), means, squares)))
    exact = x.astype(np.longdouble)
    assert int(found[0]) == len(x)
    np.testing.assert_allclose(found[1], exact.mean(0).astype(float), rtol=1e-14, atol=1e-14)
    expected = ((exact - exact.mean(0)) ** 2).sum(0).astype(float)
    np.testing.assert_allclose(found[2], expected, rtol=1e-9, atol=1e-14 * max(offset, 1) ** 2)


def test_a_mean_of_ten_thousand_standard_deviations_costs_no_precision() -> None:
    values = torch.Generator().manual_seed(2)
    wide = 1e4 + torch.randn(64, 6, 4, 4, generator=values, dtype=torch.float64)
    cases = [("plain", x, torch.ones_like(x), (10, 50, 4)) for x in (wide.float(), wide)]
    for case, ranks in zip(cases, zip(*together(3, run_cases, cases), strict=True), strict=True):
        var = oracle.batch_moments(case[1].double())[1]
        single = case[1].dtype == torch.float32
        for r in ranks:
            unbiased = 0.9 + 0.1 * var * 1024 / 1023
            np.testing.assert_allclose(r["var"][0], unbiased, rtol=1e-6 if single else 1e-11)
        y = np.concatenate([r["y"][0] for r in ranks])
        assert np.abs(y - ranks[0]["y"][1]).max() <= (2e-6 if single else 1e-10)


def _quiet(rank: int) -> dict[str, Any]:
    """What is sent in each mode, counted at the layer's only way out."""
    sent: list[str] = []
    Group.gather = lambda self, v, _f=Group.gather: sent.append("forward") or _f(self, v)
    Group.sum = lambda self, v, _f=Group.sum: sent.append("backward") or _f(self, v)
    found: dict[str, Any] = {}

    def count(name: str, layer: BatchNorm, x: Tensor) -> None:
        sent.clear()
        y = layer(x)
        if y.requires_grad:
            y.sum().backward()
        found[name] = list(sent)

    x = torch.randn(4, 3, 2, 2, requires_grad=True)
    layer = layer_of(3, torch.float32)
    count("training", layer, x)
    count("pixels", layer, x.detach())
    count("no image", layer, x[:0])
    count("evaluation", layer.eval(), x)
    count("frozen", layer.train().freeze(), x)
    count("local", BatchNorm(3, group="world", statistics="local"), x)
    count("no statistics", BatchNorm(3, group="world", track_running_stats=False).eval(), x)
    one = [distributed.new_group([r]) for r in range(2)][rank]
    count("group of one", BatchNorm(3, group=one), x)
    assert torch.equal(
        BatchNorm(3, group=one)(x.detach()), BatchNorm(3)(x.detach())
    )  # the same bits as without
    return found


def test_each_way_is_one_message_and_frozen_and_evaluation_modes_send_nothing() -> None:
    for found in together(2, _quiet):
        both = ["forward", "backward"]
        assert found.pop("training") == both
        assert found.pop("no image") == both
        assert found.pop("pixels") == ["forward"]
        assert set(map(tuple, found.values())) == {()}, found


def _refusals(rank: int) -> list[str]:
    lines = []
    x = torch.randn(3, 2, requires_grad=True, dtype=torch.float64)
    layer = layer_of(2, torch.float64)
    with pytest.raises(UserError) as e:
        torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
    lines.append(str(e.value))
    with pytest.raises(UserError) as e:
        layer(x[:1] if rank == 0 else x[:0])
    lines.append(str(e.value))
    assert layer(x[:1]).shape == (1, 2)  # one image here, one there
    return lines


def test_refusals_name_what_to_do_in_every_rank() -> None:
    for double, single in together(2, _refusals):
        assert "no gradient of the gradient" in double
        assert "holds 1 value a channel" in single


def test_the_gradient_is_that_of_the_loss_of_all_ranks() -> None:
    assert together(2, _numerical) == [True, True]


def _numerical(rank: int) -> bool:
    values = torch.Generator().manual_seed(5)
    x, weights = torch.randn(2, 5, 2, 2, generator=values, dtype=torch.float64)
    part = slice(0, 2) if rank == 0 else slice(2, 5)
    layer, group = layer_of(2, torch.float64), Group()

    def loss(x: Tensor) -> Tensor:
        own = (layer(x[part]) * weights[part]).sum()
        return group.sum(own.detach().reshape(1).clone())

    leaf = x[part].clone().requires_grad_()
    (layer(leaf) * weights[part]).sum().backward()
    slopes = torch.empty_like(x)
    for index in range(x.numel()):  # both ranks move the same value of the whole batch
        ends = []
        for step in (1e-6, -1e-6):
            moved = x.clone()
            moved.view(-1)[index] += step
            ends.append(loss(moved))
        slopes.view(-1)[index] = ((ends[0] - ends[1]) / 2e-6).squeeze()
    torch.testing.assert_close(leaf.grad, slopes[part], rtol=1e-6, atol=1e-8)
    return True


def _ddp(rank: int, kind: type[nn.Module]) -> tuple[Any, Any]:
    """Somebody's own script: convert, wrap, train three steps on uneven parts."""
    values = torch.Generator().manual_seed(7)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), kind(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    alone = copy.deepcopy(network)
    ddp = nn.parallel.DistributedDataParallel(
        convert_sync_batchnorm(network), broadcast_buffers=False
    )
    x = torch.randn(3, 9, 3, 8, 8, generator=values)
    labels = torch.randint(4, (3, 9), generator=values)
    part = slice(0, 2) if rank == 0 else slice(2, 9)
    for model, chosen, share in ((alone, slice(0, 9), 1.0), (ddp, part, 2 / 9)):
        rate = torch.optim.SGD(model.parameters(), lr=0.1)
        for batch, answers in zip(x, labels, strict=True):
            rate.zero_grad()
            loss = nn.functional.cross_entropy(
                model(batch[chosen]), answers[chosen], reduction="mean" if share == 1 else "sum"
            )
            (loss * share).backward()
            rate.step()
    return (
        {k: v.numpy() for k, v in alone.state_dict().items()},
        {k: v.numpy() for k, v in network.state_dict().items()},
    )


@pytest.mark.soak  # its first object imports a compiler
def test_convert_sync_batchnorm_in_a_script_with_ddp() -> None:
    for alone, parts in together(2, _ddp, nn.BatchNorm2d):
        for name, value in alone.items():
            np.testing.assert_allclose(parts[name], value, rtol=1e-4, atol=2e-5, err_msg=name)


def test_conversion_keeps_what_the_network_is_and_goes_back() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), BatchNorm(4))
    parameters = list(network.parameters())
    assert convert_sync_batchnorm(network) is network
    assert all(a is b for a, b in zip(network.parameters(), parameters, strict=True))
    assert {type(m) for m in network[1:]} == {BatchNorm}
    assert "statistics='group'" in repr(network)
    assert copy.deepcopy(network)[1].group is network[1].group
    x = torch.randn(4, 3, 6, 6)
    with pytest.raises(UserError, match="init_process_group"):
        network(x)
    network.eval()(x)
    convert_sync_batchnorm(network, group=None).train()(x)
    with pytest.raises(UserError, match="choose group or local"):
        convert_sync_batchnorm(network, statistics="mine")
    with pytest.raises(UserError, match='"world"'):
        BatchNorm(3, group="word")
    assert normlab.convert_sync_batchnorm is convert_sync_batchnorm
