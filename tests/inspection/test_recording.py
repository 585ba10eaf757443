"""A recording is true, and the run does not notice it."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu

import normlab
import normlab.training.checkpoint
from normlab import recipes
from normlab.__main__ import run as command
from normlab.core.environment import settings
from normlab.core.streams import stream
from normlab.core.tensors import digest
from normlab.data.augment import to_input
from normlab.data.batches import split_validation
from normlab.errors import DataError, Interrupted, NormlabError, UserError
from normlab.evaluation.forward import untouched
from normlab.inspection import activations
from normlab.inspection.recording import (
    MOST_SAMPLES,
    RECORDING,
    Recorder,
    read_recording,
    sampled_steps,
)
from normlab.layers import BatchNorm, Dropout
from normlab.models import NotebookNet
from normlab.training.loop import fit
from normlab.training.optimisers import make_optimizer
from normlab.training.state import Observer, Plan, State

pytestmark = pytest.mark.usefixtures("undrawn")


def few_images() -> normlab.ImageData:
    """80 training and 20 test images, of all classes."""
    data = normlab.load("sample")
    return replace(
        data,
        x_train=data.x_train[::5],
        y_train=data.y_train[::5],
        x_test=data.x_test[::10],
        y_test=data.y_test[::10],
    )


class After:
    """Calls something with the state after each step."""

    def __init__(self, action: Callable[[State], None]) -> None:
        self.action = action

    def before_training(self, plan: Plan) -> None:
        self.plan = plan

    def after_step(self, state: State, epoch: int, batch: int, batches: int) -> None:
        self.action(state)


class Net(nn.Module):
    """Convolution, ReLU, dropout, normaliser and output, small enough to check by hand."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv = nn.Conv2d(3, 5, 3)
        self.dropout = Dropout(0.25)
        self.norm = BatchNorm(5)
        self.output = nn.Linear(5 * 36, 4)
        with torch.no_grad():
            for parameter in (*self.conv.parameters(), *self.output.parameters()):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))

    def forward(self, x: Tensor, rng: np.random.Generator | None = None) -> Tensor:
        return self.output(self.norm(self.dropout(relu(self.conv(x)), rng)).flatten(1))


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (16, 8, 8, 3), dtype=np.uint8)
    return to_input(images), torch.from_numpy(rng.integers(0, 4, 16))


def fit_notebook(folder: Path, *observers: Any, norm: str = "batch") -> State:
    """Train the notebook's network for 15 steps without a run's ceremony."""
    images = few_images()
    train, validation = split_validation(images.x_train, images.y_train, 0.1)
    recipe = recipes.get("notebook").override(norm=norm, epochs=3, batch_size=16)
    plan = Plan(recipe=recipe, folder=folder, seed=0, threads=1, train=train, validation=validation)
    model = NotebookNet(norm=norm, seed=0)
    state = State(model, make_optimizer(plan.recipe.optimizer, model))
    with settings(1, torch.device("cpu")):
        fit(plan, state, torch.device("cpu"), observers)
    return state


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State, Recorder]:
    folder, recorder = tmp_path_factory.mktemp("recorded"), Recorder()
    return folder, fit_notebook(folder, recorder), recorder


def test_a_recorded_training_ends_with_the_same_bits(
    tmp_path: Path, recorded: tuple[Path, State, Recorder]
) -> None:
    plain = fit_notebook(tmp_path)
    assert digest(plain.model.state_dict()) == digest(recorded[1].model.state_dict())
    assert plain.history[-1]["val_loss"] == recorded[1].history[-1]["val_loss"]


def test_so_does_one_without_normalisation(tmp_path: Path) -> None:
    plain, recorded = (fit_notebook(tmp_path, *o, norm="none") for o in ((), (Recorder(),)))
    assert digest(plain.model.state_dict()) == digest(recorded.model.state_dict())


def test_the_probe_leaves_statistics_modes_and_gradients(batch: tuple[Tensor, Tensor]) -> None:
    model = Net()
    model.norm.eval()
    model(batch[0], stream(0)).sum().backward()
    drawn = torch.get_rng_state().clone(), np.random.get_state()[1].copy()  # noqa: NPY002
    tensors = {**model.state_dict(), **{n: p.grad for n, p in model.named_parameters()}}
    before = {name: t.clone() for name, t in tensors.items() if t is not None}
    activations.probe(model, *batch, stream(0, "probe"))
    activations.channel_means(model, batch[0], stream(0, "probe"))
    tensors = {**model.state_dict(), **{n: p.grad for n, p in model.named_parameters()}}
    assert all(torch.equal(tensors[name], t) for name, t in before.items())  # type: ignore[arg-type]
    assert model.training
    assert not model.norm.training
    assert not any(m._forward_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), drawn[0])
    assert np.array_equal(np.random.get_state()[1], drawn[1])  # noqa: NPY002


