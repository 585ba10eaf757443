"""How smooth the loss is along its gradient, with and without normalisation.

Santurkar et al. (2018, arXiv 1805.11604, section 3.1) look here for why batch normalisation helps:
at points of a training, walk from the weights θ along the gradient g, to θ − η·g for η from ½ to 4
times a learning rate, and measure

    the range of the losses met                   max L(θ − η·g) − min L(θ − η·g), θ included
    how much the gradient changes                 max ‖∇L(θ − η·g) − g‖ / ‖g‖
    the effective β-smoothness                    max ‖∇L(θ − η·g) − g‖ / ‖η·g‖
    how well the last gradient predicts the next  cos(∇L(θₜ), ∇L(θₜ₊₁)), after the real step

L is the loss on one fixed set of training images with one fixed dropout mask, in training mode. The
same η serve both arms. The change is told as a share of ‖g‖, where the paper has it absolute.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from normlab.core.environment import settings
from normlab.core.streams import stream
from normlab.data import ImageData
from normlab.data.augment import to_input
from normlab.data.batches import Split
from normlab.errors import UserError
from normlab.evaluation.forward import as_trained, untouched
from normlab.inspection.watching import random_streams, refuse_unwatchable
from normlab.recipes.optimizers import SGD
from normlab.runs import Task
from normlab.training.loop import fit
from normlab.training.preparation import make_plan, new_state
from normlab.training.state import Plan, State

ARMS = ("batch", "none")
MULTIPLES = (0.5, 1.0, 2.0, 4.0)
ADAM_STEP = 0.1  # Adam's own rate is no length along the gradient; SGD would use about this one
MEASURES = ("range", "change", "smoothness", "agreement")


@dataclass(frozen=True, kw_only=True)
class Landscape:
    """What the walks met.

    Attributes:
        recipe, data: of the run that was replayed.
        seeds: S of them, each in both arms.
        images: how many the loss is taken over.
        step_sizes: η.
        steps: (T,) after which a walk was made.
        arms: by normaliser, by measure (`range`, `change`, `smoothness`, `agreement`): (S, T).
    """

    recipe: str
    data: str
    seeds: tuple[int, ...]
    images: int
    step_sizes: tuple[float, ...]
    steps: NDArray[np.int64]
    arms: dict[str, dict[str, NDArray[np.float64]]]

    def median(self, arm: str, measure: str) -> NDArray[np.float64]:
        """The median over the steps, one for each seed (S,)."""
        return np.asarray(np.median(self.arms[arm][measure], axis=1))

    def as_dict(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe,
            "data": self.data,
            "seeds": list(self.seeds),
            "images": self.images,
            "step_sizes": list(self.step_sizes),
            "steps": self.steps.tolist(),
            "arms": {
                arm: {name: values.tolist() for name, values in measures.items()}
                for arm, measures in self.arms.items()
            },
        }

    def __str__(self) -> str:
        title = {"batch": "with batch norm", "none": "without"}
        lines = [
            f"Medians over {len(self.steps)} steps, mean over n = {len(self.seeds)} seeds "
            "(lowest to highest seed):"
        ]
        for measure in MEASURES:
            cells = []
            for arm in self.arms:
                m = self.median(arm, measure)
                text = f"{m.mean():.3g} ({m.min():.3g} to {m.max():.3g})"
                cells.append(f"{title[arm]} {text}")
            lines.append(f"  {measure:<10}  {',  '.join(cells)}")
        return "\n".join(lines)


def explore(
    task: Task,
    images: ImageData,
    *,
    seeds: int = 3,
    points: int = 50,
    steps: int | None = None,
    batch: int = 128,
    threads: int,
    report: Callable[[str], None] = print,
) -> Landscape:
    """Train `task` again, with and without batch normalisation, and walk along the gradient.

    Args:
        seeds: how many, from the task's own upwards.
        points: how many steps, evenly spread, to walk from.
        steps: replay only so many; None for all.
        batch: how many training images the loss is taken over.
        threads: of the CPU.
        report: told of each replay when it is done.

    Raises:
        UserError: fewer than two seeds, or fewer steps than points; a task that starts from a run.
    """
    if task.start is not None:
        raise UserError(f"a training from run {task.start.run}: only one from a seed is replayed")
    if seeds < 2:
        raise UserError(f"seeds={seeds}: a band needs at least 2, better 3")
    optimizer = task.recipe.optimizer
    base = optimizer.learning_rate if isinstance(optimizer, SGD) else ADAM_STEP
    sizes = tuple(base * m for m in MULTIPLES)
    numbers = tuple(range(task.seed, task.seed + seeds))
    arms: dict[str, dict[str, NDArray[np.float64]]] = {}
    walker = Walker([], sizes, batch)
    for norm in ARMS:
        walks = []
        for seed in numbers:
            arm = replace(task, seed=seed, recipe=task.recipe.override(norm=norm))
            plan = _plan(arm, images, threads)
            last = min(steps or plan.steps, plan.steps)
            walker = Walker(_places(last, points), sizes, batch)
            _replay(arm, images, plan, walker)
            walks.append([walker.found[step] for step in walker.steps])
            report(f"replayed {last:,} steps: norm {norm}, seed {seed}")
        arms[norm] = {m: np.array([[w[m] for w in walk] for walk in walks]) for m in MEASURES}
    return Landscape(
        recipe=task.recipe.name,
        data=images.name,
        seeds=numbers,
        images=walker.images,
        step_sizes=sizes,
        steps=np.array(walker.steps),
        arms=arms,
    )


def _places(steps: int, points: int) -> list[int]:
    """Even steps; each leaves one more to take, to which its gradient is compared."""
    if not 2 <= points < steps:
        raise UserError(f"points={points} of {steps} steps: choose from 2 to {steps - 1}")
    return [round(step) for step in np.linspace(1, steps - 1, points)]


def _plan(task: Task, images: ImageData, threads: int) -> Plan:
    """The run's own, but for validation: its scores would decide nothing here."""
    plan = make_plan(task, images, threads)
    nothing = Split(plan.train.images[:0], plan.train.labels[:0])
    return replace(plan, recipe=replace(plan.recipe, patience=None), validation=nothing)


