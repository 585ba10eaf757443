"""Recipes: what to train and how, as functions that return a frozen dataclass.

A docstring says what the recipe gives, how long it takes, on what, and the command.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from normlab.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the weights, but for the data and the seed.

    Attributes:
        name: of the recipe function.
        model: which network, a name in `normlab.models.MODELS`.
        norm: which normaliser, a name in `normlab.layers.NORMS`.
        epochs: passes over the training images.
        batch_size: images a step.
        optimizer: `adam`, `sgd`, or `muon`, which is for convolutions (see
            `normlab.training.optimisers`).
        learning_rate: of the optimiser; with `muon`, of the convolutions' kernels.
        sgd_rate: with `muon`, the learning rate of dense weights; biases have eight times that.
        schedule: of the learning rate, `constant`, `triangle` or `to_zero`; see `optim.SCHEDULES`.
        label_smoothing: share of the target that is spread evenly over all classes.
        flip: mirror half of the training images, the other half in the next epoch.
        shift: move training images by up to so many pixels.
        half_size: share of the steps, the first ones, at half the images' height and width.
        ema: decay a step of averaged weights, such as 0.999; these are scored and kept, with
            population statistics; 0 for none.
        norm_position: of the normaliser, `before` or `after` the activation; None for where the
            network was designed to have it.
        validation: share of the training images, the last ones, held out; 0 for none.
        patience: stop after so many epochs without a lower validation loss; None for never.

    Raises:
        UserError: a value out of its range.
    """

    name: str
    model: str = "notebook"
    norm: str = "batch"
    epochs: int = 25
    batch_size: int = 32
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    sgd_rate: float = 0.37
    schedule: str = "constant"
    label_smoothing: float = 0.0
    flip: bool = False
    shift: int = 0
    half_size: float = 0.0
    ema: float = 0.0
    norm_position: str | None = None
    validation: float = 0.1
    patience: int | None = None

    def __post_init__(self) -> None:
        _check(self.epochs >= 1, "epochs", self.epochs, "train for at least 1")
        _check(self.batch_size >= 1, "batch_size", self.batch_size, "choose 1 or more")
        _check(
            self.optimizer in ("adam", "sgd", "muon"),
            "optimizer",
            self.optimizer,
            "choose adam, sgd or muon",
        )
        _check(
            self.schedule in ("constant", "triangle", "to_zero"),
            "schedule",
            self.schedule,
            "choose constant, triangle or to_zero",
        )
        _check(
            0 < self.learning_rate < math.inf,
            "learning_rate",
            self.learning_rate,
            "choose a number above 0",
        )
        _check(
            0 < self.sgd_rate < math.inf,
            "sgd_rate",
            self.sgd_rate,
            "choose a number above 0",
        )
        _check(
            0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "choose 0 to 1"
        )
        _check(0 <= self.shift <= 8, "shift", self.shift, "choose 0 to 8 pixels")
        _check(0 <= self.half_size <= 1, "half_size", self.half_size, "choose a share in [0, 1]")
        _check(0 <= self.ema < 1, "ema", self.ema, "choose a decay in [0, 1), such as 0.999")
        _check(
            self.norm_position in (None, "before", "after"),
            "norm_position",
            self.norm_position,
            "choose before or after (the activation)",
        )
        _check(0 <= self.validation < 1, "validation", self.validation, "choose a share in [0, 1)")
        if self.patience is not None:
            _check(self.patience >= 1, "patience", self.patience, "choose 1 or more")
            _check(self.validation > 0, "patience", self.patience, "it needs --validation above 0")

    def override(self, **changes: Any) -> "Recipe":
        """Return this recipe with the given fields replaced; None leaves a field as it is.

        Raises:
            UserError: a field that recipes do not have, or a value out of its range.
        """
        known = [f.name for f in fields(self)]
        for key in changes:
            if key not in known:
                raise UserError(f"unknown recipe setting {key!r}: choose from {', '.join(known)}")
        return replace(self, **{k: v for k, v in changes.items() if v is not None})

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Recipe":
        """Read what `as_dict` wrote.

        Raises:
            UserError: a missing name, an unknown key or a value out of its range.
        """
        if not isinstance(values, dict) or not isinstance(values.get("name"), str):
            raise UserError("this recipe has no name: it is not one that normlab wrote")
        return cls(name=values["name"]).override(**values)


def _check(ok: bool, field: str, value: object, remedy: str) -> None:
    if not ok:
        raise UserError(f"{field}={value}: {remedy}")


def notebook() -> Recipe:
    """The seed notebook as its author wrote it: 25 epochs of Adam in batches of 32."""
    return Recipe(name="notebook")