def test_the_model_comes_back_after_an_error() -> None:
    model = Net().eval()

    def fail() -> None:
        with untouched(model):
            model.train()
            model.norm.running_mean.add_(1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not any(m.training for m in model.modules())
    assert torch.equal(model.norm.running_mean, torch.zeros(5))


def test_the_probe_agrees_with_numpy_in_float64(batch: tuple[Tensor, Tensor]) -> None:
    model, (x, labels) = Net(), batch
    sample = activations.probe(model, x, labels, stream(0, "mask"))
    z = model.conv(x)
    z.retain_grad()
    h = model.dropout(relu(z), stream(0, "mask"))
    y = model.norm(h)
    loss = cross_entropy(model.output(y.flatten(1)), labels)
    loss.backward()
    assert sample["loss"] == pytest.approx(loss.item(), rel=1e-6)
    for name, tensor in {"conv/in": x, "conv/out": z, "norm/in": h, "norm/out": y}.items():
        values = tensor.detach().double().numpy()
        axes = (0, 2, 3)
        assert sample[f"{name}/mean"] == pytest.approx(values.mean(axes), abs=1e-5)
        assert sample[f"{name}/var"] == pytest.approx(values.var(axes), rel=1e-3)
        expected = np.percentile(values, [15, 50, 85])
        assert sample[f"{name}/percentiles"] == pytest.approx(expected, abs=1e-4)
        middle = np.percentile(values[:, values.shape[1] // 2], [15, 50, 85])
        assert sample[f"{name}/unit"] == pytest.approx(middle, abs=1e-4)
        low, high = sample[f"{name}/range"]
        inside = ((values >= low) & (values <= high)).sum()
        assert sample[f"{name}/histogram"].sum() == pytest.approx(inside, abs=8)
    gradient, weight = z.grad, model.conv.weight
    assert gradient is not None
    assert weight.grad is not None
    assert sample["conv/grad"] == pytest.approx(gradient.norm().item(), rel=1e-4)
    assert sample["conv/weight_grad"] == pytest.approx(weight.grad.norm().item(), rel=1e-4)
    assert sample["conv/weight_norm"] == pytest.approx(weight.norm().item(), rel=1e-6)
    assert sample["norm/gamma"] == pytest.approx(np.ones(5))
    assert sample["norm/running_mean"] == pytest.approx(np.zeros(5))  # the probe moved nothing


def test_dead_units_are_counted(batch: tuple[Tensor, Tensor]) -> None:
    model = Net()
    assert activations.probe(model, *batch, stream(0))["conv/dead"] == 0
    with torch.no_grad():
        assert model.conv.bias is not None
        model.conv.bias[1] = -1e6
    assert activations.probe(model, *batch, stream(0))["conv/dead"] == pytest.approx(1 / 5)


def test_a_layer_that_is_bypassed_is_named(batch: tuple[Tensor, Tensor]) -> None:
    class Shortcut(Net):
        def forward(self, x: Tensor, rng: np.random.Generator | None = None) -> Tensor:
            return self.output(relu(self.conv(x)).flatten(1))

    with pytest.raises(NormlabError, match="norm were bypassed"):
        activations.probe(Shortcut(), *batch, stream(0))


def test_activations_that_are_not_finite_are_recorded_as_such(
    batch: tuple[Tensor, Tensor],
) -> None:
    model = Net()
    with torch.no_grad():
        model.conv.weight[0] = torch.inf
    sample = activations.probe(model, *batch, stream(0))
    assert np.isfinite(sample["conv/out/percentiles"]).all()  # of the channels that are
    assert np.isnan(sample["output/out/percentiles"]).all()
    assert sample["output/out/histogram"].sum() == 0


def test_drift_is_what_the_last_step_moved(tmp_path: Path) -> None:
    states: dict[int, dict[str, Tensor]] = {}

    def keep(state: State) -> None:
        states[state.step] = {k: v.clone() for k, v in state.model.state_dict().items()}

    recorder = Recorder()
    fit_notebook(tmp_path, recorder, After(keep))
    recording = read_recording(tmp_path)
    model, step = NotebookNet(), int(recording.steps[-1])
    x, means = to_input(recorder.images), {}
    for place in (step - 1, step):
        model.load_state_dict(states[place])
        means[place] = activations.channel_means(model, x, stream(0, "probe", "dropout"))
    name = "hidden/in"
    moved = np.abs(means[step][f"{name}/mean"] - means[step - 1][f"{name}/mean"])
    var = recording.arrays[f"{name}/var"][-1]
    expected = (moved[var > 0] / np.sqrt(var[var > 0])).mean()
    assert recording.arrays[f"{name}/drift"][-1] == pytest.approx(expected, rel=1e-3)
    assert np.isnan(recording.arrays[f"{name}/drift"][0])
    rate = 1e-3 / recording.arrays["hidden/weight_norm"] ** 2
    assert recording.arrays["hidden/effective_rate"] == pytest.approx(rate, rel=1e-5)


def begin(folder: Path, observers: tuple[Observer, ...]) -> None:
    """As `recorded` was trained."""
    options: dict[str, Any] = {"epochs": 3, "batch_size": 16, "threads": 1}
    normlab.train("notebook", data=few_images(), out=folder, observers=observers, **options)


def test_a_resumed_run_goes_on_with_its_recording(
    tmp_path: Path, recorded: tuple[Path, State, Recorder]
) -> None:
    steps = sampled_steps(15)
    last = next(k for k in range(6, 15) if k not in steps and k + 1 not in steps)

    def interrupt(state: State) -> None:
        if state.step == last:
            os.kill(os.getpid(), signal.SIGINT)

    data, folder = few_images(), tmp_path / "run"
    with pytest.raises(Interrupted):
        begin(folder, (Recorder(), After(interrupt)))
    assert 1 < read_recording(folder).steps[-1] < last
    normlab.resume(folder, data=data)
    whole, resumed = read_recording(recorded[0]), read_recording(folder)
    assert resumed.steps.tolist() == whole.steps.tolist() == steps
    assert resumed.arrays.keys() == whole.arrays.keys()
    for name in whole.arrays.keys() - {"seconds"}:
        assert np.array_equal(whole.arrays[name], resumed.arrays[name], equal_nan=True), name


@pytest.mark.parametrize("first", [True, False])
def test_no_sample_is_lost_between_two_observers(
    tmp_path: Path,
    recorded: tuple[Path, State, Recorder],
    monkeypatch: pytest.MonkeyPatch,
    first: bool,
) -> None:
    """With a checkpoint after every step, and an end before or after the recorder is told of it."""
    monkeypatch.setattr(normlab.training.checkpoint, "SECONDS_BETWEEN", 0.0)

    def end(state: State) -> None:
        if state.step == 8:
            raise SystemExit

    data, folder = few_images(), tmp_path / "run"
    observers = (Recorder(), After(end))
    with pytest.raises(SystemExit):
        begin(folder, observers if first else observers[::-1])
    normlab.resume(folder, data=data)
    whole, resumed = read_recording(recorded[0]), read_recording(folder)
    assert 8 in sampled_steps(15)
    assert resumed.steps.tolist() == sampled_steps(15)
    for name in whole.arrays:
        if not name.endswith(("seconds", "drift")):
            assert np.array_equal(whole.arrays[name], resumed.arrays[name], equal_nan=True), name


class Ended(After):
    """Ends the process before the first step."""

    def __init__(self) -> None:
        super().__init__(lambda state: None)

    def before_training(self, plan: Plan) -> None:
        raise SystemExit


@pytest.mark.parametrize("begun", [True, False])
def test_what_a_run_was_asked_to_observe_is_known_before_its_first_step(
    tmp_path: Path, begun: bool
) -> None:
    """Asked when it was begun, or when it was resumed; the next resume is not asked again."""
    data, folder = few_images(), tmp_path / "run"
    options: dict[str, Any] = {"epochs": 1, "batch_size": 16, "threads": 1, "observers": (Ended(),)}
    if begun:
        options |= {"record": ["hidden", "conv1"], "three_way": True}
    with pytest.raises(SystemExit):
        normlab.train("notebook", data=data, out=folder, **options)
    if not begun:
        with pytest.raises(SystemExit):
            normlab.resume(folder, data=data, record=True, three_way=True, observers=(Ended(),))
    run = normlab.resume(folder, data=data)
    recording = read_recording(folder)
    assert recording.steps.tolist() == sampled_steps(5)
    assert len(recording.layers) == (2 if begun else 10)
    assert {"conv1", "hidden"} <= set(recording.layers)
    assert "val_accuracy_population" in run.history[0]


def test_a_resume_is_not_asked_for_scores_that_there_cannot_be(tmp_path: Path) -> None:
    """It would be known to the folder, and no later resume could go on."""
    data, folder = few_images(), tmp_path / "run"
    with pytest.raises(SystemExit):
        normlab.train(
            "notebook", data=data, out=folder, validation=0.0, threads=1, observers=(Ended(),)
        )
    with pytest.raises(UserError, match="holds out none"):
        normlab.resume(folder, data=data, three_way=True)
    assert "three_way" not in normlab.open_run(folder).environment


def test_a_cut_keeps_all_arrays_of_one_length(recorded: tuple[Path, State, Recorder]) -> None:
    recording = read_recording(recorded[0]).until(5)
    assert recording.steps.tolist() == [step for step in sampled_steps(15) if step <= 5]
    assert {len(values) for values in recording.arrays.values()} == {len(recording.steps)}


def test_the_file_is_plain_arrays_of_bounded_width(
    recorded: tuple[Path, State, Recorder],
) -> None:
    path = recorded[0] / RECORDING
    with np.load(path, allow_pickle=False) as file:
        samples = len(file["step"])
        assert {"conv1", "batch_normalization_3", "output"} <= set(file["layers"])
        for name in set(file.files) - {"step", "layers"}:
            assert file[name].dtype == np.float32
            assert len(file[name]) == samples
            assert file[name][0].size <= activations.CHANNELS  # though a layer has 3,136
    assert path.stat().st_size < 25_000 * samples


@given(st.integers(1, 10**6))
def test_sampling_is_bounded_and_has_both_ends(steps: int) -> None:
    chosen = sampled_steps(steps)
    assert chosen == sorted(set(chosen))
    assert chosen[0] == 1
    assert chosen[-1] == steps
    assert len(chosen) <= min(steps, MOST_SAMPLES + 1)


def test_a_missing_or_damaged_recording_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--record"):
        read_recording(tmp_path)
    (tmp_path / RECORDING).write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(DataError, match="not a whole recording"):
        read_recording(tmp_path)
    np.savez(tmp_path / RECORDING, step=np.arange(3), layers=np.array(["a"]), loss=np.zeros(2))
    with pytest.raises(DataError, match="does not go upwards"):
        read_recording(tmp_path)


@pytest.mark.parametrize(
    "chosen", ["hidden", "batch_normalization_3", "conv2,batch_normalization_3"]
)
def test_chosen_layers(
    chosen: str, in_tmp: Path, recorded: tuple[Path, State, Recorder], capfd: Any
) -> None:
    """Their values are those of a full recording; `inspect` draws what there is."""
    data = few_images()
    np.savez("few.npz", **{k: getattr(data, k) for k in ("x_train", "y_train", "x_test", "y_test")})
    words = ["train", "notebook", "--data", "few.npz", "--epochs", "1", "--batch-size", "16"]
    words += ["--threads", "1", "--out", "a", "--layers", chosen]
    assert command([*words, "--record"]) == 0
    found, full = read_recording(in_tmp / "a"), read_recording(recorded[0])
    assert found.layers == tuple(chosen.split(","))
    for layer in found.layers:  # the layers not chosen stay fused, which rounds otherwise
        for key in ("in/mean", "in/var", "out/percentiles", "grad", "weight_norm", "gamma"):
            if (values := found.get(layer, key)) is not None:
                expected = full.arrays[f"{layer}/{key}"][0]
                assert values[0] == pytest.approx(expected, rel=1e-3, abs=1e-5), (layer, key)
    assert command(["inspect", "a"]) == 0
    assert "samples" in capfd.readouterr().out


def test_layers_that_are_not_there_are_refused_before_a_folder_is_made(
    in_tmp: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "notebook", "--data", "sample", "--out", "a", "--layers", "conv9"]
    assert command([*words, "--record"]) == 2
    assert "layers conv9: choose from batch_normalization" in capfd.readouterr().err
    assert command(words) == 2
    assert "add --record" in capfd.readouterr().err
    assert not (in_tmp / "a").exists()


def test_a_recorded_fast_training_ends_with_the_same_bits(tmp_path: Path) -> None:
    """Another network and optimiser, averaged weights, and views that change in size."""
    plain, recorded = (
        normlab.train("fast79", data="sample", epochs=2, batch_size=100, ema=0.9, threads=1,
                      out=tmp_path / str(record), record=record)
        for record in (False, True)
    )  # fmt: skip
    assert plain.result is not None
    assert recorded.result is not None
    for key in ("weights_sha256", "test_loss"):
        assert plain.result[key] == recorded.result[key]


def test_the_command_records(in_tmp: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = few_images()
    np.savez("few.npz", **{k: getattr(data, k) for k in ("x_train", "y_train", "x_test", "y_test")})
    words = ["train", "notebook", "--data", "few.npz", "--epochs", "1", "--threads", "1"]
    assert command([*words, "--out", "a", "--record"]) == 0
    assert read_recording(in_tmp / "a").steps.tolist() == [1, 2, 3]
    assert command(["train", "--resume", "a", "--record"]) == 2
    assert "finished" in capfd.readouterr().err
