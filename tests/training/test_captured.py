"""Calls that stand for a network give its bits, and stand aside wherever something looks on."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import normlab
from normlab import kernels
from normlab.core.streams import stream
from normlab.layers import BatchNorm, Dense, Dropout, relu_dropout_norm
from normlab.layers.weights import _Dense
from normlab.models import FastNet, NotebookNet
from normlab.training.captured import Captured, holds_only_known
from normlab.training.hooks import Clock
from normlab.training.optimisers import Adam
from normlab.training.state import Hook, State
from normlab.training.step import train_step

pytestmark = [
    pytest.mark.usefixtures("undrawn"),
    pytest.mark.skipif(not kernels.available(), reason="no compiled kernels here"),
]


def batch(step: int, size: int = 32, side: int = 32) -> tuple[Tensor, Tensor]:
    rng = stream(0, "batch", step)
    x = torch.from_numpy(rng.random((size, 3, side, side), np.float32))
    x = x.contiguous(memory_format=torch.channels_last)
    return x, torch.from_numpy(rng.integers(0, 10, size))


class Pair:
    """The same training twice: by the model alone, and by calls where they stand for it."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        self.own, self.model = make().train(), make().train()
        self.calls, self.asked = Captured(self.model), 0
        forward = self.model.forward

        def counted(*arguments: Any) -> Any:
            self.asked += 1
            return forward(*arguments)

        self.model.forward = counted
        self.optimizers = [Adam(list(m.parameters())) for m in (self.own, self.model)]
        self.steps = 0

    def step(self, size: int = 32, side: int = 32) -> int:
        """A step of both; how often the model was asked in the second one."""
        before, results = self.asked, []
        networks: list[nn.Module | Captured] = [self.own, self.calls]
        for model, optimizer in zip(networks, self.optimizers, strict=True):
            x, labels = batch(self.steps, size, side)
            rng = stream(0, "dropout", self.steps)
            results.append((*train_step(model, optimizer, x, labels, rng), rng.random()))
        self.steps += 1
        assert results[0] == results[1]  # loss, right ones, and what else the stream would give
        values = [m.state_dict() for m in (self.own, self.model)]
        assert all(torch.equal(v, values[1][name]) for name, v in values[0].items())
        return self.asked - before


def test_from_the_third_step_on_calls_stand_for_the_network_with_its_bits() -> None:
    pair = Pair(NotebookNet)
    assert [pair.step() for _ in range(6)] == [1, 1, 0, 0, 0, 0]
    assert [pair.step(8) for _ in range(4)] == [1, 1, 0, 0]  # the last batch of an epoch
    assert [pair.step(n) for n in (32, 8, 32)] == [0, 0, 0]
    with torch.no_grad():
        pair.model.get_parameter("hidden.weight").mul_(0.5)  # in place, as an optimiser does
        pair.own.get_parameter("hidden.weight").mul_(0.5)
    assert pair.step() == 0


class Drawing(nn.Module):
    """A network of compiled passes whose `extra` does something that no call shows."""

    steps: Tensor

    def __init__(self, extra: Callable[["Drawing", np.random.Generator], float]) -> None:
        super().__init__()
        rng = stream(0, "init")
        self.first, self.last = Dense(3 * 32 * 32, 64, rng=rng), Dense(64, 32, rng=rng)
        self.dropout, self.norm = Dropout(0.2), BatchNorm(64, eps=1e-3, momentum=0.9)
        self.extra = extra
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor, rng: np.random.Generator) -> Tensor:
        x = x.permute(0, 2, 3, 1).flatten(1)
        self.norm.eps = self.extra(self, rng)
        y: Tensor = self.last(relu_dropout_norm(self.first(x), self.dropout, self.norm, rng))
        return y


def constant(network: Drawing, rng: np.random.Generator) -> float:
    return 1e-3


def drawn(network: Drawing, rng: np.random.Generator) -> float:
    return 1e-3 * (1 + rng.random())


def counted(network: Drawing, rng: np.random.Generator) -> float:
    network.steps += 1
    return 1e-3


def of_the_weights(network: Drawing, rng: np.random.Generator) -> float:
    return 1e-3 * (1 + float(network.first.weight.detach()[0, 0].abs()))


def test_a_network_of_compiled_passes_is_played() -> None:
    pair = Pair(lambda: Drawing(constant))
    assert [pair.step() for _ in range(4)] == [1, 1, 0, 0]


