"""Averaged weights: their definition, what is scored and kept, and resumed to the same bits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import normlab
from normlab.__main__ import run as command
from normlab.errors import Interrupted, UserError
from normlab.evaluation.population import evenly, population_moments
from normlab.models import NotebookNet
from normlab.training.averaging import averaged, update
from normlab.training.state import Plan, State

pytestmark = pytest.mark.usefixtures("undrawn")

SHORT: dict[str, Any] = {
    "data": "sample",
    "threads": 1,
    "epochs": 2,
    "batch_size": 100,
    "validation": 0.1,
}


class Weights:
    """Keeps what every parameter was after each step, and may interrupt."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after = stop_after
        self.seen: list[dict[str, np.ndarray]] = []

    def before_training(self, plan: Plan) -> None:
        pass

    def after_step(self, state: State, epoch: int, batch: int, batches: int) -> None:
        parameters = state.model.named_parameters()
        self.seen.append({name: p.detach().double().numpy().copy() for name, p in parameters})
        if state.step == self.stop_after:
            raise Interrupted(2)


def definition(seen: list[dict[str, np.ndarray]], ema: float) -> dict[str, np.ndarray]:
    mean = seen[0]
    for t, weights in enumerate(seen[1:], 2):
        d = min(ema, t / (t + 9))
        mean = {name: d * mean[name] + (1 - d) * weights[name] for name in mean}
    return mean


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize("ema", [0.5, 0.9])  # the warm-up's end within the run, and after it
def test_the_kept_weights_are_the_average_with_statistics_of_its_own(
    in_tmp: Path, ema: float
) -> None:
    watch = Weights()
    run = normlab.train("notebook", ema=ema, observers=(watch,), **SHORT)
    model = run.model()
    expected = definition(watch.seen, ema)
    for name, p in model.named_parameters():
        np.testing.assert_allclose(p.detach().numpy(), expected[name], rtol=0, atol=2e-6)
    found = population_moments(model, evenly(normlab.load("sample").x_train[:360]))
    for name, m in found.items():
        layer = model.get_submodule(name)
        torch.testing.assert_close(layer.running_mean.double(), m.mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.running_var.double(), m.var, rtol=1e-5, atol=1e-6)
    # What the history says of the last epoch is the score of these weights.
    again = normlab.train("notebook", **SHORT)
    assert run.history[-1]["loss"] == again.history[-1]["loss"]
    assert run.history[-1]["val_loss"] != again.history[-1]["val_loss"]
    assert run.result is not None
    assert run.result["val_loss"] == run.history[-1]["val_loss"]


def test_averaging_changes_no_step(in_tmp: Path) -> None:
    watches = [Weights(), Weights()]
    for watch, ema in zip(watches, (0.0, 0.99), strict=True):
        normlab.train("notebook", ema=ema, observers=(watch,), **SHORT)
    for a, b in zip(watches[0].seen, watches[1].seen, strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("step", [3, 4, 8])  # within an epoch, between two, after the last step
def test_resumed_it_ends_with_the_same_bits(in_tmp: Path, step: int) -> None:
    whole = normlab.train("notebook", ema=0.9, **SHORT)
    with pytest.raises(Interrupted):
        normlab.train("notebook", ema=0.9, out="cut", observers=(Weights(step),), **SHORT)
    cut = normlab.resume("cut")
    assert whole.result is not None
    assert cut.result is not None
    assert cut.result["weights_sha256"] == whole.result["weights_sha256"]
    assert cut.result["val_loss"] == whole.result["val_loss"]


def test_lent_out_weights_come_back() -> None:
    model, average = NotebookNet(), dict[str, torch.Tensor]()
    for step in (1, 2):
        update(average, model, 0.9, step)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    images = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)

    def use() -> None:
        with averaged(model, average, images):
            assert not torch.equal(model.output.weight, before["output.weight"])
            raise KeyError

    with pytest.raises(KeyError):
        use()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_command(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "train notebook --data sample --epochs 1 --ema 0.9 --threads 1 --out r --json"
    assert command(words.split()) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 12
    assert json.loads(Path("r/recipe.json").read_text())["recipe"]["averaging"]["decay"] == 0.9
    assert command(["train", "--ema", "1.0"]) == 2
    assert "ema=1.0: choose a decay in [0, 1), such as 0.999" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"ema=-0\.1"):
        normlab.train("notebook", ema=-0.1)
