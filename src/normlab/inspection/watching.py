"""Watch any PyTorch training from inside its own loop, and leave no trace in it.

    with normlab.watch(model, "watched", every=100) as watch:
        for x, y in loader:
            loss = criterion(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            watch.step(loss)

At the sampled steps hooks describe what goes through each normaliser and each weight layer, in the
training's own forward and backward pass, and are gone for the others. Nothing of the training is
kept but up to 2¹⁶ values a call while its step lasts, and a few of its inputs as a fixed batch on
which the drift of the mean is seen. `normlab inspect watched` draws it.
"""

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from normlab.core.files import LOCK, write_json
from normlab.core.machine import describe_host
from normlab.errors import UserError
from normlab.evaluation.forward import apart, as_trained, first_tensor, untouched
from normlab.inspection.activations import (
    BINS,
    DEAD,
    Sample,
    chosen_channels,
    describe_parameters,
    distribution,
    some_values,
    to_numpy,
)
from normlab.inspection.recording import (
    MOST_IMAGES,
    MOST_LAYERS,
    MOST_SAMPLES,
    RECORDING,
    WATCHED,
    Recording,
    drift_of,
    is_due,
)
from normlab.layers import NoNorm, moments
from normlab.layers.norms import GroupNorm as OurGroupNorm

HISTORY = "history.jsonl"  # a callback's, in the same folder
MOST_CALLS = 64  # of a layer in one step that are described
WRITING = 0.02  # share of the time that writing the file may take before the end
WEIGHTS: tuple[type[nn.Module], ...] = (_ConvNd, nn.Linear, nn.Bilinear)
NORMS: tuple[type[nn.Module], ...] = (
    *(_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm),
    *(OurGroupNorm, NoNorm),
)