class Holding(nn.Module):
    """A network of compiled passes with a tensor that is no parameter and no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Dense(3 * 32 * 32, 64, rng=stream(0, "init"))
        self.fixed = torch.from_numpy(stream(0, "fixed").random((32, 64), np.float32))
        self.zeros = torch.zeros(32)

    def forward(self, x: Tensor, rng: np.random.Generator) -> Tensor:
        h = self.first(x.permute(0, 2, 3, 1).flatten(1))
        y: Tensor = _Dense.apply(h, self.fixed, self.zeros)  # type: ignore[no-untyped-call]
        return y


def test_what_no_call_writes_is_given_back() -> None:
    pair = Pair(Holding)
    assert [pair.step() for _ in range(4)] == [1] * 4
    own, model = pair.own, pair.model
    assert torch.equal(own.fixed, model.fixed)  # type: ignore[arg-type]


def test_batches_that_others_keep_stay_as_they_are() -> None:
    network = NotebookNet().train()
    calls, optimizer = Captured(network), Adam(list(network.parameters()))
    kept = [batch(0), batch(1)]
    before = [x.clone() for x, _ in kept]
    for step in range(8):
        x, labels = kept[step // 2 % 2]  # the same one twice, then another
        train_step(calls, optimizer, x, labels, stream(0, "dropout", step))
    assert all(torch.equal(x, old) for (x, _), old in zip(kept, before, strict=True))
    assert [p.trusted for p in calls._passes.values()] == [True]


@pytest.mark.parametrize("extra", [drawn, counted, of_the_weights])
def test_what_no_call_shows_keeps_the_network_itself(
    extra: Callable[[Drawing, np.random.Generator], float],
) -> None:
    pair = Pair(lambda: Drawing(extra))
    assert [pair.step() for _ in range(5)] == [1] * 5


@pytest.mark.parametrize(
    "make",
    [
        lambda: FastNet(stages=((16, 16, 16), (32,), (32,))),  # with a sum, which no call shows
        lambda: NotebookNet(norm="none"),
        lambda: NotebookNet(norm="layer"),
        lambda: NotebookNet(norm_position="before"),
        lambda: NotebookNet(logit_scale=0.5),
    ],
)
def test_other_networks_have_their_own_bits(make: Callable[[], nn.Module]) -> None:
    pair = Pair(make)
    for _ in range(5):
        pair.step()


def test_of_a_fast_network_calls_stand_for_all_but_the_last_layer() -> None:
    pair = Pair(FastNet)
    assert [pair.step() for _ in range(4)] == [0] * 4  # its body is asked, not the whole
    played = [p for p in pair.calls._passes.values() if p.trusted]
    assert len(played) == 1
    pair.step(32, 16)  # at half size
    assert len(pair.calls._passes) == 2


def test_a_frozen_body_is_the_networks_own() -> None:
    def frozen() -> nn.Module:
        network = FastNet()
        network.blocks.requires_grad_(False)
        return network

    pair = Pair(frozen)
    for _ in range(4):
        pair.step()
    assert all(p.refused for p in pair.calls._passes.values())


def test_large_batches_whose_products_are_onednns_are_the_networks_own() -> None:
    pair = Pair(NotebookNet)
    assert [pair.step(128) for _ in range(4)] == [1] * 4


def test_a_hook_sees_every_step_while_it_is_there() -> None:
    pair, seen = Pair(NotebookNet), []
    for _ in range(3):
        pair.step()
    layer = pair.model.get_submodule("batch_normalization_2")
    handle = layer.register_forward_hook(lambda *_: seen.append("layer"))
    weight = pair.model.get_parameter("conv2.weight")
    assert pair.step() == 1
    handle.remove()
    assert pair.step() == 0
    handle = weight.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
        lambda _: seen.append("weight")
    )
    assert pair.step() == 1
    handle.remove()
    assert pair.step() == 0
    assert seen == ["layer", "weight"]


def test_other_weights_other_threads_and_no_kernels_are_noticed() -> None:
    pair = Pair(NotebookNet)
    for _ in range(3):
        pair.step()
    for model in (pair.own, pair.model):
        weight = model.get_parameter("conv2.weight")
        weight.data = weight.detach().clone()
    assert [pair.step() for _ in range(3)] == [1, 1, 0]
    torch.set_num_threads(2)
    assert pair.step() == 1
    torch.set_num_threads(1)
    assert pair.step() == 0
    with kernels.disabled():
        assert pair.step() == 1
    pair.model.eval()
    with torch.no_grad():
        pair.calls(batch(0)[0], stream(0, "dropout", 0))
    pair.model.train()
    assert pair.step() == 0


def test_a_training_asks_the_network_for_two_steps_of_a_kind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[int] = []
    forward = NotebookNet.forward

    def counted(self: NotebookNet, x: Tensor, rng: np.random.Generator | None = None) -> Tensor:
        if self.training:
            asked.append(len(x))
        return forward(self, x, rng)

    settings: dict[str, Any] = {"data": "sample", "epochs": 3, "threads": 1, "batch_size": 32}
    monkeypatch.setattr(NotebookNet, "forward", counted)
    run = normlab.train("notebook", out=tmp_path / "played", **settings)
    monkeypatch.setattr(Captured, "__call__", lambda self, x, rng: self.model(x, rng))
    whole = normlab.train("notebook", out=tmp_path / "asked", **settings)
    assert run.result is not None
    assert whole.result is not None
    assert run.result["weights_sha256"] == whole.result["weights_sha256"]
    first = asked[: -run.history[-1]["steps"]]  # the second training asked at every step
    assert first[:2] == [32, 32]
    assert len(first) == 4  # and two of the last, smaller batch of an epoch


class Keeps:
    """An observer that keeps gradients, and what they were when it saw them."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, float]] = []

    def before_training(self, plan: object) -> None: ...

    def after_step(self, state: State, epoch: int, batch: int, batches: int) -> None:
        grad = state.model.get_parameter("conv1.weight").grad
        assert grad is not None
        self.seen.append((grad, float(grad.norm())))


