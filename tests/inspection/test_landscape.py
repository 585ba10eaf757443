"""The walks along the gradient, against softmax regression computed in float64."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import normlab
from normlab import recipes
from normlab.core.tensors import digest
from normlab.data.batches import split_validation
from normlab.errors import UserError
from normlab.inspection.landscape import MEASURES, EndOfReplay, Walker, explore
from normlab.models import SigmoidNet
from normlab.runs import Task
from normlab.training.loop import fit
from normlab.training.optimisers import make_optimizer
from normlab.training.state import Plan, State
from recorded import write_run

SIZES = (0.05, 0.1, 0.4)


@pytest.fixture(scope="module")
def images() -> normlab.ImageData:
    data = normlab.load("sample")
    return replace(data, x_train=data.x_train[::5], y_train=data.y_train[::5])


def plan_for(images: normlab.ImageData, *, epochs: int = 1) -> Plan:
    train, validation = split_validation(images.x_train, images.y_train, 0.0)
    recipe = recipes.get("paper-sigmoid").override(epochs=epochs, batch_size=20)
    return Plan(recipe=recipe, folder=Path(), seed=0, threads=1, train=train, validation=validation)


class Softmax(nn.Module):
    """Softmax regression on the mean colours of four strips."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(12, 10)
        with torch.no_grad():
            self.dense.weight.copy_(torch.linspace(-3, 3, 120).view(10, 12).sin())
            self.dense.bias.zero_()

    def forward(self, x: Tensor, rng: np.random.Generator | None = None) -> Tensor:
        return self.dense(4 * x.unflatten(2, (4, 8)).mean((3, 4)).flatten(1))


def loss_and_gradient(
    x: NDArray[np.float64], labels: NDArray[np.int64], theta: NDArray[np.float64]
) -> tuple[float, NDArray[np.float64]]:
    """Of softmax regression with weights and biases `theta` (10·12 + 10,), by hand."""
    weight, bias = theta[:120].reshape(10, 12), theta[120:]
    logits = x @ weight.T + bias
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    rows = np.arange(len(labels))
    loss = -np.log(p[rows, labels]).mean()
    p[rows, labels] -= 1
    return loss, np.concatenate([(p.T @ x / len(x)).ravel(), p.mean(0)])


def test_the_measures_are_those_of_the_formulas(images: normlab.ImageData) -> None:
    plan, model = plan_for(images), Softmax()
    thetas = {}

    class Keep:
        def before_training(self, plan: Plan) -> None:
            pass

        def after_step(self, state: State, epoch: int, batch: int, batches: int) -> None:
            parts = [p.detach().double().numpy().ravel() for p in model.parameters()]
            thetas[state.step] = np.concatenate(parts)

    walker = Walker([1], SIZES, batch=30)
    state = State(model, make_optimizer(plan.recipe.optimizer, model))
    with pytest.raises(EndOfReplay):  # it ends the replay where it has all it needs
        fit(plan, state, torch.device("cpu"), (Keep(), walker))
    assert state.step == 2
    x = 4 * walker.x.double().unflatten(2, (4, 8)).mean((3, 4)).flatten(1).numpy()
    labels = walker.labels.numpy()
    loss, g = loss_and_gradient(x, labels, thetas[1])
    walked = [loss_and_gradient(x, labels, thetas[1] - size * g) for size in SIZES]
    losses = [loss, *(there for there, _ in walked)]
    changes = np.array([np.linalg.norm(new - g) for _, new in walked])
    norm = np.linalg.norm(g)
    _, after = loss_and_gradient(x, labels, thetas[2])
    expected = {
        "range": max(losses) - min(losses),
        "change": changes.max() / norm,
        "smoothness": (changes / (np.array(SIZES) * norm)).max(),
        "agreement": g @ after / (norm * np.linalg.norm(after)),
    }
    assert walker.found == {1: pytest.approx(expected, rel=2e-3)}


def test_the_walks_leave_no_trace(images: normlab.ImageData) -> None:
    plan = plan_for(images)
    seen: dict[int, list[str]] = {1: [], 2: [], 3: []}

    class Keep:
        def before_training(self, plan: Plan) -> None:
            pass

        def after_step(self, state: State, epoch: int, batch: int, batches: int) -> None:
            if state.step in seen:
                seen[state.step].append(digest(state.model.state_dict()))

    for observers in ((Keep(),), (Walker([1, 2, 3], SIZES, batch=20), Keep())):
        model = SigmoidNet(image_size=32)
        state = State(model, make_optimizer(plan.recipe.optimizer, model))
        with contextlib.suppress(EndOfReplay):
            fit(plan, state, torch.device("cpu"), observers)
    assert all(plain == walked for plain, walked in seen.values())


