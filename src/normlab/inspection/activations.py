"""What a network's layers see on one batch, seen without a trace.

`probe` runs a model forward and backward on a batch and describes the input and the output of each
normaliser and of each weight layer. `untouched` is what makes that safe in the middle of a
training: the model leaves it with the running statistics and modes it came with; gradients are
returned, never stored; and nothing here draws from a global generator.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from normlab.errors import NormlabError, UserError
from normlab.evaluation.forward import untouched
from normlab.layers import NoNorm, moments

PERCENTILES = (15, 50, 85)  # Ioffe and Szegedy (2015), figure 1
BINS = 64
VALUES = 1 << 14  # of a tensor that are sorted and binned; the same places every time
CHANNELS = 128  # of a layer that are written down one by one
DEAD = 1e-6  # of the layer's largest gradient: below it a channel counts as dead

Sample = dict[str, NDArray[np.float32]]
_NAN = np.full((), np.nan, np.float32)


def observed(model: nn.Module, chosen: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """Each normaliser and each weight layer by name, in the order in which they were defined.

    The place of a normaliser that was left out, a `NoNorm`, counts as one: a network with
    and one without normalisation have the same list.

    Args:
        chosen: only these.

    Raises:
        UserError: the model has no such layer.
    """
    layers = _all_observed(model)
    if chosen is None:
        return layers
    if unknown := sorted(set(chosen) - layers.keys()):
        raise UserError(f"layers {', '.join(unknown)}: choose from {', '.join(layers)}")
    return {name: module for name, module in layers.items() if name in chosen}


def _all_observed(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if not list(module.children())
        and (
            isinstance(module, NoNorm) or hasattr(module, "running_mean") or [*module.parameters()]
        )
    }


@contextmanager
def captured(layers: dict[str, nn.Module]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Collect the (input, output) of each of `layers` while their model runs in this context.

    Fused stages give way to the layers one by one where a layer has a hook (`layers.fused`).

    Raises:
        NormlabError: a layer did not run, or not as a module.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook_for(name: str) -> object:
        def note(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = (inputs[0], output)

        return note

    hooks = [m.register_forward_hook(hook_for(name)) for name, m in layers.items()]  # type: ignore[arg-type]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
    if missed := layers.keys() - seen.keys():
        raise NormlabError(f"layers {', '.join(sorted(missed))} were bypassed: nothing to record")


def channel_means(
    model: nn.Module,
    x: Tensor,
    rng: np.random.Generator,
    chosen: Sequence[str] | None = None,
) -> Sample:
    """Mean per channel of each layer's input and output on `x` in training mode."""
    with untouched(model), torch.no_grad(), captured(observed(model, chosen)) as seen:
        model.train()(x, rng)
    return {
        f"{name}/{side}/mean": to_numpy(moments(t[:, chosen_channels(t.shape[1])])[0])
        for name, pair in seen.items()
        for side, t in zip(("in", "out"), pair, strict=True)
    }


def probe(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    rng: np.random.Generator,
    chosen: Sequence[str] | None = None,
) -> Sample:
    """Describe each layer on the batch `x` (N, 3, H, W), `labels` (N,), in training mode.

    Args:
        chosen: only these layers.

    Returns:
        Arrays by name. For each layer L, of its input (`L/in/…`) and output (`L/out/…`):
        `percentiles` (3,), the 15th, 50th and 85th; `unit` (3,), those of one unit, the middle one;
        `range` (2,) and `histogram` (64,), counts in equal bins over the range, which leaves out
        the outermost 0.2 % of the values; `mean` and `var` (C,) per channel. Further `L/grad`, the
        norm of the loss's gradient by the output, and `L/dead`, the share of channels that no
        gradient reaches; of weight layers `L/weight_norm` and `L/weight_grad`; of normalisers
        `L/gamma`, `L/beta`, `L/running_mean` and `L/running_var` (C,). And `loss`. Of wide layers,
        128 channels, evenly chosen, stand for all.

    Raises:
        NormlabError: a layer's module was not run as one.
        UserError: the model has no layer of a name in `chosen`.
    """
    layers = observed(model, chosen)
    with untouched(model), torch.enable_grad():
        with captured(layers) as seen:
            loss = cross_entropy(model.train()(x, rng), labels)
        outputs = {name: out for name, (_, out) in seen.items() if out.requires_grad}
        weights = {
            f"{name}.{key}": p
            for name, layer in layers.items()
            for key, p in layer.named_parameters()
            if p.requires_grad
        }
        wanted = [*outputs.values(), *weights.values()]
        found = torch.autograd.grad(loss, wanted, allow_unused=True)
    grads = dict(zip(outputs, found, strict=False))
    weight_grads = dict(zip(weights, found[len(outputs) :], strict=True))
    sample: Sample = {"loss": to_numpy(loss)}
    for name, module in layers.items():
        for side, tensor in zip(("in", "out"), seen[name], strict=True):
            for key, values in _describe(tensor.detach()).items():
                sample[f"{name}/{side}/{key}"] = values
        sample |= _describe_gradient(name, grads.get(name))
        sample |= describe_parameters(name, module, weight_grads.get(f"{name}.weight"))
    return sample


