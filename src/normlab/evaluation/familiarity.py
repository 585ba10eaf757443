"""How familiar a picture is: how like its features are to those of the nearest class.

    familiarity = maxₖ ⟨f, mₖ⟩ / (‖f‖·‖mₖ‖),    mₖ = mean of f/‖f‖ over training pictures of class k

f is what the last linear layer takes. The angle is what tells: a picture of something else often
has long features, and so a probability near 1, but they point elsewhere. `docs/doubt.md` has the
comparison with the largest probability, energy, Mahalanobis distances and nearest neighbours by
which it was chosen.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from normlab.data.batches import Split
from normlab.errors import DataError
from normlab.evaluation.forward import Images, evaluation_batch, logits, run_batches

MOST_PICTURES = 5_000  # that the features of classes are taken from


def head_of(model: nn.Module) -> nn.Linear | None:
    """The last linear layer of a network, if it has one."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return layers[-1] if layers else None


def answers_of(
    model: nn.Module, images: Images, batch_size: int | None = None
) -> tuple[Tensor, NDArray[np.float32] | None]:
    """Logits (N, K) and features (N, D) of images.

    No features where there is no linear layer, or one that takes something else than one row an
    image.
    """
    rows: list[Tensor] = []
    batch_size = evaluation_batch(images) if batch_size is None else batch_size
    with _features(model) as taken:
        run_batches(model, images, batch_size, take=lambda a, _: rows.append(logits(a[0]).cpu()))
    answers = torch.cat(rows)
    plain = all(t.ndim == 2 for t in taken) and sum(map(len, taken)) == len(answers)
    return answers, torch.cat(taken).numpy() if taken and plain else None


@contextmanager
def _features(model: nn.Module) -> Iterator[list[Tensor]]:
    taken: list[Tensor] = []

    def take(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        taken.append(inputs[0].detach().float().cpu())

    head = head_of(model)
    hook = None if head is None else head.register_forward_pre_hook(take)
    try:
        yield taken
    finally:
        if hook is not None:
            hook.remove()


def class_features(
    features: NDArray[np.floating], labels: NDArray[np.integer], num_classes: int
) -> NDArray[np.float32]:
    """mₖ/‖mₖ‖ (K, D) of features (N, D); zeros for a class without pictures."""
    rows = _unit(features)
    means = np.zeros((num_classes, features.shape[1]))
    for k in range(num_classes):
        if (labels == k).any():
            means[k] = rows[labels == k].mean(0)
    return _unit(means).astype(np.float32)


def familiarity(
    features: NDArray[np.floating], of_classes: NDArray[np.floating]
) -> NDArray[np.float64]:
    """Familiarity (N,) of features (N, D), in [−1, 1], to those of classes (K, D).

    Raises:
        DataError: the classes' features are those of another network.
    """
    if of_classes.shape[1] != features.shape[1]:
        raise DataError(
            f"features of classes are {of_classes.shape[1]} long, the network's "
            f"{features.shape[1]}: they are of another network, so train again"
        )
    nearest: NDArray[np.float64] = (_unit(features) @ of_classes.astype(np.float64).T).max(1)
    return nearest


def _unit(rows: NDArray[np.floating]) -> NDArray[np.float64]:
    length = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    unit: NDArray[np.float64] = rows / np.maximum(length, 1e-12)
    return unit


def some_of(pictures: Split) -> Split:
    """At most `MOST_PICTURES`, evenly chosen."""
    step = -(-len(pictures) // MOST_PICTURES)
    return Split(pictures.images[::step], pictures.labels[::step])