@dataclass
class Side:
    """What one side of a layer saw in a step: the parts of its calls."""

    moments: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)  # values, mean, var
    values: list[NDArray[np.float32]] = field(default_factory=list)
    unit: list[NDArray[np.float32]] = field(default_factory=list)

    def note(self, t: Tensor) -> None:
        """Describe a call's tensor (N, C, *); nothing of it is kept."""
        wide = t if t.dtype in (torch.float32, torch.float64) else t.float()
        mean, var = moments(wide[:, chosen_channels(t.shape[1])])
        self.moments.append((t.numel() // t.shape[1], mean, var))
        self.values.append(some_values(wide))
        self.unit.append(some_values(wide[:, t.shape[1] // 2 :][:, :1]))

    def sample(self) -> Sample:
        """All calls as one."""
        count = sum(n for n, _, _ in self.moments)
        mean = sum(n * m for n, m, _ in self.moments) / count
        var = sum(n * (v + (m - mean).square()) for n, m, v in self.moments) / count
        parts = distribution(np.concatenate(self.values), np.concatenate(self.unit))
        return {**parts, "mean": to_numpy(mean), "var": to_numpy(var)}  # type: ignore[arg-type]


@dataclass
class _Layer:
    """A layer and what it has seen in the step that is being sampled."""

    module: nn.Module
    sides: tuple[Side, Side] = field(default_factory=lambda: (Side(), Side()))
    calls: int = 0
    squares: float = 0.0  # of the gradient's values
    largest: Tensor | None = None  # (C,) of their absolute values
    weight_grad: float = float("nan")

    def forget(self) -> None:
        self.sides, self.calls = (Side(), Side()), 0
        self.squares, self.largest, self.weight_grad = 0.0, None, float("nan")

    def note_gradient(self, grad: Tensor) -> None:
        by_channel = channels_first(self.module, grad.detach()).float()
        self.squares += float(by_channel.square().sum())
        largest = by_channel.abs().amax([0, *range(2, by_channel.ndim)])
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)

    def sample(self, name: str, rate: float) -> Sample:
        found: Sample = {}
        for side, seen in zip(("in", "out"), self.sides, strict=True):
            for key, values in seen.sample().items():
                found[f"{name}/{side}/{key}"] = values
        dead = np.nan
        if self.largest is not None:
            dead = float((self.largest <= DEAD * self.largest.max()).float().mean())
        grad = np.nan if self.largest is None else self.squares**0.5
        found[f"{name}/grad"] = np.asarray(grad, np.float32)
        found[f"{name}/dead"] = np.asarray(dead, np.float32)
        found |= describe_parameters(name, self.module, None)
        if (norm := found.get(f"{name}/weight_norm")) is not None:
            found[f"{name}/weight_grad"] = np.asarray(self.weight_grad, np.float32)
            found[f"{name}/effective_rate"] = np.asarray(rate / norm**2, np.float32)
        return found


class Watch:
    """A watched training; see the module.

    Args:
        model: any PyTorch module; one wrapped in `DistributedDataParallel` is watched on rank 0,
            in that process's part of the batch.
        folder: new or empty; gets `recording.npz`, as `normlab train --record` makes it.
        every: sample each so many steps, and the first, second, fourth, eighth … before. When there
            are more than about a hundred samples every other one is dropped, and `every` doubles.
        layers: names of those to watch; None for each normaliser and each weight layer.
        optimizer: for the effective learning rate; without it that is not known.
        label: what to call it in pictures; None for the folder's name.

    Raises:
        UserError: a model that runs no Python of its modules (`torch.compile`, TorchScript), whose
            parameters are elsewhere (FSDP, `DataParallel`), or has nothing to watch; a folder that
            is not empty.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: str | Path,
        *,
        every: int = 100,
        layers: Sequence[str] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        label: str | None = None,
    ) -> None:
        if every < 1:
            raise UserError(f"every={every}: choose 1 or more steps")
        refuse_unwatchable(model)
        self.model: nn.Module = model.module if _is_ddp(model) else model  # type: ignore[assignment]
        self.layers = {n: _Layer(m) for n, m in watchable(self.model, layers).items()}
        self.every, self.optimizer = every, optimizer
        self.folder = Path(folder)
        self.label = label or self.folder.name
        self.active = not torch.distributed.is_available() or not (
            torch.distributed.is_initialized() and torch.distributed.get_rank()
        )
        self.recording = Recording(np.empty(0, np.int64), (), {})
        self.steps = 0
        self.notes: list[str] = []
        self.probe: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.drifts = not any(isinstance(m, nn.SyncBatchNorm) for m in self.model.modules())
        self.before: Sample | None = None
        self.handles: list[RemovableHandle] = []
        self.began = time.perf_counter()
        self.seconds = self.spent = self.written = 0.0
        if self.active:
            self._make_folder()
            self._arm()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def step(self, loss: Tensor | float | None = None) -> None:
        """Say that a step is over: after its backward passes and the optimiser's step.

        Args:
            loss: of the step; it is noted.

        Raises:
            UserError: no layer ran as a module in the first step.
        """
        self.steps += 1
        if not self.active:
            return
        began = time.perf_counter()
        if self.handles:
            self._sample(loss, began)
        if is_due(self.steps + 1, self.every):
            self._arm()
            self.spent = time.perf_counter() - began

    def close(self) -> None:
        """Take the hooks away and write the recording whole; a second time does nothing."""
        self._disarm()
        if self.active and len(self.recording.steps):
            self._write(compress=True)
            self.active = False

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"cannot make the folder {str(self.folder)!r} ({e.strerror})") from None
        if any(path.name not in (LOCK, HISTORY) for path in self.folder.iterdir()):
            raise UserError(f"folder {str(self.folder)!r} is not empty: choose a new one to watch")

    def _arm(self) -> None:
        """Set the hooks for the next step, and note the means before it."""
        self.before = self._probe_means()
        for layer in self.layers.values():
            layer.forget()
            hook = layer.module.register_forward_hook(self._hook(layer), with_kwargs=True)
            self.handles.append(hook)
            weight = getattr(layer.module, "weight", None)
            if isinstance(weight, nn.Parameter) and weight.ndim > 1 and weight.requires_grad:
                hook = weight.register_post_accumulate_grad_hook(_weight_hook(layer))  # type: ignore[no-untyped-call]
                self.handles.append(hook)
        if self.probe is None and self.drifts:
            self.handles.append(self.model.register_forward_pre_hook(self._keep, with_kwargs=True))

    def _disarm(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def _hook(self, layer: _Layer) -> Any:
        def note(
            module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any
        ) -> None:
            if not (torch.is_grad_enabled() and self.model.training) or layer.calls >= MOST_CALLS:
                return
            began = time.perf_counter()
            x, y = first_tensor([*inputs, *named.values()]), first_tensor([output])
            if x is None or y is None or not (x.is_floating_point() and y.is_floating_point()):
                return
            if not (x.numel() and y.numel()):  # of no image, as of a picture without a region
                return
            layer.calls += 1
            with torch.no_grad():
                for side, t in zip(layer.sides, (x, y), strict=True):
                    side.note(channels_first(module, t.detach()))
            if y.requires_grad:
                y.register_hook(layer.note_gradient)  # type: ignore[no-untyped-call]
            self.spent += time.perf_counter() - began

        return note

    def _keep(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Keep a few of the first inputs, on which the drift is seen."""
        if self.probe is None and torch.is_grad_enabled() and module.training:
            values, names = _first_ones(inputs), _first_ones(named)
            self.probe = values, names

    def _probe_means(self) -> Sample | None:
        """Mean and variance by channel of each layer's input and output on the fixed batch."""
        if self.probe is None or not self.drifts:
            return None
        found: Sample = {}

        def hook_for(name: str) -> Any:
            def note(
                module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any
            ) -> None:
                both = first_tensor([*inputs, *named.values()]), first_tensor([output])
                for side, t in zip(("in", "out"), both, strict=True):
                    if t is None or not t.is_floating_point() or not t.numel():
                        continue
                    t = channels_first(module, t).float()
                    mean, var = moments(t[:, chosen_channels(t.shape[1])])
                    found[f"{name}/{side}/mean"], found[f"{name}/{side}/var"] = map(
                        to_numpy, (mean, var)
                    )

            return note

        hooks = [
            layer.module.register_forward_hook(hook_for(name), with_kwargs=True)
            for name, layer in self.layers.items()
        ]
        inputs, named = self.probe
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        try:
            with (
                untouched(self.model),
                apart(self.model),  # other processes are at something else
                random_streams(device),
                torch.no_grad(),
            ):
                as_trained(self.model)(*inputs, **named)
        except Exception as e:  # somebody else's forward may refuse a smaller batch
            self.drifts = False
            reason = (str(e).splitlines() or [""])[0]
            self.notes.append(f"no drift: the model fails on its own first inputs again ({reason})")
            return None
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def _sample(self, loss: Tensor | float | None, began: float) -> None:
        self._disarm()
        ran = {name: layer for name, layer in self.layers.items() if layer.calls}
        if not self.recording.layers:
            self._choose(ran)
        sample: Sample = {}
        for name in self.recording.layers:
            layer = self.layers[name]
            sample |= layer.sample(name, self._rate(layer.module)) if layer.calls else {}
        value = float(loss.detach()) if isinstance(loss, Tensor) else loss
        sample["loss"] = np.asarray(np.nan if value is None else value, np.float32)
        after = self._probe_means() if self.before is not None else None
        for name in self.recording.layers:
            for side in ("in", "out"):
                place = f"{name}/{side}"
                drift = np.asarray(np.nan, np.float32)
                if self.before is not None and after is not None and f"{place}/mean" in after:
                    drift = drift_of(place, self.before, after)
                sample[f"{place}/drift"] = drift
        spent = self.spent + time.perf_counter() - began
        self.seconds += spent
        sample["seconds"] = np.asarray(spent, np.float32)
        self.spent = 0.0
        first = {k: v[-1] for k, v in self.recording.arrays.items()}
        missing = {k: nothing(k, v) for k, v in first.items() if k not in sample}
        self.recording = self.recording.append(self.steps, {**sample, **missing})
        for layer in self.layers.values():
            layer.forget()
        if len(self.recording.steps) > MOST_SAMPLES:
            self.every *= 2
            self.recording = self.recording.thinned(self.every)
        now = time.perf_counter()
        if self.written <= WRITING * (now - self.began):
            self._write(compress=False)
            self.written += time.perf_counter() - now

    def _choose(self, ran: Mapping[str, _Layer]) -> None:
        """Fix the list of layers: those that ran in the first step."""
        if not ran:
            raise UserError(
                f"none of the {len(self.layers)} layers ran as a module with gradients in step "
                f"{self.steps}: watch the model that is trained, in training mode, without "
                "torch.compile"
            )
        if left := [name for name in self.layers if name not in ran]:
            names = ", ".join(left[:20])
            self.notes.append(f"not run as modules, or on no image, and left out: {names}")
        self.recording = Recording(self.recording.steps, tuple(ran), {})

    def _rate(self, module: nn.Module) -> float:
        weight = getattr(module, "weight", None)
        for group in self.optimizer.param_groups if self.optimizer is not None else []:
            if any(p is weight for p in group["params"]):
                return float(group["lr"])
        return float("nan")

    def _write(self, *, compress: bool) -> None:
        self.recording.write(self.folder / RECORDING, compress=compress)
        about = {
            "label": self.label,
            "model": type(self.model).__name__,
            "steps": self.steps,
            "seconds": time.perf_counter() - self.began,
            "notes": self.notes,
            "environment": {**describe_host(), "torch": torch.__version__},
        }
        write_json(self.folder / WATCHED, about)


def watch(model: nn.Module, folder: str | Path, **options: Any) -> Watch:
    """Watch a training; see `Watch`, whose arguments these are."""
    return Watch(model, folder, **options)


def refuse_unwatchable(model: nn.Module) -> None:
    """Refuse models whose modules do not run as modules here.

    Raises:
        UserError: naming what it is, and the remedy.
    """
    for name, module in model.named_modules():
        kind = type(module).__name__
        where = f"layer {name!r}" if name else "the model"
        if kind == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            raise UserError(
                f"{where} is compiled by torch.compile, which runs no hooks of the layers: watch "
                "the same training without it"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise UserError(f"{where} is TorchScript, whose layers cannot be watched")
        if kind in ("FullyShardedDataParallel", "DataParallel") or kind.startswith("FSDP"):
            raise UserError(
                f"{where} is wrapped in {kind}, which takes its parameters elsewhere: watch a "
                "training in one process, or under DistributedDataParallel"
            )


def watchable(model: nn.Module, chosen: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """Normalisers and weight layers by name; a shared one once, by its first name.

    The place of a normaliser that was left out counts as one: an `Identity` that is called so.

    Raises:
        UserError: there are none, too many, or none of a name in `chosen`.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        is_place = isinstance(module, nn.Identity) and _is_place(name)
        if is_place or isinstance(module, (*NORMS, *WEIGHTS)):
            found[name] = module
    if not found:
        raise UserError("the model has no normaliser, convolution or dense layer to watch")
    if chosen is not None:
        if unknown := sorted(set(chosen) - found.keys()):
            raise UserError(f"layers {', '.join(unknown)}: choose from {', '.join(found)}")
        found = {name: module for name, module in found.items() if name in chosen}
    if len(found) > MOST_LAYERS:
        raise UserError(f"{len(found):,} layers to watch: name at most {MOST_LAYERS:,} (layers=…)")
    return found


def channels_first(module: nn.Module, t: Tensor) -> Tensor:
    """A layer's tensor as (N, C, *), wherever it has its channels."""
    if t.ndim < 2:
        return t.reshape(1, -1)
    sizes = getattr(module, "normalized_shape", None)
    last = isinstance(module, nn.Linear | nn.Bilinear) or (
        sizes is not None and t.shape[-1] == sizes[-1] and (t.shape[1] != sizes[-1] or t.ndim != 4)
    )
    return t.movedim(-1, 1) if last and t.ndim > 2 else t


def _is_place(name: str) -> bool:
    last = name.rpartition(".")[2].lower()
    return last.startswith(("bn", "norm", "ln")) or last.endswith("norm")


def _is_ddp(model: nn.Module) -> bool:
    return isinstance(model, nn.parallel.DistributedDataParallel)


def _weight_hook(layer: _Layer) -> Any:
    def note(parameter: Tensor) -> None:
        if parameter.grad is not None:
            layer.weight_grad = float(parameter.grad.detach().norm())

    return note


def _first_ones(values: Any) -> Any:
    """The same inputs with the first images only, apart from the originals."""
    if isinstance(values, Tensor):
        return values.detach()[:MOST_IMAGES].clone() if values.ndim else values.detach().clone()
    if isinstance(values, Mapping):
        return {name: _first_ones(value) for name, value in values.items()}
    if isinstance(values, list | tuple) and type(values) in (list, tuple):
        return type(values)(_first_ones(value) for value in values)
    return values


@contextmanager
def random_streams(device: torch.device) -> Iterator[None]:
    """The streams of Python, NumPy and the device as they were, at the end.

    Meanwhile PyTorch's start at the same place every time, so that the same things are dropped.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def nothing(key: str, like: NDArray[np.float32]) -> NDArray[np.float32]:
    """In place of what a layer that did not run would have shown."""
    if key.endswith("/histogram"):
        return np.zeros(BINS, np.float32)
    if key.endswith("/range"):
        return np.array([-0.5, 0.5], np.float32)
    return np.full(like.shape, np.nan, np.float32)
