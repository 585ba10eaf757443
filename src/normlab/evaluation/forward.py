"""Ask a network for its answers and leave no trace in it."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm

from normlab.core.ranks import ALONE, Ranks
from normlab.core.streams import stream
from normlab.data.augment import VIEWS, to_input, views_of
from normlab.data.batches import EVALUATION_BATCH, batch_bounds
from normlab.errors import NormlabError, UserError
from normlab.layers import BatchNorm

# (N, H, W, 3) pixels, (N, C, *) as the network takes them, or its keyword arguments, each (N, *)
Images = NDArray[np.uint8] | Tensor | Mapping[str, Tensor]


UNSURE = 0.25  # the share of images that `unsure` views see again


def normalizers(model: nn.Module) -> dict[str, TorchBatchNorm]:
    """The batch normalisations of `model`, by name: normlab's, PyTorch's and their subclasses."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, TorchBatchNorm)
    }


@contextmanager
def apart(model: nn.Module) -> Iterator[None]:
    """Layers that share a training batch's statistics with other processes do not do so inside."""
    layers = [m for m in model.modules() if isinstance(m, BatchNorm) and m.group is not None]
    groups = [layer.group for layer in layers]
    for layer in layers:
        layer.group = None
    try:
        yield
    finally:
        for layer, group in zip(layers, groups, strict=True):
            layer.group = group


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put statistics, modes and PyTorch's random stream back as they were, at the end."""
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


def as_trained(model: nn.Module) -> nn.Module:
    """`model` in training mode; where it is, layers that its user keeps in `.eval()` stay so."""
    return model if trains(model) else model.train()


def trains(model: nn.Module) -> bool:
    """Whether `model` is in training mode, and not just a new container of layers that are not."""
    layers = [m for m in model.modules() if not list(m.children())]
    learning = [m for m in layers if list(m.parameters()) and not isinstance(m, TorchBatchNorm)]
    return model.training and any(m.training for m in learning or layers)


def frozen(layer: TorchBatchNorm, training: bool) -> bool:
    """Whether a layer keeps to its running statistics while its model is trained.

    training: whether the model is in training mode; a layer that is not was kept from it.
    """
    return bool(getattr(layer, "frozen", False)) or (training and not layer.training)