def _describe(t: Tensor) -> Sample:
    mean, var = moments(t[:, chosen_channels(t.shape[1])])
    values, unit = some_values(t), some_values(t[:, t.shape[1] // 2 :][:, :1])
    return {**distribution(values, unit), "mean": to_numpy(mean), "var": to_numpy(var)}


def distribution(values: NDArray[np.float32], unit: NDArray[np.float32]) -> Sample:
    """Percentiles, range and histogram of values, and the percentiles of one unit's."""
    low, *percentiles, high = np.percentile(values, [0.1, *PERCENTILES, 99.9])
    if not low < high:
        low, high = low - 0.5, high + 0.5
    finite = np.isfinite(low)
    histogram = np.histogram(values, BINS, (low, high))[0] if finite else np.zeros(BINS)
    return {
        "percentiles": np.array(percentiles, np.float32),
        "unit": np.percentile(unit, PERCENTILES).astype(np.float32),
        "range": np.array([low, high], np.float32),
        "histogram": histogram.astype(np.float32),
    }


def some_values(t: Tensor) -> NDArray[np.float32]:
    """Up to 2¹⁴ of the tensor's finite values, from the same places every time."""
    flat = t.movedim(1, -1).reshape(-1)  # the order in memory of a channels-last tensor: no copy
    values = to_numpy(flat[_places(flat.numel())])
    values = values[np.isfinite(values)]
    return values if len(values) else np.full(1, np.nan, np.float32)


def _describe_gradient(name: str, grad: Tensor | None) -> Sample:
    if grad is None:  # frozen all the way down to here
        return {f"{name}/grad": _NAN, f"{name}/dead": _NAN}
    largest = grad.abs().amax([0, *range(2, grad.ndim)])  # (C,)
    dead = largest <= DEAD * largest.max()
    return {f"{name}/grad": to_numpy(grad.norm()), f"{name}/dead": to_numpy(dead.float().mean())}


def describe_parameters(name: str, module: nn.Module, weight_grad: Tensor | None) -> Sample:
    """Norms of a weight and its gradient, or γ, β and the running statistics of a normaliser."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.ndim > 1:
        grad = _NAN if weight_grad is None else to_numpy(weight_grad.norm())
        return {f"{name}/weight_norm": to_numpy(weight.norm()), f"{name}/weight_grad": grad}
    sample: Sample = {}
    keys = {"weight": "gamma", "bias": "beta", "running_mean": "", "running_var": ""}
    for attribute, key in keys.items():
        vector = getattr(module, attribute, None)
        if isinstance(vector, Tensor):
            sample[f"{name}/{key or attribute}"] = to_numpy(vector[chosen_channels(len(vector))])
    return sample


@lru_cache(maxsize=64)
def _places(count: int) -> Tensor:
    """Where in `count` values to look; at random, since a stride could miss whole channels."""
    if count <= VALUES:
        return torch.arange(count)
    return torch.from_numpy(np.random.default_rng(0).integers(count, size=VALUES))


def chosen_channels(channels: int) -> Tensor | slice:
    """Which of so many channels are written down one by one."""
    if channels <= CHANNELS:
        return slice(None)
    return torch.linspace(0, channels - 1, min(channels, CHANNELS)).round().long()


def to_numpy(t: Tensor) -> NDArray[np.float32]:
    """A copy."""
    return np.asarray(t.detach().float().cpu().numpy()).copy()
