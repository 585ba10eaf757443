"""What the layers see during a training, kept in one file of named arrays.

`Recorder` watches a training and leaves no trace in it: the run ends with the same bits. At sampled
steps it probes the model on one fixed batch with one fixed dropout mask, so that what changes from
sample to sample is the network. `Recording` is what it leaves, `recording.npz` in the run's folder.
"""

import io
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normlab.core.files import write_atomic
from normlab.core.places import check_regular
from normlab.core.streams import stream
from normlab.data.augment import to_input
from normlab.data.npz import read_arrays
from normlab.errors import DataError, UserError
from normlab.inspection import activations
from normlab.inspection.activations import BINS, CHANNELS
from normlab.training.state import Plan, State

RECORDING = "recording.npz"
WATCHED = "watch.json"  # beside it, where the training was not ours
MOST_IMAGES = 64  # on the probe, which otherwise has as many as a batch of the training
MOST_SAMPLES = 100
MOST_LAYERS = 1_000
MAX_RATIO = 4  # bytes that one packed byte of a recording may become; floats are packed hardly
STEPS_A_SAMPLE = 100  # on average at least; a sample costs about as much as two to five steps


def is_due(step: int, every: int) -> bool:
    """Whether a sample is taken after `step`: each `every` steps, before that at 1, 2, 4, 8, …"""
    return step % every == 0 or (step < every and step & (step - 1) == 0)


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

    def thinned(self, every: int) -> "Recording":
        """The early samples, and of those that came evenly only each `every` steps."""
        keep = (self.steps % every == 0) | (self.steps < every // 2)
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
    if not os.path.lexists(path):
        raise UserError(
            f"run {str(run)!r} holds no {RECORDING}: train it with --record, or your own training "
            "with normlab.watch"
        )
    try:
        check_regular(path)
        recording = _checked(read_arrays(path, ratio=MAX_RATIO))
    except DataError as e:
        text = str(e).removeprefix(f"{path}: ")
        raise DataError(
            f"{path} is not a whole recording ({text}): train again with --record"
        ) from e
    return recording


def _checked(arrays: dict[str, NDArray[Any]]) -> Recording:
    """A recording of `arrays`, if they are all that a recording has, each of its own shape.

    Raises:
        DataError: one is missing, or has another shape or type.
    """
    steps, names = arrays.pop("step", None), arrays.pop("layers", None)
    if steps is None or steps.ndim != 1 or steps.dtype.kind not in "iu" or not len(steps):
        raise DataError("'step' is not a list of steps")
    if names is None or names.ndim != 1 or names.dtype.kind != "U" or not len(names):
        raise DataError("'layers' is not a list of names")
    if len(steps) > MOST_SAMPLES + 2 or len(names) > MOST_LAYERS:
        raise DataError(f"{len(steps):,} samples of {len(names):,} layers; it can have fewer")
    if np.any(np.diff(steps.astype(np.float64), prepend=0) <= 0):
        raise DataError("'step' does not go upwards from 1")
    layers = tuple(map(str, names))
    if len(set(layers)) < len(layers):
        raise DataError("'layers' has a name twice")
    for name, shape in _expected(layers).items():
        values = arrays.get(name)
        if values is None or values.shape[1:] != shape:
            found = "missing" if values is None else f"of shape {values.shape}"
            raise DataError(f"{name!r} is {found}")
    for name, values in arrays.items():
        wrong = values.dtype != np.float32 or len(values.shape) not in (1, 2)
        if wrong or len(values) != len(steps):
            raise DataError(f"{name!r} is {values.dtype} {values.shape}")
        layer, _, key = name.rpartition("/")
        if key in _VECTORS and not (values.ndim == 2 and 1 <= values.shape[1] <= CHANNELS):
            raise DataError(f"{name!r} has no value a channel")
        if key in _SCALARS and values.ndim != 1:
            raise DataError(f"{name!r} has not one value a sample")
        if key == "running_mean" and values.shape != arrays[f"{layer}/in/mean"].shape:
            raise DataError(f"{name!r} has not as many channels as the layer's input")
    for layer in layers:
        _check_together(layer, arrays)
    return Recording(steps.astype(np.int64), layers, arrays)


# Keys of every layer, with the shape of one sample; those of some layers; values a channel.
_SIDE = {"percentiles": (3,), "unit": (3,), "range": (2,), "histogram": (BINS,), "drift": ()}
_SCALARS = {"weight_norm", "weight_grad", "effective_rate"}
_VECTORS = {"mean", "var", "gamma", "beta", "running_mean", "running_var"}


def _expected(layers: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a sample's arrays that every recording of these layers has."""
    shapes: dict[str, tuple[int, ...]] = {"loss": (), "seconds": ()}
    for layer in layers:
        shapes |= {f"{layer}/{side}/{k}": s for side in ("in", "out") for k, s in _SIDE.items()}
        shapes |= {f"{layer}/grad": (), f"{layer}/dead": ()}
    return shapes


def _check_together(layer: str, arrays: dict[str, NDArray[Any]]) -> None:
    """What is there only in company."""
    for side in ("in", "out"):
        mean, var = (arrays.get(f"{layer}/{side}/{key}") for key in ("mean", "var"))
        if mean is None or var is None or mean.shape != var.shape:
            raise DataError(f"'{layer}/{side}' has no mean and variance of the same channels")
        if np.any(arrays[f"{layer}/{side}/histogram"] < 0):
            raise DataError(f"'{layer}/{side}/histogram' has a count below 0")
    there = {key for key in _SCALARS if f"{layer}/{key}" in arrays}
    if there and there != _SCALARS:
        raise DataError(f"{layer!r} has {', '.join(sorted(there))} alone")


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
    uninterrupted run would have ended with, but for the seconds and the drift of its first step.

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
        return drift_of(name, self.before[1], sample)

    def _batch(self, state: State) -> tuple[Tensor, Tensor]:
        device = next(state.model.parameters()).device
        return to_input(self.images, device), torch.from_numpy(self.labels).to(device)

    def _rng(self) -> np.random.Generator:
        return stream(self.plan.seed, "probe", "dropout")


def drift_of(
    name: str, before: activations.Sample, after: activations.Sample
) -> NDArray[np.float32]:
    """How far the mean of a channel of `name` moved, in its σ afterwards, over the channels."""
    moved = np.abs(after[f"{name}/mean"] - before[f"{name}/mean"])
    varies = after[f"{name}/var"] > 0
    if not varies.any():
        return np.asarray(np.nan, np.float32)
    deviation = np.sqrt(after[f"{name}/var"][varies])
    return np.asarray((moved[varies] / deviation).mean(), np.float32)


def _learning_rate(state: State, name: str) -> float:
    """The rate at which the optimiser now moves a parameter; 0 for one that it does not move."""
    parameter = state.model.get_parameter(name)
    for group in state.optimizer.param_groups:
        if any(p is parameter for p in group["params"]):
            return float(group["lr"])
    return 0.0
