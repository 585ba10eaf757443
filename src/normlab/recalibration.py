"""Population statistics, and the three scores that a batch-normalised network has.

A network answers differently with the statistics of the batch at hand, with the running ones, and
with those of a whole population of images. Ioffe and Szegedy (2015, arXiv 1502.03167, algorithm 2)
mean the last kind; running statistics stand in for them, and this is what tells when they fail.

Population statistics: dropout off, each batch normalised by its own statistics, and each layer's
moments pooled over the batches by the law of total variance,

    μ  = Σ nᵢ·μᵢ / Σ nᵢ
    σ² = Σ nᵢ·(σᵢ² + (μᵢ − μ)²) / Σ nᵢ
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm

from normlab.data import ImageData
from normlab.data.batches import batch_bounds, split_validation, to_input
from normlab.errors import DataError, UserError
from normlab.files import digest, write_tensors
from normlab.fit import EVALUATION_BATCH, Plan, State
from normlab.layers import BatchNorm, moments
from normlab.runs import Run

SAMPLE = 4096  # images that stand for the training set where all of them would cost too much

Images = NDArray[np.uint8] | Tensor  # (N, H, W, 3) pixels, or (N, C, *) as the network takes them


@dataclass(frozen=True)
class Moments:
    """Mean and biased variance (C,), float64, of what a normaliser is given; `count` a channel."""

    mean: Tensor
    var: Tensor
    count: int


@dataclass(frozen=True)
class Score:
    """Mean cross-entropy in nats, and accuracy."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class ThreeWay:
    """The same weights on the same images with three kinds of statistics.

    Attributes:
        batch: each batch of `batch_size` images normalised by its own statistics.
        running: with the running statistics, as in every evaluation.
        population: with population statistics.
        count: images scored.
    """

    batch: Score
    running: Score
    population: Score
    count: int
    batch_size: int