def test_an_observer_may_keep_what_it_saw(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"data": "sample", "epochs": 1, "threads": 1, "batch_size": 32}
    keeps = Keeps()
    normlab.train("notebook", out=tmp_path / "run", observers=(keeps,), **settings)
    assert len(keeps.seen) > 5
    assert [float(grad.norm()) for grad, _ in keeps.seen] == [norm for _, norm in keeps.seen]


class Other(FastNet):
    """Somebody else's network."""


def test_others_hooks_layers_and_networks_are_asked_at_every_step() -> None:
    assert holds_only_known(NotebookNet(), Clock())
    assert holds_only_known(FastNet())
    assert not holds_only_known(NotebookNet(), Clock(), Hook(), Keeps())
    assert not holds_only_known(Other())
    assert not holds_only_known(nn.Sequential(NotebookNet(), Drawing(lambda model, h: h)))
    patched = NotebookNet()
    patched.forward = patched.forward
    assert not holds_only_known(patched)


def test_a_hook_on_all_modules_is_a_hook() -> None:
    pair = Pair(NotebookNet)
    for _ in range(3):
        pair.step()
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda *args: seen.append(args[0]))
    assert pair.step() == 1
    handle.remove()
    assert seen
    assert pair.step() == 0


def test_a_step_that_ends_halfway_is_no_step() -> None:
    pair = Pair(NotebookNet)
    for done in range(4):
        state = {name: v.clone() for name, v in pair.model.state_dict().items()}
        pair.calls(batch(done)[0], stream(0, "dropout", done))  # no backward
        pair.model.load_state_dict(state)
        pair.step()
    asked = pair.asked
    pair.step()
    assert pair.asked == asked
    assert not any(p.refused for p in pair.calls._passes.values())


def test_gradients_add_up_as_they_do_without() -> None:
    pair = Pair(NotebookNet)
    for _ in range(3):
        pair.step()
    for model in (pair.own, pair.calls):
        for step in (1, 2):
            x, labels = batch(step)
            loss = nn.functional.cross_entropy(model(x, stream(0, "dropout", step)), labels)
            loss.backward()  # type: ignore[no-untyped-call]
    for a, b in zip(pair.own.parameters(), pair.model.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


def test_the_first_step_imports_no_algebra() -> None:
    """`torch.autograd.grad` with `grad_outputs` would import SymPy, for 0.3 s."""
    program = """
import sys, torch
from normlab.core.streams import stream
from normlab.models import FastNet
from normlab.training.captured import Captured
calls = Captured(FastNet().train())
for step in range(3):
    x = torch.rand(8, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    calls(x, stream(0, "dropout", step)).sum().backward()
assert [p.trusted for p in calls._passes.values()] == [True]
assert "sympy" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
