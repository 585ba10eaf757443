"""What a whole population of images looks like to each batch normalisation.

Running statistics stand in for those of a population, which Ioffe and Szegedy mean (2015, arXiv
1502.03167, algorithm 2). Here they are computed: dropout off, each batch normalised by its own
statistics, and each layer's moments pooled over the batches by the law of total variance,

    μ  = Σ nᵢ·μᵢ / Σ nᵢ
    σ² = Σ nᵢ·(σᵢ² + (μᵢ − μ)²) / Σ nᵢ
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm

from normlab.data.batches import EVALUATION_BATCH, batch_bounds, to_input
from normlab.errors import NormlabError, UserError
from normlab.layers import BatchNorm, moments

SAMPLE = 4096  # images that stand for the training set where all of them would cost too much

# (N, H, W, 3) pixels, (N, C, *) as the network takes them, or its keyword arguments, each (N, *)
Images = NDArray[np.uint8] | Tensor | Mapping[str, Tensor]


@dataclass(frozen=True)
class Moments:
    """Mean and biased variance (C,), float64, of what a normaliser is given; `count` a channel."""

    mean: Tensor
    var: Tensor
    count: int


def normalizers(model: nn.Module) -> dict[str, BatchNorm | TorchBatchNorm]:
    """The batch normalisations of `model`, by name: normlab's, PyTorch's and their subclasses."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, TorchBatchNorm)
    }


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Lend the model out: statistics, modes and PyTorch's random stream come back as they were."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
            for module, mode in modes:
                module.training = mode


def population_moments(
    model: nn.Module, images: Images, batch_size: int = EVALUATION_BATCH
) -> dict[str, Moments]:
    """Pooled moments of each normaliser's input on `images`, by the normaliser's name.

    The model is left as it was. A frozen `BatchNorm` goes on normalising by its running statistics.

    Raises:
        UserError: fewer than two images.
    """
    parts: dict[str, list[Moments]] = {}

    def hook_for(name: str) -> Any:
        def note(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            x = _first_tensor([*inputs, *named.values()])
            if x is None or x.ndim < 2 or not x.numel():
                return
            mean, var = moments(x if x.dtype == torch.float64 else x.float())
            found = Moments(mean.double(), var.double(), x.numel() // x.shape[1])
            parts.setdefault(name, []).append(found)

        return note

    hooks = [
        layer.register_forward_pre_hook(hook_for(name), with_kwargs=True)
        for name, layer in normalizers(model).items()
    ]
    try:
        _run(model, images, batch_size, own_statistics=True, take=lambda _: None)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: pool(found) for name, found in parts.items()}


def pool(parts: list[Moments]) -> Moments:
    """Join the moments of batches to those of all their values: the law of total variance."""
    total = sum(p.count for p in parts)
    weights = [p.count / total for p in parts]
    mean = sum((w * p.mean for w, p in zip(weights, parts, strict=True)), torch.zeros(()))
    var = sum(
        (w * (p.var + (p.mean - mean) ** 2) for w, p in zip(weights, parts, strict=True)),
        torch.zeros(()),
    )
    return Moments(mean, var, total)


@torch.no_grad()
def set_statistics(model: nn.Module, found: Mapping[str, Moments]) -> None:
    """Write moments into the running statistics, unbiased where the layer's library keeps them so.

    Frozen layers and layers without running statistics are left alone.
    """
    for name, layer in normalizers(model).items():
        if layer.running_mean is None or layer.running_var is None or name not in found:
            continue
        if isinstance(layer, BatchNorm):
            if layer.frozen:
                continue
            unbiased = layer.convention.unbiased_running_var
        else:
            unbiased = True
        m = found[name]
        layer.running_mean.copy_(m.mean)
        layer.running_var.copy_(m.var * (m.count / max(m.count - 1, 1) if unbiased else 1.0))


def logits_of(
    model: nn.Module, images: Images, batch_size: int, *, own_statistics: bool = False
) -> Tensor:
    """Logits (N, K) without dropout; each batch normalised by its own or by running statistics.

    The model is left as it was.

    Raises:
        UserError: own statistics of a batch with fewer than two images, images that the network
            fails on, or an answer without a tensor.
    """
    parts: list[Tensor] = []

    def take(answer: Any) -> None:
        parts.append(logits(answer).cpu())

    _run(model, images, batch_size, own_statistics=own_statistics, take=take)
    return torch.cat(parts)


def logits(answer: Any) -> Tensor:
    """The logits in what a network answers.

    A tensor is taken as it is; of tuples, dictionaries and dataclasses, what is called `logits`, or
    the first tensor.

    Raises:
        UserError: there is no tensor in it.
    """
    named = answer.get("logits") if isinstance(answer, Mapping) else getattr(answer, "logits", None)
    found = named if isinstance(named, Tensor) else _first_tensor([answer])
    if found is None:
        raise UserError(
            f"the network answers with {type(answer).__name__}, which holds no tensor: let it "
            "return logits (N, K), or an object with .logits"
        )
    return found


def _first_tensor(values: Iterable[Any]) -> Tensor | None:
    for value in values:
        if isinstance(value, Tensor):
            return value
        inner: Iterable[Any] = ()
        if isinstance(value, Mapping):
            inner = value.values()
        elif isinstance(value, tuple | list):
            inner = value
        elif is_dataclass(value) and not isinstance(value, type):
            inner = [getattr(value, field.name) for field in fields(value)]
        if (found := _first_tensor(inner)) is not None:
            return found
    return None


@torch.no_grad()
def _run(
    model: nn.Module,
    images: Images,
    batch_size: int,
    *,
    own_statistics: bool,
    take: Callable[[Any], None],
) -> None:
    """Run the images through the model in batches and hand each answer to `take`."""
    total = count(images)
    if own_statistics and min(total, batch_size) < 2:
        raise UserError(
            f"{total} image(s) in batches of {batch_size}: statistics of a batch take two or more"
        )
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    with untouched(model):
        model.eval()
        if own_statistics:
            for layer in normalizers(model).values():
                layer.train()
        for a, b in batch_bounds(total, batch_size, join_single=own_statistics):
            take(_answer(model, images, a, b, device))


def _answer(model: nn.Module, images: Images, a: int, b: int, device: torch.device) -> Any:
    try:
        if isinstance(images, Mapping):
            return model(**{name: value[a:b].to(device) for name, value in images.items()})
        part = images[a:b]
        return model(part.to(device) if isinstance(part, Tensor) else to_input(part, device))
    except NormlabError:
        raise
    except Exception as e:  # somebody else's forward may raise anything
        reason = (str(e).splitlines() or [""])[0]
        raise UserError(
            f"the network fails on these images ({type(e).__name__}: {reason}): give them in the "
            "shape and type that it takes, or as a dictionary of its keyword arguments"
        ) from e


def count(images: Images) -> int:
    """N: how many images there are."""
    return len(next(iter(images.values()))) if isinstance(images, Mapping) else len(images)


def evenly(images: NDArray[np.uint8], count: int = SAMPLE) -> NDArray[np.uint8]:
    """At most `count` of the images, the same ones every time, from all over the set."""
    if len(images) <= count:
        return images
    return images[np.linspace(0, len(images) - 1, count).astype(np.int64)]
