"""Watching somebody else's training: what is seen is true, and the training does not notice."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import normlab
from normlab.__main__ import run as command
from normlab.errors import DataError, UserError
from normlab.inspection.recording import MOST_SAMPLES, read_recording
from normlab.inspection.watching import MOST_CALLS, watchable


class Net(nn.Module):
    """A normaliser of each kind, a shared layer, dropout, in-place ReLU and a frozen layer."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = norm(8)
        self.relu = nn.ReLU(inplace=True)
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.group = nn.GroupNorm(2, 8)
        self.dropout = nn.Dropout(0.3)
        self.tokens = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.bn1(self.conv1(x)))
        h = self.shared(self.group(self.shared(h)))
        t = self.tokens(self.dropout(h).flatten(2).transpose(1, 2))  # (N, 64, 8)
        return self.fc(t).mean(1)


def batches(count: int = 20) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(6, 3, 8, 8, generator=generator), torch.arange(6) % 4) for _ in range(count)
    ]


def train(
    model: nn.Module, folder: Path | None, *, parts: int = 1, steps: int = 20, **options: Any
) -> list[float]:
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    watch = None
    if folder is not None:
        watch = normlab.watch(model, folder, optimizer=optimizer, **{"every": 5, **options})
    losses = []
    for x, y in batches(steps):
        optimizer.zero_grad()
        total = 0.0
        for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
            loss = cross_entropy(model(a), b) / parts
            loss.backward()
            total += loss.item()
        optimizer.step()
        losses.append(total)
        if watch is not None:
            watch.step(total)
        with torch.no_grad():
            model.eval()
            model(x)  # an evaluation between steps is none of the training's
            model.train()
    if watch is not None:
        watch.close()
    return losses


def fresh(kind: Callable[[], nn.Module] = Net) -> nn.Module:
    torch.manual_seed(0)
    return kind()


def test_what_is_seen_is_true_and_the_training_keeps_its_bits(tmp_path: Path) -> None:
    alone, watched = fresh(), fresh()
    losses = train(alone, None)
    assert train(watched, tmp_path / "w") == losses
    for name, value in alone.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name
    seen = read_recording(tmp_path / "w")
    assert list(seen.steps) == [1, 2, 4, 5, 10, 15, 20]
    assert set(seen.layers) == {"conv1", "bn1", "shared", "group", "tokens", "fc"}
    assert seen.arrays["loss"] == pytest.approx([losses[s - 1] for s in seen.steps])

    # The first step once more, by hand.
    model, (x, y) = fresh(), batches()[0]
    torch.manual_seed(0)
    inputs: dict[str, Tensor] = {}
    for name in ("bn1", "tokens", "fc"):
        model.get_submodule(name).register_forward_hook(
            lambda m, i, o, name=name: inputs.__setitem__(name, i[0].detach().clone())
        )
    out: list[Tensor] = []
    model.get_submodule("bn1").register_forward_hook(lambda m, i, o: out.append(o.clone()))
    kept = out
    loss = cross_entropy(model(x), y)
    loss.backward()
    mean = inputs["bn1"].mean((0, 2, 3))
    assert seen.arrays["bn1/in/mean"][0] == pytest.approx(mean.numpy(), abs=1e-6)
    var = inputs["bn1"].var((0, 2, 3), unbiased=False)
    assert seen.arrays["bn1/in/var"][0] == pytest.approx(var.numpy(), rel=1e-5)
    expected = inputs["tokens"].mean((0, 1))  # channels last
    assert seen.arrays["tokens/in/mean"][0] == pytest.approx(expected.numpy(), abs=1e-6)
    assert seen.arrays["fc/in/mean"].shape == (7, 8)
    percentiles = np.percentile(kept[0].detach().numpy(), (15, 50, 85))
    assert seen.arrays["bn1/out/percentiles"][0] == pytest.approx(percentiles, abs=0.02)
    grad = model.get_parameter("conv1.weight").grad
    assert grad is not None
    assert seen.arrays["conv1/weight_grad"][0] == pytest.approx(float(grad.norm()), rel=1e-5)
    assert np.isfinite(seen.arrays["conv1/in/drift"][1:]).all()
    assert (seen.arrays["bn1/in/drift"][1:] > 0).all()
    assert seen.arrays["conv1/in/drift"][1:].max() < 1e-6  # the pixels do not change
    weight = float(watched.get_parameter("fc.weight").detach().norm())
    assert seen.arrays["fc/effective_rate"][-1] == pytest.approx(0.05 / weight**2, rel=1e-5)


