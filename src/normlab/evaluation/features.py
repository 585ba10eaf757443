"""What a network's body makes of pictures, computed once, and the best output layer for it.

A body that does not learn gives a picture the same features in every epoch. So they are computed
once and kept in the cache, and an output layer is fitted to them as what it is: a multinomial
logistic regression, which has one best answer and no learning rate.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy  # its parts load when they are first used
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from normlab.core.bars import transient_bar
from normlab.core.streams import stream
from normlab.core.tensors import digest
from normlab.data.augment import to_input
from normlab.data.cache import cache_folder, write_cache, writing
from normlab.evaluation.forward import evaluation_batch, untouched
from normlab.models.timm_net import TimmNet

# Strengths λ that are tried, in units of the features' own spread, strongest first.
PENALTIES = tuple(float(10.0**k) for k in np.arange(1, -5.5, -0.5))
FOLDS = 5
MOST_FOR_FOLDS = 4_000  # pictures; of more, one part held out tells as much
MAX_ITERATIONS = 1_000


@dataclass(frozen=True)
class Head:
    """An output layer: logits = weights·features + bias.

    Attributes:
        weights: (K, D).
        bias: (K,); zeros where the layer has none.
        penalty: λ.
        losses: mean cross-entropy of the pictures held out, for each λ that was tried.
    """

    weights: NDArray[np.float64]
    bias: NDArray[np.float64]
    penalty: float
    losses: dict[float, float]


def features(model: nn.Module, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What the layer `output` of `model` is given of images (N, H, W, 3): (N, D).

    Kept in the cache's folder `features-…`, under one hash of pixels, weights and statistics.
    """
    folder, key = _place(model, images)
    if (found := _read(folder, key)) is not None:
        return found
    computed = _compute(model, images)
    with writing(lambda _: None, folder.name) as work:
        check = np.frombuffer(_check(computed, key), np.uint8)
        write_cache({"features": computed, "sha256": check}, work, folder)
    return computed


def cached_features(model: nn.Module, images: NDArray[np.uint8]) -> NDArray[np.float32] | None:
    """`features` if they are in the cache, of networks of timm, where that saves time."""
    return _read(*_place(model, images)) if isinstance(model, TimmNet) else None


def _place(model: nn.Module, images: NDArray[np.uint8]) -> tuple[Path, bytes]:
    """The folder in the cache, and the key: of pixels and of all but the output layer."""
    body = {k: v for k, v in model.state_dict().items() if not k.startswith("output.")}
    key = hashlib.sha256(f"1 {images.shape} {digest(body)}".encode())
    key.update(np.ascontiguousarray(images).data)
    return cache_folder() / f"features-{key.hexdigest()[:16]}", key.digest()


