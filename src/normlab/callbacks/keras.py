"""Callbacks for Keras 3, on its PyTorch and TensorFlow backends: record, examine, note.

    from normlab.callbacks.keras import Checkup, History, Watch

    model.fit(x, y, callbacks=[Watch("watched", x[:64]), Checkup(x[:256]), History("watched")])

Keras does not show what passes through its layers in `fit`, so a few given images are run through
the model beside the training, in training mode. Statistics and random states are put back each
time, and the training keeps its bits.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from normlab.callbacks.rows import Rows
from normlab.core.files import write_json
from normlab.core.machine import describe_host
from normlab.diagnosis.checkup import Said
from normlab.diagnosis.findings import Finding
from normlab.diagnosis.network import Batches, Network, Normalizer
from normlab.errors import UserError
from normlab.evaluation.population import Moments, pool
from normlab.inspection.activations import Sample, chosen_channels
from normlab.inspection.recording import (
    MOST_SAMPLES,
    RECORDING,
    WATCHED,
    Recording,
    drift_of,
    is_due,
)
from normlab.inspection.watching import Side, random_streams
from normlab.layers import moments

try:
    import keras
except ImportError:
    raise UserError("these callbacks need Keras 3: pip install keras") from None

_NORMALIZERS = (
    keras.layers.BatchNormalization,
    keras.layers.LayerNormalization,
    keras.layers.GroupNormalization,
)
_Callback: Any = keras.callbacks.Callback


class _Stepping(_Callback):  # type: ignore[misc]
    """Counts a training's steps, which are the optimiser's updates."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = self.updates = 0

    def on_train_begin(self, logs: Any = None) -> None:
        self.updates = int(_array(self.model.optimizer.iterations))

    def ends_step(self) -> bool:
        """Count the step that ended with this batch; False where it only added its gradients."""
        if _accumulation(self.model) > 1:
            before, self.updates = self.updates, int(_array(self.model.optimizer.iterations))
            if self.updates == before:
                return False
        self.steps += 1
        return True


class Watch(_Stepping):
    """Record what each normaliser and each layer with a kernel sees of a few images.

    Gradients are not recorded; the loss is Keras' own running mean over the epoch.

    Args:
        folder: new or empty; gets `recording.npz`, as `normlab train --record` makes it.
        images: up to 64 inputs of the model.
        every: sample each so many steps, and the first, second, fourth, eighth … before. A step is
            an update, also of an optimiser that accumulates the gradients of several batches.
        label: what to call it in pictures; None for the folder's name.

    Raises:
        UserError: in `fit`: a subclassed model, whose layers have no places, or none to watch; a
            folder that is not empty.
    """

    def __init__(
        self, folder: str | Path, images: Any, *, every: int = 100, label: str | None = None
    ) -> None:
        super().__init__()
        if every < 1:
            raise UserError(f"every={every}: choose 1 or more steps")
        self.folder, self.images, self.every = Path(folder), images[:64], every
        self.label = label or self.folder.name
        self.recording = Recording(np.empty(0, np.int64), (), {})
        self.before: Sample | None = None
        self.spent = 0.0

    def on_train_begin(self, logs: Any = None) -> None:
        super().on_train_begin(logs)
        if self.steps:  # a further fit goes on
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if any(path.name != "history.jsonl" for path in self.folder.iterdir()):
            raise UserError(f"folder {str(self.folder)!r} is not empty: choose a new one to watch")
        self.began = time.perf_counter()
        self.probe = _Probe(self.model)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self.before is None and is_due(self.steps + 1, self.every):
            began = time.perf_counter()
            self.before = self.probe.sample(self.images)
            self.spent = time.perf_counter() - began

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if not self.ends_step() or self.before is None:
            return
        began = time.perf_counter()
        sample = self.probe.sample(self.images)
        for name in self.probe.layers:
            for side in ("in", "out"):
                place = f"{name}/{side}"
                sample[f"{place}/drift"] = drift_of(place, self.before, sample)
        loss = (logs or {}).get("loss")
        sample["loss"] = np.asarray(np.nan if loss is None else loss, np.float32)
        sample["seconds"] = np.asarray(self.spent + time.perf_counter() - began, np.float32)
        self.before = None
        if not self.recording.layers:
            self.recording = Recording(self.recording.steps, tuple(self.probe.layers), {})
        self.recording = self.recording.append(self.steps, sample)
        if len(self.recording.steps) > MOST_SAMPLES:
            self.every *= 2
            self.recording = self.recording.thinned(self.every)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._write(compress=False)

    def on_train_end(self, logs: Any = None) -> None:
        self._write(compress=True)

    def _write(self, *, compress: bool) -> None:
        self.recording.write(self.folder / RECORDING, compress=compress)
        about = {
            "label": self.label,
            "model": type(self.model).__name__,
            "steps": self.steps,
            "seconds": time.perf_counter() - self.began,
            "notes": self.probe.notes,
            "environment": {
                **describe_host(), "keras": keras.__version__, "backend": keras.backend.backend()
            },
        }  # fmt: skip
        write_json(self.folder / WATCHED, about)


