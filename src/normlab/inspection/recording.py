"""What the layers see during a training, kept in one file of named arrays.

`Recorder` watches a training and leaves no trace in it: the run ends with the same bits. At sampled
steps it probes the model on one fixed batch with one fixed dropout mask, so that what changes from
sample to sample is the network. `Recording` is what it leaves, `recording.npz` in the run's folder.
"""

import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normlab.core.files import write_atomic
from normlab.core.streams import stream
from normlab.data.batches import to_input
from normlab.data.npz import read_arrays
from normlab.errors import DataError, UserError
from normlab.inspection import activations
from normlab.training.state import Plan, State

RECORDING = "recording.npz"
MOST_IMAGES = 64  # on the probe, which otherwise has as many as a batch of the training
MOST_SAMPLES = 100
STEPS_A_SAMPLE = 100  # on average at least; a sample costs about as much as two to five steps


@dataclass(frozen=True)
class Recording:
    """Samples of a training, in the order of the steps.

    Attributes:
        steps: (T,) the steps after which a sample was taken, counted from 1.
        layers: names, in the order in which the network defines them.
        arrays: `conv1/in/percentiles` and so on, as `activations.probe` names and describes them,
            each with T as its first dimension. And: `L/in/drift`, `L/out/drift`, how far the last
            step alone moved the mean of a channel, in the channel's standard deviations, averaged
            over the channels; `L/effective_rate`, lr/‖w‖² (van Laarhoven 2017, arXiv 1706.05350);
            `loss` on the probe; `seconds`, what the sample cost, but for writing it.
    """

    steps: NDArray[np.int64]
    layers: tuple[str, ...]
    arrays: dict[str, NDArray[np.float32]]

    def get(self, layer: str, key: str) -> NDArray[np.float32] | None:
        """The array (T, …) of a layer; None if such a layer has none."""
        return self.arrays.get(f"{layer}/{key}")

    def until(self, step: int) -> "Recording":
        """The samples up to `step`."""
        keep = self.steps <= step
        arrays = {name: values[keep] for name, values in self.arrays.items()}
        return Recording(self.steps[keep], self.layers, arrays)

    def append(self, step: int, sample: activations.Sample) -> "Recording":
        """This recording and one more sample, which has the same names."""
        if not len(self.steps):
            return Recording(np.array([step]), self.layers, {k: v[None] for k, v in sample.items()})
        arrays = {k: np.concatenate([v, sample[k][None]]) for k, v in self.arrays.items()}
        return Recording(np.append(self.steps, step), self.layers, arrays)

    def write(self, path: Path, *, compress: bool) -> None:
        """Write the recording, whole or not at all."""
        buffer = io.BytesIO()
        save = np.savez_compressed if compress else np.savez
        save(buffer, step=self.steps, layers=np.array(self.layers), **self.arrays)  # type: ignore[arg-type]
        write_atomic(path, buffer.getvalue())


def read_recording(run: Path) -> Recording:
    """Read the recording in the folder of a run.

    Raises:
        UserError: the run was not recorded.
        DataError: the file is damaged.
    """
    path = run / RECORDING
    if not path.exists():
        raise UserError(f"run {str(run)!r} holds no {RECORDING}: train it with --record")
    try:
        arrays = read_arrays(path)
        steps, layers = arrays.pop("step"), tuple(map(str, arrays.pop("layers")))
        if any(len(values) != len(steps) for values in arrays.values()) or not len(steps):
            raise ValueError("arrays of different lengths")
    except (ValueError, KeyError, TypeError) as e:
        raise DataError(f"{path} is not a whole recording ({e}): train again with --record") from e
    return Recording(steps, layers, arrays)