def normalizers(model: nn.Module) -> dict[str, BatchNorm | TorchBatchNorm]:
    """The batch normalisations of `model`, by name: normlab's and PyTorch's."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BatchNorm | TorchBatchNorm)
    }


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Lend the model out: statistics, modes and PyTorch's random stream come back as they were."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            yield
        finally:
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
        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            (x,) = inputs
            mean, var = moments(x if x.dtype == torch.float64 else x.float())
            found = Moments(mean.double(), var.double(), x.numel() // x.shape[1])
            parts.setdefault(name, []).append(found)

        return note

    hooks = [m.register_forward_pre_hook(hook_for(n)) for n, m in normalizers(model).items()]
    try:
        _logits(model, images, batch_size, own_statistics=True)
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


def three_way(
    model: nn.Module,
    images: Images,
    labels: NDArray[np.integer],
    *,
    population: Images | None = None,
    batch_size: int = 32,
) -> ThreeWay:
    """Score `images` with batch, running and population statistics; the model stays as it was.

    Args:
        images: (N, H, W, 3) uint8, or (N, C, *) ready for the network.
        labels: (N,).
        population: images that the population statistics are taken from, without their labels:
            those of the training set, as a rule. None: `images` themselves.
        batch_size: images a batch where batches are normalised by their own statistics.

    Raises:
        UserError: a batch with fewer than two images.
    """
    truth = torch.as_tensor(np.asarray(labels, np.int64))
    found = population_moments(model, images if population is None else population)
    with untouched(model):
        batch = _score(_logits(model, images, batch_size, own_statistics=True), truth)
        running = _score(_logits(model, images, EVALUATION_BATCH), truth)
        set_statistics(model, found)
        pooled = _score(_logits(model, images, EVALUATION_BATCH), truth)
    return ThreeWay(batch, running, pooled, len(truth), batch_size)


def _logits(
    model: nn.Module, images: Images, batch_size: int, *, own_statistics: bool = False
) -> Tensor:
    """Logits (N, K) without dropout; each batch normalised by its own or by running statistics."""
    if own_statistics and min(len(images), batch_size) < 2:
        raise UserError(
            f"{len(images)} image(s) in batches of {batch_size}: "
            "statistics of a batch take two or more"
        )
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    with untouched(model):
        model.eval()
        if own_statistics:
            for layer in normalizers(model).values():
                layer.train()
        bounds = batch_bounds(len(images), batch_size, join_single=own_statistics)
        return torch.cat([model(_inputs(images[a:b], device)).cpu() for a, b in bounds])


def _inputs(images: Images, device: torch.device) -> Tensor:
    return images.to(device) if isinstance(images, Tensor) else to_input(images, device)


def _score(logits: Tensor, labels: Tensor) -> Score:
    loss = cross_entropy(logits.double(), labels).item()
    return Score(loss, (logits.argmax(1) == labels).double().mean().item())


def evenly(images: NDArray[np.uint8], count: int = SAMPLE) -> NDArray[np.uint8]:
    """At most `count` of the images, the same ones every time, from all over the set."""
    if len(images) <= count:
        return images
    return images[np.linspace(0, len(images) - 1, count).astype(np.int64)]


class ThreeWayScores:
    """Adds to each epoch what the validation images score with the other kinds of statistics.

    `val_loss` and `val_accuracy` are the running statistics' already. Population statistics come
    from at most 4,096 of the training images. To be told before whoever writes the history down.
    """

    def before_training(self, plan: Plan) -> None:
        if not len(plan.validation):
            raise UserError("--three-way needs validation images: use --validation above 0")
        self.plan = plan
        self.population = evenly(plan.train.images)

    def after_step(self, state: State, epoch: int, batch: int, batches: int) -> None:
        if batch < batches:
            return
        held_out = self.plan.validation
        scores = three_way(
            state.model,
            held_out.images,
            held_out.labels,
            population=self.population,
            batch_size=self.plan.recipe.batch_size,
        )
        state.history[-1] |= {
            "val_loss_batch": scores.batch.loss,
            "val_accuracy_batch": scores.batch.accuracy,
            "val_loss_population": scores.population.loss,
            "val_accuracy_population": scores.population.accuracy,
        }


def recalibrate(
    run: Run, data: "str | Path | Mapping[str, Any] | ImageData | None" = None
) -> dict[str, Any]:
    """Write the run's last weights with population statistics as its `recalibrated` weights.

    The run's own weights and its result stay; `run.evaluate(weights="recalibrated")` scores them.

    Args:
        run: a finished run.
        data: whose training images to take, labels unseen: None for those the run was trained on,
            validation images left out; other data adapt the network to new pictures (Li et al.
            2016, arXiv 1603.04779).

    Returns:
        What was done, as the file says too: data, images, batch size, SHA-256 of the weights.

    Raises:
        UserError: an unfinished run, a network without batch normalisation, other image sizes.
    """
    model = run.model("last")
    if not normalizers(model):
        raise UserError(f"run {run.path} has no batch normalisation: nothing to recalibrate")
    images = run.task.load(data)
    size = images.x_train.shape[1:3]
    if size != (run.task.image_size, run.task.image_size):
        raise DataError(
            f"data {images.name!r} has images of {size[0]} × {size[1]} pixels, run {run.path} "
            f"takes {run.task.image_size} × {run.task.image_size}: resize them"
        )
    pixels = images.x_train
    if images.sha256 == run.task.data_sha256:
        train, _ = split_validation(pixels, images.y_train, run.task.recipe.validation)
        pixels = train.images
    set_statistics(model, population_moments(model, pixels))
    done = {
        "weights": "last",
        "data": images.name,
        "data_sha256": images.sha256,
        "images": len(pixels),
        "batch_size": EVALUATION_BATCH,
        "weights_sha256": digest(model.state_dict()),
    }
    write_tensors(run.path / "recalibrated.safetensors", model.state_dict(), done)
    return done