def _replay(task: Task, images: ImageData, plan: Plan, walker: "Walker") -> None:
    device = torch.device("cpu")
    with settings(plan.threads, device), suppress(EndOfReplay):
        fit(plan, new_state(task, images, device), device, (walker,))


class EndOfReplay(Exception):
    """The last step that was asked for is done."""


class Walker:
    """An observer that walks along the gradient after each of `steps`; `found` has the measures."""

    def __init__(self, steps: list[int], sizes: tuple[float, ...], batch: int) -> None:
        self.steps = steps
        self.sizes = sizes
        self.batch = batch
        self.found: dict[int, dict[str, float]] = {}
        self.last = torch.empty(0)

    def before_training(self, plan: Plan) -> None:
        chosen = np.sort(stream(plan.seed, "landscape").permutation(len(plan.train))[: self.batch])
        self.x = to_input(plan.train.images[chosen])
        self.labels = torch.from_numpy(plan.train.labels[chosen])
        self.images = len(chosen)
        self.seed = plan.seed

    def after_step(self, state: State, epoch: int, batch: int, batches: int) -> None:
        ends, begins = state.step - 1 in self.steps, state.step in self.steps
        if not ends and not begins:
            return
        with untouched(state.model):
            state.model.train()
            loss, gradient = self._gradient(state.model)
            if ends:
                cosine = torch.cosine_similarity(self.last, gradient, dim=0)
                self.found[state.step - 1]["agreement"] = cosine.item()
            if begins:
                self.found[state.step] = walk_along(
                    state.model, self._gradient, loss, gradient, self.sizes
                )
                self.last = gradient
        if state.step > max(self.steps):
            raise EndOfReplay

    def _gradient(self, model: nn.Module) -> tuple[float, Tensor]:
        """The loss and its gradient by all trainable parameters, as one vector."""
        rng = stream(self.seed, "landscape", "dropout")
        loss = cross_entropy(model(self.x, rng), self.labels)
        parts = torch.autograd.grad(loss, _trainable(model))
        return loss.item(), torch.cat([g.reshape(-1) for g in parts])


def walk(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    batches: Iterable[Any],
    *,
    sizes: Sequence[float],
) -> dict[str, NDArray[np.float64]]:
    """Walk from a model's weights along the gradient, on each of several batches.

        found = normlab.walk(
            model, lambda m, b: cross_entropy(m(b[0]), b[1]), batches, sizes=[0.05, 0.1, 0.2, 0.4]
        )

    For any model and loss, at any moment of a training; the model is left as it was, and nothing
    random is drawn from the training's streams. What is dropped is the same at every place of a
    walk. See the module for the measures and their source.

    Args:
        loss: called as loss(model, batch), in training mode; one number. Of a model that is in
            it, layers that stand in evaluation mode stay so, such as frozen normalisers.
        batches: B of them, whatever `loss` takes; two models are compared on the same ones.
        sizes: η, lengths along the gradient: about ½ to 4 times a rate of SGD.

    Returns:
        `range`, `change` and `smoothness`, each (B,).

    Raises:
        UserError: no batch, sizes that are not above 0, or a model that `normlab.watch` refuses.
    """
    refuse_unwatchable(model)
    if not sizes or not all(0 < size < float("inf") for size in sizes):
        raise UserError(f"sizes={list(sizes)}: give lengths above 0, such as 0.05, 0.1, 0.2, 0.4")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    rows = []
    with untouched(model):
        as_trained(model)
        for batch in batches:

            def gradient_of(m: nn.Module, batch: Any = batch) -> tuple[float, Tensor]:
                with random_streams(device), torch.enable_grad():
                    value = loss(m, batch)
                    parts = torch.autograd.grad(value, _trainable(m), materialize_grads=True)
                return value.item(), torch.cat([g.reshape(-1) for g in parts])

            rows.append(walk_along(model, gradient_of, *gradient_of(model), sizes))
    if not rows:
        raise UserError("no batch to walk on: give one or more")
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def walk_along(
    model: nn.Module,
    gradient_of: Callable[[nn.Module], tuple[float, Tensor]],
    loss: float,
    gradient: Tensor,
    sizes: Sequence[float],
) -> dict[str, float]:
    """One walk from where the model stands, `loss` and `gradient`, and back."""
    parameters = _trainable(model)
    home = [p.detach().clone() for p in parameters]
    norm = gradient.norm().item()
    losses, changes = [loss], []
    directions = torch.split(gradient, [p.numel() for p in parameters])
    try:
        for size in sizes:
            with torch.no_grad():
                for p, h, g in zip(parameters, home, directions, strict=True):
                    p.copy_(h - size * g.view(p.shape))
            there, new = gradient_of(model)
            losses.append(there)
            changes.append((new - gradient).norm().item())
    finally:
        with torch.no_grad():
            for p, h in zip(parameters, home, strict=True):
                p.copy_(h)
    return {
        "range": max(losses) - min(losses),
        "change": max(changes) / norm,
        "smoothness": max(c / (s * norm) for c, s in zip(changes, sizes, strict=True)),
    }


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]
