"""What one run of a study gives, how it is trained, and the small file that keeps it."""

import base64
import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normlab.core.environment import describe_machine, settings
from normlab.core.files import write_json
from normlab.core.records import read_json, typed
from normlab.core.tensors import digest
from normlab.data import ImageData
from normlab.errors import DataError, NonFiniteError, UserError
from normlab.evaluation.forward import logits_of
from normlab.evaluation.metrics import (
    balanced_accuracy,
    confusion_matrix,
    cross_entropy,
    macro_f1,
    right,
)
from normlab.evaluation.scores import score
from normlab.runs import Task
from normlab.training import starting_points
from normlab.training.averaging import averaged
from normlab.training.loop import fit
from normlab.training.preparation import make_plan, new_state
from normlab.training.state import Observer, Plan, State

Curve = list[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run's outcomes. A diverged run has chance scores: accuracy 1/K, loss log K.

    Attributes:
        seed: of the pair; the arm's own offset is in `task`.
        task: recipe, seed and data, as `recipe.json` of a run has them.
        diverged: why, or None.
        test_accuracy, test_loss: after the last epoch; None in a tuning run, which sees no test
            images.
        val_accuracy: after the last epoch; None without validation images.
        curve: (step, validation accuracy) at evenly spread steps.
        area: mean of `curve`; None without validation images.
        steps_to: step of the first check at or above each threshold; None for never.
        step_seconds: median of a training step; None if too few were made.
        test_correct: which test images were right, one bit each, base64.
        balanced_accuracy, macro_f1: on the test images; None in studies of before there were any.
        weights_sha256: after the last step.
    """

    arm: str
    seed: int
    task: dict[str, Any]
    diverged: str | None
    test_accuracy: float | None
    test_loss: float | None
    val_accuracy: float | None
    curve: Curve
    area: float | None
    steps_to: dict[str, int | None]
    steps: int
    step_seconds: float | None
    seconds: float
    history: list[dict[str, Any]]
    test_correct: str | None
    weights_sha256: str
    environment: dict[str, Any]
    balanced_accuracy: float | None = None
    macro_f1: float | None = None

    @property
    def accuracy(self) -> float:
        """Test accuracy of a run of the study proper."""
        if self.test_accuracy is None:
            raise UserError(f"{self.arm} seed {self.seed} is a tuning run: it saw no test images")
        return self.test_accuracy

    @property
    def told(self) -> str:
        """What the progress says of it."""
        if self.diverged:
            return f"diverged ({self.diverged})"
        if self.test_accuracy is None:
            return f"validation accuracy {self.val_accuracy:.4f}"
        return f"test accuracy {self.test_accuracy:.4f}"

    def correct(self, images: int) -> NDArray[np.bool_]:
        """Which of the test images (N,) were answered rightly."""
        packed = np.frombuffer(base64.b64decode(self.test_correct or ""), np.uint8)
        return np.unpackbits(packed, count=images).astype(bool)

    def steps_until(self, accuracy: float) -> int | None:
        """Step of the first check at or above `accuracy`; None for never, as if it diverged."""
        return None if self.diverged else first_step(self.curve, accuracy)


@dataclass
class _Checks:
    """Observes a training: validation accuracy at evenly spread steps, seconds of each step.

    Checks change nothing: they run in evaluation mode and draw no random number.
    """

    checks: int
    curve: Curve = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    _last: float | None = None

    def before_training(self, plan: Plan) -> None:
        self.plan, self.per_epoch = plan, -(-self.checks // plan.epochs)

    def after_step(self, state: State, epoch: int, batch: int, batches: int) -> None:
        now = time.perf_counter()
        if self._last is not None and batch < batches:  # an epoch's last step holds its validation
            self.seconds.append(now - self._last)
        held_out = self.plan.validation
        if len(held_out):
            if batch == batches:
                self._note(state.step, state.history[-1]["val_accuracy"])
            elif batch in {round(i * batches / self.per_epoch) for i in range(1, self.per_epoch)}:
                with averaged(state.model, state.average, self.plan.train.images):
                    found = score(state.model, held_out.images, held_out.labels)
                self._note(state.step, found.accuracy)
        self._last = time.perf_counter()

    def _note(self, step: int, accuracy: float) -> None:
        self.curve.append((step, accuracy))


def train_one(
    task: Task,
    images: ImageData,
    *,
    arm: str,
    seed: int,
    threads: int = 1,
    thresholds: tuple[float, ...] = (),
    checks: int = 1,
    test: bool = True,
    observers: tuple[Observer, ...] = (),
) -> Outcome:
    """Train in memory, on the CPU, to the bits that `normlab train` gives, and score once.

    Raises:
        Interrupted: SIGINT or SIGTERM came.
    """
    device, k = torch.device("cpu"), len(task.class_names)
    watch = _Checks(checks)
    with settings(threads, device):
        source = None if task.start is None else starting_points.open_source(task.start.run)
        task, weights = starting_points.begin(source, task, images)
        state = new_state(task, images, device, weights)
        plan = make_plan(task, images, threads)
        diverged = None
        try:
            fit(plan, state, device, (watch, *observers))
        except NonFiniteError as e:
            diverged = str(e).split(":")[0]
        logits = logits_of(state.model, images.x_test) if test else None
    if diverged is None and logits is not None and not logits.isfinite().all():
        diverged = "its answers are not finite"
    curve = None if not len(plan.validation) else watch.curve
    return Outcome(
        arm=arm,
        seed=seed,
        task=task.as_dict(),
        diverged=diverged,
        **_test_scores(logits, images, diverged, k),
        **_validation_scores(curve, diverged, k),
        steps_to={f"{t:g}": None if diverged else first_step(watch.curve, t) for t in thresholds},
        steps=state.step,
        step_seconds=float(np.median(watch.seconds)) if watch.seconds else None,
        seconds=state.seconds,
        history=[{key: _finite(value) for key, value in row.items()} for row in state.history],
        weights_sha256=digest(state.model.state_dict()),
        environment=describe_machine(threads, device),
    )


def pack(right: NDArray[np.bool_]) -> str:
    """Which images were right (N,), one bit each, as text."""
    return base64.b64encode(np.packbits(right).tobytes()).decode()


def first_step(curve: Curve, accuracy: float) -> int | None:
    """Step of the first check at or above `accuracy`; None for never."""
    return next((step for step, value in curve if value >= accuracy), None)


def _test_scores(
    logits: Tensor | None, images: ImageData, diverged: str | None, k: int
) -> dict[str, Any]:
    if logits is None:
        return {"test_accuracy": None, "test_loss": None, "test_correct": None}
    if diverged:
        chance = dict.fromkeys(("test_accuracy", "balanced_accuracy", "macro_f1"), 1 / k)
        return {**chance, "test_loss": math.log(k), "test_correct": None}
    labels = torch.from_numpy(images.y_test.astype(np.int64))
    answered = right(logits, labels).numpy()
    confusion = confusion_matrix(labels.numpy(), logits.argmax(1).numpy(), k)
    return {
        "balanced_accuracy": balanced_accuracy(confusion),
        "macro_f1": macro_f1(confusion),
        "test_accuracy": float(answered.mean()),
        "test_loss": cross_entropy(logits, labels),
        "test_correct": pack(answered),
    }


def _validation_scores(curve: Curve | None, diverged: str | None, k: int) -> dict[str, Any]:
    if curve is None:
        return {"val_accuracy": None, "area": None, "curve": []}
    if diverged:
        return {"val_accuracy": 1 / k, "area": 1 / k, "curve": curve}
    area = sum(accuracy for _, accuracy in curve) / len(curve)
    return {"val_accuracy": curve[-1][1], "area": area, "curve": curve}


def _finite(value: Any) -> Any:
    """JSON has no NaN; a diverging epoch's losses may be."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def path_of(folder: Path, arm: str, seed: int) -> Path:
    return folder / f"{arm}-seed-{seed}.json"


def save(folder: Path, outcome: Outcome) -> None:
    """Keep a finished run as one small file, atomically."""
    write_json(path_of(folder, outcome.arm, outcome.seed), vars(outcome))


def load(folder: Path, task: Task, arm: str, seed: int) -> Outcome | None:
    """Read a run's file; None if it is not there.

    Raises:
        DataError: it is damaged, or is of another task than `task`.
    """
    path = path_of(folder, arm, seed)
    if not path.exists():
        return None
    try:
        outcome = typed(read_json(path), Outcome, "it")
        its_task = Task.from_dict(outcome.task, "its task")
    except UserError as e:
        raise DataError(f"{path} is not a run's file ({e}): remove it to repeat the run") from None
    if _asked(its_task) != _asked(task):
        raise DataError(f"{path} is of another recipe, seed or data: remove it to repeat the run")
    return outcome


def _asked(task: Task) -> Task:
    """What a run was asked for, wherever its data lie; a fitted layer's penalty is its finding."""
    return replace(task, data="", start=task.start and replace(task.start, penalty=None))