def _read(folder: Path, key: bytes) -> NDArray[np.float32] | None:
    try:
        found = np.load(folder / "features.npy", allow_pickle=False)
        check = np.load(folder / "sha256.npy", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if check.tobytes() == _check(found, key) else None


def _check(values: NDArray[Any], key: bytes) -> bytes:
    return hashlib.sha256(key + np.ascontiguousarray(values).tobytes()).digest()


@torch.no_grad()
def _compute(model: nn.Module, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn

    seen: list[Tensor] = []
    output = model.get_submodule("output")
    hook = output.register_forward_pre_hook(lambda _, given: seen.append(given[0].cpu()))
    device, size = next(model.parameters()).device, evaluation_batch(images)
    columns = "features of pictures", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    try:
        with untouched(model), transient_bar(*columns, total=len(images)) as show:
            model.eval()
            for a in range(0, len(images), size):
                model(to_input(images[a : a + size], device))
                show(min(a + size, len(images)))
    finally:
        hook.remove()
    return torch.cat(seen).numpy()


def fit_head(
    x: NDArray[np.float32],
    labels: NDArray[np.int64],
    num_classes: int,
    *,
    class_weights: NDArray[np.float64] | None = None,
    bias: bool = True,
    seed: int = 0,
    penalties: Sequence[float] = PENALTIES,
) -> Head:
    """Fit an output layer to features x (N, D) and labels (N,), to convergence.

    With z = (x − μ)/s, s one number, the root mean variance of all features, it minimises

        Σ wᵢ·crossentropy(W·zᵢ + c, yᵢ) / Σ wᵢ + λ/2·|W|²

    by L-BFGS. λ is the one with which pictures that were held out have the lowest loss, each of
    five parts in turn, of more than 4,000 pictures one part of as many; from the strongest on,
    until two in a row bring less than a hundredth.

    Args:
        class_weights: w of each class (K,); None for all alike.
        bias: whether the layer has one.
        seed: of the parts.
    """
    weight = np.ones(len(x)) if class_weights is None else class_weights[labels]
    mean = x.mean(0, dtype=np.float64) if bias else np.zeros(x.shape[1])
    spread = float(np.sqrt(np.mean(x.var(0, dtype=np.float64)))) or 1.0
    z = (x - mean) / spread
    # With fewer images than features W lies in the span of the images: a turn of the axes
    # leaves |W| as it is and N of them.
    axes = np.linalg.svd(z, full_matrices=False)[2] if len(z) < z.shape[1] else None
    inputs = np.column_stack([z if axes is None else z @ axes.T, np.full(len(x), float(bias))])
    problem = _Problem(inputs, labels, weight, num_classes)
    losses = _held_out_losses(problem, penalties, stream(seed, "head", "parts"))
    best = min(losses, key=lambda penalty: losses[penalty])
    w = np.zeros((inputs.shape[1], num_classes))
    for penalty in [p for p in losses if p >= best]:
        w = problem.minimise(penalty, w)
    weights = (w[:-1].T if axes is None else w[:-1].T @ axes) / spread
    return Head(weights, w[-1] - weights @ mean if bias else np.zeros(num_classes), best, losses)


def _held_out_losses(
    problem: "_Problem", penalties: Sequence[float], rng: np.random.Generator
) -> dict[float, float]:
    """Mean loss of pictures held out by penalty, strongest first; see `fit_head`."""
    if len(penalties) == 1:
        return {penalties[0]: 0.0}
    count = len(problem.labels)
    order = rng.permutation(count)
    part = np.where(order < MOST_FOR_FOLDS, order % min(FOLDS, count), -1)
    folds = range(1 if count > MOST_FOR_FOLDS else part.max() + 1)
    inside = [problem.chosen((part != fold) & (part >= 0)) for fold in folds]
    outside = [problem.chosen(part == fold) for fold in folds]
    fits = [problem.zeros() for _ in folds]
    losses: dict[float, float] = {}
    lowest, vain = math.inf, 0
    for penalty in penalties:
        fits = [p.minimise(penalty, w) for p, w in zip(inside, fits, strict=True)]
        losses[penalty] = float(np.mean([p.loss(w) for p, w in zip(outside, fits, strict=True)]))
        vain = 0 if losses[penalty] < 0.99 * lowest else vain + 1
        lowest = min(lowest, losses[penalty])
        if vain == 2:
            break
    return losses


@dataclass(frozen=True)
class _Problem:
    """Inputs (N, D + 1), the last a constant, labels (N,), weights (N,) and K."""

    z: NDArray[np.float64]
    labels: NDArray[np.int64]
    weight: NDArray[np.float64]
    num_classes: int

    def chosen(self, which: NDArray[np.bool_]) -> "_Problem":
        return replace(self, z=self.z[which], labels=self.labels[which], weight=self.weight[which])

    def zeros(self) -> NDArray[np.float64]:
        return np.zeros((self.z.shape[1], self.num_classes))

    def loss(self, w: NDArray[np.float64]) -> float:
        """Mean cross-entropy."""
        log_p = scipy.special.log_softmax(self.z @ w, axis=1)[
            np.arange(len(self.labels)), self.labels
        ]
        return float(-(self.weight @ log_p) / self.weight.sum())

    def minimise(self, penalty: float, start: NDArray[np.float64]) -> NDArray[np.float64]:
        """W and c (D + 1, K), begun at `start`; the last row, the constant's, is not penalised."""
        truth = np.eye(self.num_classes)[self.labels]
        share = (self.weight / self.weight.sum())[:, None]
        penalised = np.full((len(start), 1), penalty)
        penalised[-1] = 0

        def objective(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            w = flat.reshape(start.shape)
            log_p = scipy.special.log_softmax(self.z @ w, axis=1)
            loss = -(share * truth * log_p).sum() + (penalised * w * w).sum() / 2
            slope = self.z.T @ ((np.exp(log_p) - truth) * share) + penalised * w
            return float(loss), slope.ravel()

        options = {"maxiter": MAX_ITERATIONS, "gtol": 1e-5, "ftol": 1e-10}
        found = scipy.optimize.minimize(
            objective, start.ravel(), jac=True, method="L-BFGS-B", options=options
        )
        w: NDArray[np.float64] = found.x.reshape(start.shape)
        return w
