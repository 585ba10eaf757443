"""The doctor beside a training: each fault is said once, with its remedy; the bits stay."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import normlab
from normlab.diagnosis import rules
from normlab.errors import UserError


def network(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, **options), nn.ReLU(),
        nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8, **options), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 16, 4),
    )  # fmt: skip


def train(
    model: nn.Module,
    epochs: int = 2,
    steps: int = 40,
    batch: int = 16,
    scale: Callable[[int], float] = lambda epoch: 1.0,
    **options: Any,
) -> tuple[list[str], normlab.Checkup]:
    lines: list[str] = []
    checkup = normlab.Checkup(model, report=lines.append, **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    generator = torch.Generator().manual_seed(0)
    for epoch in range(epochs):
        model.train()
        for _ in range(steps):
            x = scale(epoch) * torch.randn(batch, 3, 8, 8, generator=generator)
            loss = cross_entropy(model(x), torch.arange(batch) % 4)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        checkup.end_epoch()
    return lines, checkup


def test_a_healthy_training_hears_nothing_and_keeps_its_bits() -> None:
    watched, alone = network(), network()
    lines, checkup = train(watched, epochs=3)
    assert lines == checkup.findings == []
    checkup.close()
    assert not any(m._forward_pre_hooks for m in watched.modules())
    train(alone, epochs=3, every=100)
    for ours, theirs in zip(
        watched.state_dict().values(), alone.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_stale_statistics_are_said_once_for_all_layers_with_the_remedy() -> None:
    lines, checkup = train(network(momentum=0.01), steps=10)
    [line] = lines
    assert line.startswith("epoch 1: ")
    assert "stale at 1, 4: after 10 steps with m = 0.99 they weigh 0.90" in line
    assert f"Remedy: {rules.statistics.stale.remedy}." in line
    assert {f.where for f in checkup.findings} == {"1", "4"}


def test_statistics_far_from_the_data_are_seen_without_running_the_model() -> None:
    """The running statistics of a layer with a slow momentum are left behind by louder pictures."""
    model = network(momentum=1e-4)
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.BatchNorm2d):
                layer.num_batches_tracked += 10**6
    lines, _ = train(model, scale=lambda epoch: 10.0)
    assert any("far-from-data at 1" in line for line in lines), lines


def test_dead_channels_small_batches_and_frozen_layers_are_found() -> None:
    model = network()
    with torch.no_grad():
        model[3].weight[:4] = 0.0
    model[3].weight.register_hook(lambda g: g.index_fill(0, torch.arange(4), 0.0))
    lines, _ = train(model, batch=4)
    text = "\n".join(lines)
    assert "constant-channel at 4: 4 of 8 channels do not vary, 4 of them always 0" in text
    assert "small-batches at batches: 4 images a batch" in text

    thawed = network()
    for parameter in thawed[1].parameters():
        parameter.requires_grad_(False)
    lines, _ = train(thawed)
    assert any("frozen-but-updating at 1" in line for line in lines)


def test_a_last_batch_of_one_is_found() -> None:
    lines: list[str] = []
    model = network()
    checkup = normlab.Checkup(model, report=lines.append)
    for size in (16, 16, 1):
        model(torch.randn(size, 3, 8, 8)).sum().backward()
    checkup.end_epoch()
    assert any("last-batch-of-one" in line for line in lines), lines


def test_it_comes_as_often_as_it_was_asked_to_and_needs_no_normaliser() -> None:
    model = network(momentum=0.01)
    checkup = normlab.Checkup(model, every=3, report=None)
    found = []
    for _ in range(4):
        model(torch.randn(4, 3, 8, 8)).sum().backward()
        found.append(bool(checkup.end_epoch()))
    assert found == [True, False, False, False]
    assert checkup.epoch == 4
    plain = normlab.Checkup(nn.Linear(2, 2))
    plain.model(torch.randn(2, 2)).sum().backward()
    assert plain.end_epoch() == ()
    with pytest.raises(UserError, match="every=0: choose 1 or more epochs"):
        normlab.Checkup(nn.Linear(2, 2), every=0)


def test_wrapped_models_are_looked_into() -> None:
    inner = network(momentum=0.01)
    compiled: Any = torch.compile(inner, backend="eager")
    lines, checkup = train(compiled, epochs=1, steps=3)
    assert checkup.model is inner
    assert any("stale" in line for line in lines)


def evaluate(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model.eval()(x)


def test_evaluations_between_are_none_of_the_training_s() -> None:
    model = network()
    checkup = normlab.Checkup(model, report=None)
    model.train()(torch.randn(16, 3, 8, 8)).sum().backward()
    evaluate(model, 100 * torch.randn(1, 3, 8, 8))
    model.train()
    assert {f.rule for f in checkup.end_epoch()} <= {"stale"}