class Checkup(_Callback):  # type: ignore[misc]
    """The doctor at the end of epochs, as `normlab.Checkup`, on a Keras model and those within it.

    Args:
        images: inputs of the model, as it is trained on them; None for what the statistics say
            by themselves.
        every: come after each so many epochs.
        report: told each new finding in a line; None for nobody.

    Attributes:
        findings: all so far.
    """

    def __init__(
        self, images: Any = None, *, every: int = 1, report: Callable[[str], None] | None = print
    ) -> None:
        super().__init__()
        if every < 1:
            raise UserError(f"every={every}: choose 1 or more epochs")
        self.images, self.every = images, every
        self._said = Said(report)

    @property
    def findings(self) -> list[Finding]:
        return self._said.findings

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if epoch % self.every == 0:
            self._said.news(epoch + 1, _network(self.model, self.images))


class History(_Stepping):
    """Write the logs of each epoch to `history.jsonl`, as `normlab train` does.

    Args:
        folder: the same as that of `Watch`, so that `normlab inspect` draws both.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.rows = Rows(folder)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.ends_step()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.rows.add(epoch + 1, self.steps, logs or {})


class _Probe:
    """A model with the inputs and outputs of its layers, run beside the training."""

    def __init__(self, model: Any) -> None:
        if not getattr(model, "inputs", None):
            raise UserError(
                f"a {type(model).__name__} is no functional or sequential model with a known input "
                "shape: its layers have no places to be watched at"
            )
        every = [layer for layer in model.layers if _is_watched(layer)]
        self.layers = {layer.name: layer for layer in every if len(layer._inbound_nodes) == 1}
        self.notes = []
        if left := [layer.name for layer in every if layer.name not in self.layers]:
            self.notes.append(f"used several times, and left out: {', '.join(left)}")
        if inner := [x.name for x in model.layers if getattr(x, "layers", None)]:
            self.notes.append(f"models within the model, not looked into: {', '.join(inner)}")
        if not self.layers:
            raise UserError("the model has no normaliser and no layer with a kernel to watch")
        self.model = model
        outputs = {f"{n}/{s}": getattr(x, f"{s}put") for n, x in self.layers.items() for s in SIDES}
        self.inner = keras.Model(model.inputs, outputs)
        self.states = [v for v in _states(model) if "seed" in v.path]
        self.seeds = [_array(v) for v in self.states]

    def run(self, images: Any) -> dict[str, NDArray[Any]]:
        """The input and output of each layer in training mode, as (N, C, *)."""
        with _untouched(self.model), random_streams(torch.device("cpu")), torch.no_grad():
            for state, seed in zip(self.states, self.seeds, strict=True):
                state.assign(seed)  # the same things are dropped every time
            found = self.inner(images, training=True)
        layer_of = {f"{n}/{s}": layer for n, layer in self.layers.items() for s in SIDES}
        return {
            place: np.moveaxis(_array(value), _channel_axis(layer_of[place]), 1)
            for place, value in found.items()
        }

    def sample(self, images: Any) -> Sample:
        """What a recording keeps of a step, but for drift, loss and seconds."""
        sample: Sample = {}
        for place, values in self.run(images).items():
            side = Side()
            side.note(torch.from_numpy(np.ascontiguousarray(values)))
            sample |= {f"{place}/{key}": found for key, found in side.sample().items()}
        rate = float(_array(self.model.optimizer.learning_rate))
        for name, layer in self.layers.items():
            sample |= {f"{name}/grad": _NAN, f"{name}/dead": _NAN}
            if getattr(layer, "kernel", None) is not None:
                norm = float(np.linalg.norm(_array(layer.kernel).ravel()))
                sample[f"{name}/weight_norm"] = np.asarray(norm, np.float32)
                sample[f"{name}/weight_grad"] = _NAN
                sample[f"{name}/effective_rate"] = np.asarray(rate / norm**2, np.float32)
            for ours, theirs in _VECTORS.items():
                if (variable := getattr(layer, theirs, None)) is not None:
                    vector = torch.from_numpy(_array(variable).astype(np.float32))
                    if vector.ndim == 1:
                        sample[f"{name}/{ours}"] = vector[chosen_channels(len(vector))].numpy()
        return sample


SIDES = ("in", "out")
_NAN = np.full((), np.nan, np.float32)
_VECTORS = {
    "gamma": "gamma",
    "beta": "beta",
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
}


def _is_watched(layer: Any) -> bool:
    return isinstance(layer, _NORMALIZERS) or getattr(layer, "kernel", None) is not None


def _channel_axis(layer: Any) -> int:
    axis = getattr(layer, "axis", None)
    if isinstance(layer, _NORMALIZERS) and axis is not None:
        return int(axis[0] if isinstance(axis, list | tuple) else axis)
    return 1 if getattr(layer, "data_format", None) == "channels_first" else -1


def _array(value: Any) -> NDArray[Any]:
    return np.asarray(keras.ops.convert_to_numpy(value))


def _states(model: Any) -> list[Any]:
    """All variables that are not trained: statistics, counters, random states."""
    trained = {id(v) for v in model.trainable_variables}
    return [v for v in model.variables if id(v) not in trained]


@contextmanager
def _untouched(model: Any) -> Iterator[None]:
    before = [(variable, _array(variable).copy()) for variable in _states(model)]
    try:
        yield
    finally:
        for variable, value in before:
            variable.assign(value)


def _network(model: Any, images: Any) -> Network:
    """The model as the doctor's rules see it."""
    layers = {layer: name for name, layer in _normalizers(model)}  # a shared one once
    seen = {} if images is None or not layers else _population(model, layers, images)
    batches = int(_array(model.optimizer.iterations)) * _accumulation(model)
    tensors: dict[str, NDArray[Any]] = {}
    for i, variable in enumerate(model.weights):
        path = variable.path  # models within the model may have the same
        tensors[path if path not in tensors else f"{path} (weight {i})"] = _array(variable)
    return Network(
        path=model.name,
        kind=f"Keras model on {keras.backend.backend()}",
        normalizers=tuple(_normalizer(n, x, batches, seen.get(x)) for x, n in layers.items()),
        tensors={name: value for name, value in tensors.items() if value.dtype.kind == "f"},
        training=True,
        batches=Batches(),
    )