def test_a_batch_in_parts_and_a_shared_layer_are_seen_as_one(tmp_path: Path) -> None:
    whole, parts = fresh(), fresh()
    for model in (whole, parts):
        model.get_submodule("dropout").p = 0.0  # type: ignore[assignment]
        model.bn1 = nn.GroupNorm(4, 8)
    train(whole, tmp_path / "whole", steps=1)
    train(parts, tmp_path / "parts", steps=1, parts=3)
    one, three = (read_recording(tmp_path / name) for name in ("whole", "parts"))
    for key in ("bn1/in/mean", "bn1/in/var", "shared/out/var", "fc/in/mean", "bn1/grad"):
        assert three.arrays[key][0] == pytest.approx(one.arrays[key][0], rel=1e-4, abs=1e-6), key
    assert three.arrays["fc/weight_grad"] == pytest.approx(one.arrays["fc/weight_grad"], rel=1e-4)


def test_memory_is_bounded_however_often_a_layer_is_called(tmp_path: Path) -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2 * MOST_CALLS):
                x = torch.tanh(self.cell(x))
            return x

    model = Loop()
    with normlab.watch(model, tmp_path / "w") as watch:
        model(torch.randn(5, 4)).sum().backward()
        assert len(watch.layers["cell"].sides[0].values) == MOST_CALLS
        watch.step()
        assert not watch.layers["cell"].sides[0].values
    assert np.isnan(read_recording(tmp_path / "w").arrays["loss"][0])


def test_a_long_training_keeps_about_a_hundred_samples(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    with normlab.watch(model, tmp_path / "w", every=1) as watch:
        for i in range(450):
            loss = model(torch.randn(4, 3)).square().sum()
            loss.backward()
            watch.step(loss + i)
    seen = read_recording(tmp_path / "w")
    assert MOST_SAMPLES / 3 < len(seen.steps) <= MOST_SAMPLES
    assert set(np.diff(seen.steps[-20:])) == {watch.every}


def test_a_layer_that_is_given_no_image_is_passed_by(tmp_path: Path) -> None:
    """As the head of a detector, where a picture has no region."""

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x).sum() + self.head(x[:0]).sum()  # type: ignore[no-any-return]

    model = Detector().train()
    with normlab.watch(model, tmp_path / "w", every=1) as watch:
        for _ in range(2):
            loss = model(torch.randn(4, 3))
            loss.backward()
            watch.step(loss)
    assert read_recording(tmp_path / "w").layers == ("norm",)
    assert watch.notes == ["not run as modules, or on no image, and left out: head"]