def notebook_plain() -> Recipe:
    """The notebook's twin without batch normalisation; the same as `notebook --norm none`."""
    return replace(notebook(), norm="none")


def fast79() -> Recipe:
    """The notebook's accuracy from one look at each picture, well under a minute on two cores.

    Test accuracy 0.7973 ± 0.0026 (standard deviation over seeds; lowest 0.7940), n = 10, one view
    of each picture, 0.8077 with the mirrored view as well; 10.4 s (10.0 to 10.6) with two threads;
    at most 1.2 GiB. All 50,000 images, the first 30 % of the steps at 16 × 16 pixels. Intel Xeon, 2
    cores, AVX-512, compiled kernels, PyTorch 2.13.0, Python 3.11.7. Without compiled kernels 1.46
    times as long, and 0.7965 ± 0.0026, n = 10. The untuned twin, `--norm none`: 0.6138 ±
    0.0254, n = 10, 8.0 s.

        python -m benchmarks.headline fast79 --seeds 10 --threads 2
    """
    return Recipe(
        name="fast79",
        model="fast",
        epochs=1,
        batch_size=200,
        optimizer="muon",
        learning_rate=0.15,
        sgd_rate=0.37,
        schedule="triangle",
        label_smoothing=0.1,
        flip=True,
        half_size=0.3,
        validation=0.0,
    )


def fast84() -> Recipe:
    """The same network with four looks at each picture, the first half of them at half size.

    Test accuracy 0.8471 ± 0.0025 (standard deviation over seeds; lowest 0.8432), n = 10, one view
    of each picture, 0.8575 with the mirrored view as well; 31.9 s (31.2 to 32.6) with two threads;
    Intel Xeon, 2 cores, AVX-512, compiled kernels, PyTorch 2.13.0, Python 3.11.7. Without compiled
    kernels 46.9 s and 0.8466 ± 0.0024, n = 5. The untuned twin, `--norm none`:
    0.8033 ± 0.0101, n = 10, 25.2 s.

        python -m benchmarks.headline fast84 --seeds 10 --threads 2
    """
    return replace(
        fast79(), name="fast84", epochs=4, batch_size=250, schedule="to_zero", half_size=0.5
    )


def fast90() -> Recipe:
    """Six convolutions of 32 to 128 channels, nine looks at each picture, moved by up to 2 pixels.

    Test accuracy 0.9058 ± 0.0022 (standard deviation over seeds; lowest 0.9029), n = 5, one view
    of each picture, 0.9138 with the mirrored view as well; 171.8 s (169.7 to 175.1) with two
    threads; Intel Xeon, 2 cores, AVX-512, compiled kernels, PyTorch 2.13.0, Python 3.11.7.

        python -m benchmarks.headline fast90 --seeds 5 --threads 2
    """
    return replace(
        fast84(),
        name="fast90",
        model="fast-wide",
        epochs=9,
        learning_rate=0.1,
        half_size=0.4,
        shift=2,
    )


def fast94() -> Recipe:
    """Six convolutions of 64 to 256 channels, sixteen looks at each picture, at a lower rate.

    Test accuracy 0.9424 ± 0.0008 (standard deviation over seeds; lowest 0.9415), n = 3, by the mean
    over six views of each picture, mirrored and moved (`evaluate --views shift`, 34 s for 10,000);
    0.9349 ± 0.0004 by one view, 0.9411 with the mirrored one as well. 1129 s (1032 to 1143) with
    two threads; at most 1.4 GiB, the views included. Intel Xeon, 2 cores, AVX-512, compiled
    kernels, PyTorch 2.13.0, Python 3.11.7.

        python -m benchmarks.headline fast94 --seeds 3 --threads 2
    """
    return replace(fast90(), name="fast94", model="fast-wider", epochs=16, learning_rate=0.06)


def paper_sigmoid() -> Recipe:
    """Figure 1 of the batch normalisation paper: 3 × 100 sigmoids, batches of 60, 50,400 steps."""
    return Recipe(
        name="paper-sigmoid",
        model="sigmoid",
        epochs=56,
        batch_size=60,
        optimizer="sgd",
        learning_rate=0.1,
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "fast79": fast79,
    "fast84": fast84,
    "fast90": fast90,
    "fast94": fast94,
    "notebook": notebook,
    "notebook-plain": notebook_plain,
    "paper-sigmoid": paper_sigmoid,
}
DEFAULT = "fast79"


def get(recipe: str | Recipe) -> Recipe:
    """Look a recipe up by name; a `Recipe` is returned as it is.

    Raises:
        UserError: an unknown name.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        raise UserError(f"unknown recipe {recipe!r}: choose one of {', '.join(RECIPES)}")
    return RECIPES[recipe]()