def test_both_arms_over_seeds(images: normlab.ImageData, tmp_path: Path) -> None:
    task = write_run(tmp_path / "run", "batch").task
    task = replace(task, recipe=task.recipe.override(epochs=2, batch_size=20))
    told: list[str] = []
    found = explore(
        task, images, seeds=2, points=3, steps=6, batch=20, threads=1, report=told.append
    )
    assert len(told) == 4
    assert found.steps.tolist() == [1, 3, 5]
    assert found.seeds == (0, 1)
    assert found.step_sizes == (0.05, 0.1, 0.2, 0.4)  # ½ to 4 times the recipe's rate
    assert list(found.arms) == ["batch", "none"]
    for measures in found.arms.values():
        assert list(measures) == list(MEASURES)
        assert all(values.shape == (2, 3) for values in measures.values())
        assert (measures["smoothness"] > 0).all()
        assert (np.abs(measures["agreement"]) <= 1 + 1e-6).all()
    assert json.loads(json.dumps(found.as_dict()))["arms"]["none"]["range"]
    assert "n = 2 seeds" in str(found)


def test_what_cannot_be_done_is_refused(images: normlab.ImageData, tmp_path: Path) -> None:
    task: Task = write_run(tmp_path / "run", "batch").task
    with pytest.raises(UserError, match="seeds=1"):
        explore(task, images, seeds=1, threads=1)
    with pytest.raises(UserError, match="points=50 of 7 steps"):
        explore(task, images, steps=7, threads=1)


def test_a_walk_that_fails_goes_back() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    before = [p.clone() for p in model.parameters()]
    calls: list[int] = []

    def fails(m: nn.Module, batch: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        loss: Tensor = m(batch).square().mean()
        return loss

    with pytest.raises(KeyboardInterrupt):
        normlab.walk(model, fails, [torch.randn(4, 3)], sizes=[0.1, 0.2])
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_any_model_and_loss_is_walked_and_left_as_it_was() -> None:
    """On a quadratic loss ½·wᵀAw the measures have closed forms."""
    curvature = torch.tensor([1.0, 4.0])

    class Bowl(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([2.0, 1.0]))
            self.norm = nn.BatchNorm1d(3)
            self.drop = nn.Dropout(0.5)

    def loss(model: Any, batch: float) -> torch.Tensor:
        model.norm(torch.randn(4, 3))  # moves running statistics and draws
        return batch * (curvature * model.w.square()).sum() / 2

    model = Bowl()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    expected_draw = torch.rand(1)
    torch.manual_seed(3)
    found = normlab.walk(model, loss, [1.0, 2.0], sizes=[0.1, 0.2])
    assert torch.equal(torch.rand(1), expected_draw)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    g = curvature * torch.tensor([2.0, 1.0])
    beta = float((curvature * g).norm() / g.norm())  # ‖A·ηg‖ / ‖ηg‖
    assert found["smoothness"] == pytest.approx([beta, 2 * beta], rel=1e-5)
    assert found["change"] == pytest.approx([0.2 * beta, 0.4 * beta], rel=1e-5)
    with pytest.raises(UserError, match="give lengths above 0"):
        normlab.walk(model, loss, [1.0], sizes=[0.0])
    with pytest.raises(UserError, match="no batch to walk on"):
        normlab.walk(model, loss, [], sizes=[0.1])


@pytest.mark.parametrize("trains", [True, False])
def test_a_layer_kept_in_evaluation_mode_stays_so_in_a_walk(trains: bool) -> None:
    """Where the model is in training mode; one that is not is walked as a whole in it."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).train(trains)
    model[1].eval()
    modes: list[bool] = []
    model[1].register_forward_hook(lambda module, *_: modes.append(module.training))
    normlab.walk(model, lambda m, x: m(x).square().sum(), [torch.randn(4, 3)], sizes=[0.1])
    assert modes == [not trains] * 2
    assert [m.training for m in model.modules()] == [trains, trains, False]