def test_layers_kept_in_evaluation_mode_are_looked_at_in_it(tmp_path: Path) -> None:
    """As normalisers of a pretrained network are, whose statistics shall stay."""
    model = fresh().train()
    frozen = model.get_submodule("bn1").eval()
    modes: list[bool] = []
    frozen.register_forward_hook(lambda module, *_: modes.append(module.training))
    with normlab.watch(model, tmp_path / "w", every=1) as watch:
        for x, y in batches(3):
            loss = cross_entropy(model(x), y)
            loss.backward()
            watch.step(loss)
    assert watch.drifts
    assert modes == [False] * 8  # three steps, and five looks
    assert model.training
    assert not frozen.training


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d,
        nn.InstanceNorm2d,
        lambda c: nn.InstanceNorm2d(c, affine=True, track_running_stats=True),
        lambda c: nn.GroupNorm(2, c),
        lambda c: nn.LayerNorm([c, 8, 8]),
        nn.Identity,
        normlab.BatchNorm,
        normlab.layers.GroupNorm,
        normlab.layers.NoNorm,
    ],
)
def test_every_kind_of_normaliser_is_watched_and_drawn(
    norm: Callable[[int], nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = fresh(lambda: Net(norm if norm is not nn.Identity else lambda c: nn.Identity()))
    train(model, tmp_path / "w", steps=3, label="one\x1b[1m")
    seen = read_recording(tmp_path / "w")
    assert "bn1" in seen.layers
    assert np.isfinite(seen.arrays["bn1/out/percentiles"]).all()
    if norm is nn.BatchNorm2d:
        train(fresh(), tmp_path / "v", steps=3)
        assert command(["inspect", str(tmp_path / "w"), str(tmp_path / "v")]) == 0
        said = capsys.readouterr().out
        assert "one\\x1b[1m: 2 samples" in said
        assert (tmp_path / "w" / "inspect" / "report.html").exists()


def test_a_layer_that_sometimes_does_not_run_is_kept(tmp_path: Path) -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.sometimes = nn.Linear(3, 3), nn.Linear(3, 3)
            self.never = nn.Linear(3, 3)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.always(x) + (self.sometimes(x) if self.calls == 1 else 0)

    model = Skips()
    with normlab.watch(model, tmp_path / "w", every=1) as watch:
        for _ in range(2):
            model(torch.randn(4, 3)).sum().backward()
            watch.step()
    seen = read_recording(tmp_path / "w")
    assert seen.layers == ("always", "sometimes")
    assert list(np.isnan(seen.arrays["sometimes/out/mean"]).all(1)) == [False, True]
    notes = json.loads((tmp_path / "w" / "watch.json").read_text())["notes"]
    assert notes == ["not run as modules, or on no image, and left out: never"]
    normlab.inspect(tmp_path / "w").write(tmp_path / "drawn")


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


def test_what_cannot_be_watched_is_refused_by_name(tmp_path: Path) -> None:
    compiled = torch.compile(nn.Linear(2, 2), backend="eager")
    in_place = nn.Linear(2, 2)
    in_place.compile(backend="eager")
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        scripted = torch.jit.script(nn.Linear(2, 2))
    for model, message in (
        (compiled, "the model is compiled by torch.compile"),
        (Wrapped(in_place), "layer 'inner' is compiled by torch.compile"),
        (Wrapped(scripted), "layer 'inner' is TorchScript"),
        (nn.DataParallel(nn.Linear(2, 2)), "the model is wrapped in DataParallel"),
        (nn.ReLU(), "no normaliser, convolution or dense layer"),
    ):
        with pytest.raises(UserError, match=message):
            normlab.watch(model, tmp_path / "w")
    with pytest.raises(UserError, match="every=0: choose 1 or more"):
        normlab.watch(nn.Linear(2, 2), tmp_path / "w", every=0)
    with pytest.raises(UserError, match="layers fd: choose from fc"):
        watchable(nn.ModuleDict({"fc": nn.Linear(2, 2)}), ["fd"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(UserError, match="is not empty: choose a new one to watch"):
        normlab.watch(nn.Linear(2, 2), tmp_path / "full")
    watch = normlab.watch(nn.Linear(2, 2), tmp_path / "idle")
    with pytest.raises(UserError, match="none of the 1 layers ran as a module"):
        watch.step()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "watch.json").write_text('{"label": 3}')
    with pytest.raises(DataError, match="is not as normlab wrote it"):
        normlab.inspect(tmp_path / "bad")


def test_a_model_under_ddp_is_watched_on_rank_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        inner, plain = fresh(), fresh()
        wrapped = nn.parallel.DistributedDataParallel(inner)
        losses = train(wrapped, tmp_path / "ddp", steps=5)
        assert train(plain, tmp_path / "plain", steps=5) == losses
        one, two = (read_recording(tmp_path / name) for name in ("ddp", "plain"))
        assert one.layers == two.layers
        for name, values in one.arrays.items():
            if name != "seconds":
                assert np.array_equal(values, two.arrays[name], equal_nan=True), name
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
        train(wrapped, tmp_path / "other", steps=2)
        assert not (tmp_path / "other").exists()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif("OTHERS" not in os.environ, reason="OTHERS=1 where torchvision and timm are")
@pytest.mark.parametrize(
    "name",
    ["torchvision resnet18", "torchvision mobilenet_v3_small", "torchvision convnext_tiny",
     "torchvision vit_b_16", "torchvision densenet121", "timm resnet26d", "timm convnext_atto",
     "timm efficientnet_lite0", "timm mixer_s32_224", "timm regnetx_002"],
)  # fmt: skip
def test_networks_of_others_are_watched_and_keep_their_bits(name: str, tmp_path: Path) -> None:
    from benchmarks.doctor_world import define_operators, torch_network

    define_operators()
    size = 224 if "224" in name or "vit" in name else 64
    x, y = torch.randn(4, 3, size, size), torch.arange(4)
    states = []
    for folder in (None, tmp_path / "w"):
        torch.manual_seed(0)
        model = torch_network(*name.split()).train()
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        watch = normlab.watch(model, folder, every=2) if folder else None
        for _ in range(2):
            loss = cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if watch is not None:
                watch.step(loss)
        if watch is not None:
            watch.close()
            assert watch.drifts, watch.notes
        states.append(model.state_dict())
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
    assert len(read_recording(tmp_path / "w").layers) > 10
