"""For people's own pictures."""

import re
from collections.abc import Container, Iterable
from typing import Any

from normlab.recipes.optimizers import Muon
from normlab.recipes.record import Augmentation, Model, Norm, Recipe
from normlab.recipes.schedules import ToZero

# Networks by the largest size of pictures that each is for: deeper ones for larger pictures.
NETWORKS = {40: "fast", 80: "fast-deep", 10**9: "fast-deeper"}

# Names of classes that a mirror may turn into others: numbers, single letters, left and right.
_SIDED = re.compile(r"\d+|[^\W\d_]|(.*[\W_])?(left|right)([\W_].*)?", re.IGNORECASE)


def pictures() -> Recipe:
    """For a folder of your own pictures: as long as they need, with what photographs vary in.

    The network and mirror images are chosen by the pictures; see `fitted`.
    """
    return Recipe(
        name="pictures",
        model=Model(name="fast", logit_scale=1 / 3, winograd=4),
        norm=Norm(momentum=0.6),
        epochs=10,
        least_steps=1500,
        batch_size=64,
        optimizer=Muon(learning_rate=0.1, sgd_rate=0.2),
        schedule=ToZero(start=0.2, peak=0.23),
        label_smoothing=0.1,
        balance="auto",
        augmentation=Augmentation(flip=True, crop=0.6, colour=0.2),
        half_size=0.4,
        validation=0.1,
        patience=5,
    )


def fitted(
    class_names: Iterable[str], image_size: int, given: Container[str], from_run: bool
) -> dict[str, Any]:
    """The settings of `pictures` that follow from the pictures.

    - `model`: the network for pictures of this size.
    - `augment`: `symbols` where a class's name is a number, a single letter, or has left or right
      in it. A mirrored 2 is no 2, and a mirrored left hand is a right one.

    Args:
        given: settings that somebody chose.
        from_run: whether the network is that of a run.
    """
    found = {}
    if not from_run:
        found["model"] = next(n for largest, n in NETWORKS.items() if image_size <= largest)
    if "augment" not in given and any(_SIDED.fullmatch(name) for name in class_names):
        found["augment"] = "symbols"
    return found
