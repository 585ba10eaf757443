"""A run's held-out pictures asked once, and what they taught kept in the run's folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import scipy  # its parts load when they are first used
import torch
from numpy.typing import NDArray
from torch import nn

from normlab.core.tensors import read_tensors, write_tensors
from normlab.data import ImageData
from normlab.data.batches import Split, split_images
from normlab.errors import DataError, NonFiniteError, UserError
from normlab.evaluation.calibration import fit_temperature, proper_scores
from normlab.evaluation.doubt import NOTHING_HELD_OUT, Doubt
from normlab.evaluation.familiarity import (
    answers_of,
    class_features,
    familiarity,
    some_of,
)
from normlab.evaluation.features import cached_features
from normlab.runs import Run
from normlab.text import listed

FILE = "doubt.safetensors"
FEATURES = "class_features"

Features = NDArray[np.float32]


def learn(
    model: nn.Module, train: Split, held_out: Split, num_classes: int, weights: str
) -> tuple[Doubt, Features | None]:
    """Ask the network about its held-out pictures; it is left as it was.

    Args:
        train: whose features those of the classes are the means of.
        held_out: at least one picture; at most `familiarity.MOST_PICTURES` are taken, evenly.
        weights: the name of those that the network has.

    Returns:
        What was learnt, and the features of the classes (K, D), if the network has such.

    Raises:
        NonFiniteError: the network overflows on a held-out picture.
    """
    held_out = some_of(held_out)
    logits, features = answers_of(model, held_out.images)
    z, label = logits.double().numpy(), held_out.labels
    if not np.isfinite(z).all():
        raise NonFiniteError(
            "an answer to a held-out picture is NaN or infinite: try a lower --learning-rate"
        )
    temperature = fit_temperature(z, label)
    p = scipy.special.softmax(z / temperature, axis=1)
    means, near = None, np.empty(0)
    if features is not None:
        known = some_of(train)
        of_train = cached_features(model, known.images)  # of a body that did not learn
        if of_train is None:
            _, of_train = answers_of(model, known.images)
        assert of_train is not None
        means = class_features(of_train, known.labels, num_classes)
        near = familiarity(features, means)
    doubt = Doubt(
        weights=weights,
        temperature=temperature,
        label=tuple(label.tolist()),
        probability=tuple(p.max(1).tolist()),
        right=tuple((p.argmax(1) == label).tolist()),
        of_label=tuple(p[np.arange(len(label)), label].tolist()),
        familiarity=tuple(near.tolist()),
        before=proper_scores(z, label).as_dict(),
        after=proper_scores(z, label, temperature).as_dict(),
    )
    return doubt, means


def relearn(
    run: Run,
    on: str | Path | Mapping[str, Any] | ImageData | None = None,
    *,
    data: str | Path | Mapping[str, Any] | ImageData | None = None,
) -> Doubt:
    """Learn again from a finished run's held-out pictures, or from others, and keep it.

    Args:
        on: labelled pictures that the run never saw, all parts of them; None for those that it
            held out. Those that it was trained or is tested on are left out, by their pixels.
        data: where the run's own data are now, if not where they were.

    Raises:
        UserError: nothing was held out, nothing new is in `on`, or it has other classes.
    """
    weights, images = run.finished().get("weights", "last"), run.task.load(data)
    if images.sha256 != run.task.data_sha256:
        raise UserError(f"data {images.name!r} are not those of run {run.path}: bring those back")
    train, held_out = split_images(images, run.task.recipe.validation)
    if on is not None:
        held_out = _never_seen(run, images, run.task.load(on))
    if not len(held_out):
        raise UserError(
            f"run {run.path}: {NOTHING_HELD_OUT}; or give labelled pictures that it never saw: "
            "normlab calibrate RUN --on FOLDER"
        )
    learnt = learn(run.model(weights), train, held_out, images.num_classes, weights)
    write(run, *learnt)
    return learnt[0]


def _never_seen(run: Run, own: ImageData, other: ImageData) -> Split:
    """The pictures of `other` that are none of a run's own training or test pictures."""
    if other.class_names != own.class_names:
        raise UserError(
            f"data {other.name!r} have other classes ({listed(other.class_names)}) than run "
            f"{run.path} ({listed(own.class_names)}): give pictures of the same ones"
        )
    parts = [(other.x_train, other.y_train), (other.x_test, other.y_test)]
    if other.x_val is not None and other.y_val is not None:
        parts.append((other.x_val, other.y_val))
    seen = {p.tobytes() for part in (own.x_train, own.x_test) for p in part}
    rows = [(p, y) for x, labels in parts for p, y in zip(x, labels, strict=True)]
    new = [(p, y) for p, y in rows if p.tobytes() not in seen]
    if not new:
        raise UserError(
            f"all {len(rows):,} pictures of {other.name!r} are ones that run {run.path} was "
            "trained or is tested on: give others"
        )
    return Split(np.stack([p for p, _ in new]), np.array([y for _, y in new], np.int64))


def write(run: Run, doubt: Doubt, means: Features | None) -> None:
    """Keep it in the run's folder."""
    tensors = {} if means is None else {FEATURES: torch.from_numpy(means)}
    write_tensors(run.path / FILE, tensors, doubt.as_dict())


def read(run: Run, weights: str = "kept") -> tuple[Doubt, Features | None] | None:
    """What the run's held-out pictures taught about these weights; None if nothing did.

    Raises:
        DataError: the file is damaged, or of another network.
    """
    path = run.path / FILE
    if not path.exists():
        return None
    tensors, document = read_tensors(path)
    doubt = Doubt.from_dict(document, path)
    if doubt.weights != (run.kept if weights == "kept" else weights):
        return None
    means = tensors.get(FEATURES)
    if means is not None and (means.ndim != 2 or len(means) != len(run.task.class_names)):
        raise DataError(f"{path} is of a network with other classes: train again")
    return doubt, None if means is None else means.float().numpy()