def evaluation_batch(images: Images) -> int:
    """How many images go through a network at a time where nothing is learnt.

    250 of up to 64 × 64 pixels; of larger ones as many as have as many pixels, 32 at least, since
    what a network keeps of them would fill the memory.
    """
    if isinstance(images, Mapping):
        return EVALUATION_BATCH
    sides = images.shape[2:] if isinstance(images, Tensor) else images.shape[1:3]
    pixels = math.prod(sides) if len(sides) == 2 else 1
    return max(32, min(EVALUATION_BATCH, EVALUATION_BATCH * 64 * 64 // pixels))


def logits_of(
    model: nn.Module,
    images: Images,
    batch_size: int | None = None,
    *,
    views: str = "single",
    own_statistics: bool = False,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Logits (N, K) without dropout, on the CPU; the model is left as it was.

    Args:
        batch_size: None for `evaluation_batch`.
        views: with more than one view of an image (see `views_of`), the weighted mean of their
            logits. `unsure`: those of `shift` for the quarter of the images whose best class has
            the lowest probability from a single view, and the single view for all others.
        own_statistics: normalise each batch by its own statistics instead of the running ones, but
            for `frozen` layers; its images are `mixed`.
        ranks: processes that have the same model and images: each answers its share of the batches,
            and all get all the answers.

    Raises:
        UserError: own statistics of a batch with fewer than two images, images that the network
            fails on, or an answer without a tensor.
    """
    batch_size = evaluation_batch(images) if batch_size is None else batch_size
    if views == "unsure" and not isinstance(images, Mapping):
        answers = logits_of(model, images, batch_size, own_statistics=own_statistics, ranks=ranks)
        sure = answers.double().softmax(1).amax(1)
        chosen = sure.argsort(stable=True)[: round(len(sure) * UNSURE)]
        see_again(
            *(model, images, answers, chosen),
            batch_size=batch_size,
            own_statistics=own_statistics,
            ranks=ranks,
        )
        return answers
    parts: dict[int, Tensor] = {}  # by the number of their first image

    def take(answers: list[Any], first: int) -> None:
        seen = [logits(answer) for answer in answers]
        if len(seen) > 1:
            weights = zip(VIEWS[views], seen, strict=True)
            seen = [torch.stack([weight * view for weight, view in weights]).sum(0)]
        parts[first] = seen[0].cpu()

    kind: Any = {"views": views, "own_statistics": own_statistics, "ranks": ranks}
    run_batches(model, images, batch_size, **kind, take=take)
    if ranks.size == 1:
        together = torch.cat(list(parts.values()))
    else:
        shape = ranks.numbers.gather(torch.tensor([p.shape[1] for p in parts.values()][:1] or [0]))
        together = torch.zeros(count(images), int(shape.max()))
        for first, part in parts.items():
            together[first : first + len(part)] = part
        together = ranks.sum(together)  # to every row the others add zeros: the bits stay
    return together[np.argsort(mixed(len(together)))] if own_statistics else together


def mixed(total: int) -> NDArray[np.int64]:
    """The order (N,) in which images share batches that are normalised by their own statistics.

    As they lie they may be sorted by class; a batch of one class has not the statistics of all.
    """
    return stream(0, "mixed").permutation(total)


def see_again(
    model: nn.Module,
    images: NDArray[np.uint8] | Tensor,
    answers: Tensor,
    chosen: Tensor,
    **options: Any,
) -> None:
    """Replace the logits `answers` (N, K) of some images by those of `shift` views.

    Args:
        chosen: numbers of the images; there may be none.
        options: of `logits_of`.
    """
    if len(chosen):
        seen = images[chosen.numpy()] if isinstance(images, np.ndarray) else images[chosen]
        answers[chosen] = logits_of(model, seen, views="shift", **options)


def logits(answer: Any) -> Tensor:
    """The logits in what a network answers.

    A tensor is taken as it is; of tuples, dictionaries and dataclasses, what is called `logits`, or
    the first tensor.

    Raises:
        UserError: there is no tensor in it.
    """
    named = answer.get("logits") if isinstance(answer, Mapping) else getattr(answer, "logits", None)
    found = named if isinstance(named, Tensor) else first_tensor([answer])
    if found is None:
        raise UserError(
            f"the network answers with {type(answer).__name__}, which holds no tensor: let it "
            "return logits (N, K), or an object with .logits"
        )
    return found


def first_tensor(values: Iterable[Any]) -> Tensor | None:
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
        if (found := first_tensor(inner)) is not None:
            return found
    return None


@torch.no_grad()
def run_batches(
    model: nn.Module,
    images: Images,
    batch_size: int,
    *,
    views: str = "single",
    own_statistics: bool = False,
    ranks: Ranks = ALONE,
    take: Callable[[list[Any], int], None],
) -> None:
    """Run the images through the model in batches and hand the answers of each to `take`, with the
    number of the batch's first image.

    Args:
        views: `take` is given one answer for each view of the images (see `views_of`).
        own_statistics: batches are of `mixed` images, and `take` is given the place there.
    """
    total = count(images)
    if own_statistics and min(total, batch_size) < 2:
        raise UserError(
            f"{total} image(s) in batches of {batch_size}: statistics of a batch take two or more"
        )
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    with untouched(model), apart(model):
        learning: list[TorchBatchNorm] = []
        if own_statistics:
            training = trains(model)
            learning = [x for x in normalizers(model).values() if not frozen(x, training)]
        model.eval()
        for layer in learning:
            layer.train()
        order = mixed(total) if own_statistics else None
        for a, b in ranks.mine(batch_bounds(total, batch_size, join_single=own_statistics)):
            rows = slice(a, b) if order is None else order[a:b]
            take(_answers(model, images, rows, device, views), a)


def _answers(
    model: nn.Module,
    images: Images,
    rows: slice | NDArray[np.int64],
    device: torch.device,
    views: str,
) -> list[Any]:
    try:
        if isinstance(images, Mapping):
            return [model(**{name: value[rows].to(device) for name, value in images.items()})]
        part = images[rows]
        x = part.to(device) if isinstance(part, Tensor) else to_input(part, device)
        return [model(seen) for seen in (views_of(x, views) if views != "single" else [x])]
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
