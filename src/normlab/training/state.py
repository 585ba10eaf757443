"""What a training is about to do, and what it remembers from one step to the next."""

from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from normlab.core.ranks import ALONE, Ranks
from normlab.data.batches import Batches, Split, batch_bounds
from normlab.recipes import Recipe
from normlab.text import counted, duration
from normlab.training.optimisers import Optimizer


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a training will do. Hooks and observers get it before the first step."""

    recipe: Recipe
    folder: Path | None  # None in a study, whose runs leave no folder
    seed: int
    threads: int
    train: Split
    validation: Split
    start: str = ""  # in words, where the training starts from another run
    classes: str = ""  # in words, their names and how many images each has
    expected: float | None = None  # seconds, as a few steps told
    seconds: float | None = None  # that the training may take
    ranks: Ranks = ALONE

    @cached_property
    def bounds(self) -> list[tuple[int, int]]:
        """Where each batch of a pass begins and ends in the order of the images."""
        return batch_bounds(len(self.train), self.recipe.batch_size, join_single=True)

    @property
    def epochs(self) -> int:
        return self.recipe.length(len(self.bounds))[0]

    @property
    def epoch_steps(self) -> int:
        """Steps of an epoch; on small data it may be many passes over the images."""
        return self.recipe.length(len(self.bounds))[1]

    @property
    def steps(self) -> int:
        return self.epochs * self.epoch_steps

    def batches(self, device: torch.device | str = "cpu") -> Batches:
        """The batches of every step, as the recipe cuts and augments them."""
        return Batches(
            self.train,
            self.bounds,
            seed=self.seed,
            augmentation=self.recipe.augmentation,
            half_steps=self.recipe.half_size * self.steps,
            balanced=self.recipe.balance == "sampling",
            device=device,
            ranks=self.ranks,
        )

    def class_weights(self, device: torch.device | str = "cpu") -> Tensor | None:
        """What an image of each class counts in the loss (K,); None for all alike."""
        weights = class_weights(self.train, self.recipe.balance)
        return None if weights is None else torch.from_numpy(weights).float().to(device)

    def describe(self) -> str:
        """A line; more for classes, a start from another run, a last batch of a single image."""
        length = "the output layer fitted, no epoch after that"
        if self.steps:
            steps = counted(self.epoch_steps, "step")
            length = f"{counted(self.epochs, 'epoch')} of {steps}"
        text = (
            f"{self.recipe.name}: norm {self.recipe.norm.name}, seed {self.seed}, "
            f"{len(self.train):,} training and {len(self.validation):,} validation images, "
            + f"{length}, "
            + (f"{self.ranks.size} processes, each " if self.ranks.size > 1 else "")
            + f"{counted(self.threads, 'thread')}"
            + (f", into {self.folder}" if self.folder else "")
            + (f"\nData: {self.classes}" if self.classes else "")
            + (f"\n{self._length()}" if self.classes else "")
            + (f"\nStart: {self.start}" if self.start else "")
        )
        if self.bounds[-1][1] - self.bounds[-1][0] > self.recipe.batch_size:
            text += "\nThe last batch, of one image, joins the one before it: one has no variance."
        return text

    def _length(self) -> str:
        """What people choose of it: size, network, how often and how varied a picture is seen."""
        side, looks = self.train.images.shape[1], self.steps / len(self.bounds)
        model = self.recipe.model
        seen = f"each picture seen {looks:,.0f} times, {self.recipe.augmentation.told()}"
        if not self.steps:
            seen = "the output layer alone is new, and each picture seen once"
        return (
            f"Plan: {side} × {side} pixels, network {model.architecture or model.name}, {seen}"
            + ("" if self.expected is None else f"; about {duration(self.expected)}")
        )


def class_weights(train: Split, balance: str) -> NDArray[np.float64] | None:
    """What an image of each class counts (K,), by the recipe's `balance`; None for all alike."""
    counts = np.bincount(train.labels)
    if balance in ("none", "sampling") or (
        balance == "auto" and counts.max() < 3 * max(counts.min(), 1)
    ):
        return None
    weights: NDArray[np.float64] = np.sqrt(len(train) / (len(counts) * np.maximum(counts, 1)))
    weights /= weights[train.labels].mean()
    return weights


@dataclass
class Totals:
    """Sums over the images of an epoch so far."""

    loss: float = 0.0
    correct: int = 0
    images: int = 0

    def add(self, loss: float, correct: int, images: int) -> None:
        self.loss += loss * images
        self.correct += correct
        self.images += images

    @property
    def mean_loss(self) -> float:
        return self.loss / self.images

    @property
    def accuracy(self) -> float:
        return self.correct / self.images


@dataclass
class State:
    """Everything that a training remembers from one step to the next.

    Randomness is not part of it: every draw is a function of the seed and of `step`.

    Attributes:
        step: steps done.
        seconds: spent so far, validation included.
        totals: of the epoch so far; `part` of its present part.
        parts: of the epoch so far, each the share done, loss and accuracy.
        history: one row an epoch.
        best_epoch: from 1; None before the first validation.
        average: averaged parameters by name; empty without averaging.
        ending: the first and the last step of a cool-down: the rate falls to 0 between them.
    """

    model: nn.Module
    optimizer: Optimizer
    step: int = 0
    seconds: float = 0.0
    totals: Totals = field(default_factory=Totals)
    part: Totals = field(default_factory=Totals)
    parts: list[list[float]] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int | None = None
    best_val_loss: float = float("inf")
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)
    ending: tuple[int, int] | None = None

    @property
    def stopped(self) -> bool:
        """Whether the cool-down is over: no further step is wanted."""
        return self.ending is not None and self.step >= self.ending[1]

    def share(self, rate: float) -> float:
        """The share of the learning rate at the next step, where a schedule says `rate`."""
        if self.ending is None:
            return rate
        first, last = self.ending
        return rate * max(0.0, (last - self.step) / (last - first + 1))

    def loop_state(self) -> dict[str, Any]:
        """The part that is not tensors, as JSON."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "totals": asdict(self.totals),
            "part": asdict(self.part),
            "parts": self.parts,
            "history": self.history,
            "best_epoch": self.best_epoch,
            "ending": self.ending,
        }


@dataclass(frozen=True)
class StepResult:
    """The result of one step: its place in the epoch, and the scores of its batch.

    Attributes:
        epoch: from 0.
        batch: from 1.
        batches: of the epoch.
        loss: mean over the batch.
        correct: right answers among its `images`.
    """

    epoch: int
    batch: int
    batches: int
    loss: float
    correct: int
    images: int

    @property
    def ends_epoch(self) -> bool:
        return self.batch == self.batches


class Hook:
    """A part of the training itself: it may change `state`. Every method does nothing by default.

    `normlab.training.hooks.make_hooks` puts them in order.
    """

    def before_training(self, plan: Plan, state: State) -> None:
        """The first step is next, or in a resumed run the next one."""

    def after_step(self, state: State, done: StepResult) -> None:
        """A step is done."""

    def after_training(self, state: State) -> None:
        """The last step is done."""


class Observer(Protocol):
    """An object that watches a training. It may read the state and may not change it."""

    def before_training(self, plan: Plan) -> None:
        """The first step is next."""

    def after_step(self, state: State, epoch: int, batch: int, batches: int) -> None:
        """`batch` of `batches` of `epoch` (from 0) is done; after the last one, so is the epoch."""