def sampled_steps(steps: int) -> list[int]:
    """Which of `steps` steps to sample: half of them evenly, half geometrically, the last always.

    >>> sampled_steps(20)
    [1, 2, 3, 4, 6, 7, 9, 12, 14, 17, 20]
    """
    half = min(max(steps // STEPS_A_SAMPLE, 12), MOST_SAMPLES) // 2
    even = np.linspace(1, steps, half + 1)
    early = np.geomspace(1, steps, half)
    return sorted({round(step) for step in (*even, *early)})


class Recorder:
    """An observer that probes the model after sampled steps and keeps `recording.npz` up to date.

    A resumed run goes on with the file it finds, and ends with the recording that the
    uninterrupted run would have ended with, but for the seconds.

    Args:
        layers: names of those to keep; None for each normaliser and each weight layer. A resumed
            run keeps those of its file.
    """

    def __init__(self, layers: Sequence[str] | None = None) -> None:
        self.layers = layers
        self.recording = Recording(np.empty(0, np.int64), (), {})
        self.before: tuple[int, activations.Sample] | None = None
        self.started = False
        self.spent = 0.0

    def before_training(self, plan: Plan) -> None:
        if plan.folder is None:
            raise UserError("a recording needs a run's folder to stand in: train with --out")
        self.plan, self.path = plan, plan.folder / RECORDING
        self.steps = set(sampled_steps(plan.steps))
        size = min(MOST_IMAGES, plan.recipe.batch_size, len(plan.train))
        chosen = np.sort(stream(plan.seed, "probe").permutation(len(plan.train))[:size])
        self.images, self.labels = plan.train.images[chosen], plan.train.labels[chosen]
        if self.path.exists():
            self.recording = read_recording(plan.folder)
            self.layers = self.recording.layers

    def after_step(self, state: State, epoch: int, batch: int, batches: int) -> None:
        began = time.perf_counter()
        if not self.started:  # a resumed run repeats the steps since its checkpoint
            self.recording, self.started = self.recording.until(state.step - 1), True
        if state.step in self.steps:
            self._sample(state, began)
        elif state.step + 1 in self.steps:
            x, _ = self._batch(state)
            means = activations.channel_means(state.model, x, self._rng(), self.layers)
            self.before = state.step, means
            self.spent = time.perf_counter() - began

    def _sample(self, state: State, began: float) -> None:
        x, labels = self._batch(state)
        sample = activations.probe(state.model, x, labels, self._rng(), self.layers)
        if not self.recording.layers:
            layers = tuple(activations.observed(state.model, self.layers))
            self.recording = Recording(self.recording.steps, layers, {})
        for layer in self.recording.layers:
            for side in ("in", "out"):
                sample[f"{layer}/{side}/drift"] = self._drift(state.step, f"{layer}/{side}", sample)
            if (norm := sample.get(f"{layer}/weight_norm")) is not None:
                rate = _learning_rate(state, f"{layer}.weight")
                sample[f"{layer}/effective_rate"] = np.asarray(rate / norm**2, np.float32)
        self.before = state.step, sample
        spent = self.spent + time.perf_counter() - began
        sample["seconds"] = np.asarray(spent, np.float32)
        self.spent = 0.0
        self.recording = self.recording.append(state.step, sample)
        last = state.step == self.plan.steps
        self.recording.write(self.path, compress=last)

    def _drift(self, step: int, name: str, sample: activations.Sample) -> NDArray[np.float32]:
        """NaN after the first step, and where a resumed run does not know the step before."""
        if self.before is None or self.before[0] != step - 1:
            return np.asarray(np.nan, np.float32)
        moved = np.abs(sample[f"{name}/mean"] - self.before[1][f"{name}/mean"])
        varies = sample[f"{name}/var"] > 0
        if not varies.any():
            return np.asarray(np.nan, np.float32)
        deviation = np.sqrt(sample[f"{name}/var"][varies])
        return np.asarray((moved[varies] / deviation).mean(), np.float32)

    def _batch(self, state: State) -> tuple[Tensor, Tensor]:
        device = next(state.model.parameters()).device
        return to_input(self.images, device), torch.from_numpy(self.labels).to(device)

    def _rng(self) -> np.random.Generator:
        return stream(self.plan.seed, "probe", "dropout")


def _learning_rate(state: State, name: str) -> float:
    """The rate at which the optimiser now moves a parameter; 0 for one that it does not move."""
    parameter = state.model.get_parameter(name)
    for group in state.optimizer.param_groups:
        if any(p is parameter for p in group["params"]):
            return float(group["lr"])
    return 0.0