def _normalizers(layer: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """The batch normalisations in a model, and in models and wrappers within it, by place."""
    for inner in layer._flatten_layers(include_self=False, recursive=False):
        name = f"{place}{inner.name}"
        if isinstance(inner, keras.layers.BatchNormalization):
            yield name, inner
        yield from _normalizers(inner, f"{name}/")


def _population(model: Any, layers: Iterable[Any], images: Any) -> dict[Any, Moments]:
    """The moments of what each of `layers` is given of the images in training mode."""
    seen: dict[Any, list[Moments]] = {}

    def noting(layer: Any) -> Callable[..., Any]:
        call = layer.call

        def note(inputs: Any, *args: Any, **named: Any) -> Any:
            x = np.moveaxis(_array(inputs), _channel_axis(layer), 1)
            mean, var = moments(torch.from_numpy(np.ascontiguousarray(x, np.float64)))
            seen.setdefault(layer, []).append(Moments(mean, var, x.size // x.shape[1]))
            return call(inputs, *args, **named)

        return note

    own = {layer: vars(layer).get("call") for layer in layers}  # mostly none but the class's
    try:
        for layer in own:
            vars(layer)["call"] = noting(layer)
        with _untouched(model), random_streams(torch.device("cpu")), torch.no_grad():
            model(images, training=True)
    finally:
        for layer, call in own.items():
            del vars(layer)["call"]
            if call is not None:
                vars(layer)["call"] = call
    return {layer: pool(parts) for layer, parts in seen.items()}


def _accumulation(model: Any) -> int:
    """How many batches' gradients make one of the optimiser's updates."""
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    return int(optimizer.gradient_accumulation_steps or 1)


def _normalizer(name: str, layer: Any, batches: int, seen: Moments | None) -> Normalizer:
    def vector(name: str) -> NDArray[np.float64] | None:
        variable = getattr(layer, name, None)
        return None if variable is None else _array(variable).astype(np.float64)

    return Normalizer(
        name=name,
        running_mean=vector("moving_mean"),
        running_var=vector("moving_variance"),
        weight=vector("gamma"),
        eps=float(layer.epsilon),
        decay=float(layer.momentum),
        steps=batches if layer.trainable else None,
        data_mean=None if seen is None else seen.mean.numpy(),
        data_var=None if seen is None else seen.var.numpy(),
        updates=bool(layer.trainable),
        takes_batch=bool(layer.trainable),
        trainable=bool(layer.trainable),
        training=bool(layer.trainable),
    )
