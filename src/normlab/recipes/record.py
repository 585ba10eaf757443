"""The record that decides the weights: a recipe, in parts.

Every number that decides the weights stands here, but for the data and the seed. Its settings have
flat names for people (`learning_rate`), and a place in a part for code (`optimizer.learning_rate`).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from normlab.errors import UserError, nearest
from normlab.recipes.families import MODELS, NORMS
from normlab.recipes.optimizers import OPTIMIZERS, Adam, Optimizer
from normlab.recipes.schedules import SCHEDULES, Constant, Schedule, ToZero
from normlab.recipes.settings import Setting, check_settings, in_range, setting, settings_of

_SHARE = {"allowed": in_range(0, 1, high_open=True), "remedy": "choose a share in [0, 1)"}
_WHOLE = {"allowed": in_range(1, 10**9), "remedy": "choose 1 or more"}


@dataclass(frozen=True, kw_only=True)
class Model:
    """The network.

    Attributes:
        architecture: of the network `timm`: which of timm's it is.
        logit_scale: what the network's last answers are multiplied by. The fast networks take
            maxima, which are large: without 1/3 their first logits are, too, and the first steps
            go to waste.
    """

    name: str = setting("notebook", "The network.", name="model", names=tuple(MODELS))
    architecture: str | None = setting(None, "With model timm: the network's name there.")
    logit_scale: float = setting(
        1.0,
        "Factor of the network's last answers.",
        allowed=in_range(0, float("inf"), low_open=True),
        remedy="choose a finite factor above 0",
    )
    winograd: int = setting(
        2,
        "Side of the tiles of compiled convolutions: 2, or 4, with fewer products, more rounding.",
        allowed=lambda side: side in (2, 4),
        remedy="choose 2 or 4",
    )
    products: str = setting(
        "float32",
        "What compiled convolutions multiply in training; bfloat16 where the processor has it.",
        names=("float32", "bfloat16"),
    )


@dataclass(frozen=True, kw_only=True)
class Norm:
    """The normaliser in every place that has one.

    Attributes:
        position: None for where the network was designed to have it.
        momentum: m of batch normalisation, as Keras understands it: running ← m·running +
            (1 − m)·batch. It hangs together with the number of steps: a run of some hundred steps
            ends before 0.99 has forgotten its first weights.
        epsilon: ε, added to the variance.
        images: how many of a batch are normalised together; None for all of it. With several
            processes and None, the batch of all of them.
    """

    name: str = setting("batch", "The normaliser.", name="norm", names=tuple(NORMS))
    position: str | None = setting(
        None,
        "Where the normaliser stands, seen from the activation.",
        name="norm_position",
        names=("before", "after"),
    )
    momentum: float = setting(
        0.99,
        "Batch normalisation's weight of the old running statistics.",
        name="norm_momentum",
        allowed=in_range(0, 1),
        remedy="choose a share in [0, 1]",
    )
    epsilon: float = setting(
        1e-3,
        "ε of the normaliser, added to the variance.",
        name="norm_epsilon",
        allowed=in_range(0, float("inf")),
        remedy="choose a finite number, 0 or more",
    )
    images: int | None = setting(
        None,
        "Batch normalisation of so many images at a time by their own statistics.",
        name="norm_images",
        allowed=in_range(2, 10**9),
        remedy="choose 2 or more, or none for the whole batch",
    )


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How training images are changed before they are seen."""

    flip: bool = setting(False, "Mirror half of the images, the other half in the next epoch.")
    shift: int = setting(
        0,
        "Move images by up to so many pixels.",
        allowed=in_range(0, 8),
        remedy="choose 0 to 8 pixels",
    )
    crop: float = setting(
        1.0,
        "Smallest share of height and width that a random part of an image shows.",
        allowed=in_range(0.1, 1),
        remedy="choose a share in [0.1, 1]",
    )
    colour: float = setting(
        0.0,
        "Change brightness, contrast and saturation by up to this share.",
        allowed=in_range(0, 0.9),
        remedy="choose a share in [0, 0.9]",
    )
    cutout: int = setting(
        0,
        "Cover a square of so many pixels, somewhere in each image, with the image's mean colour.",
        allowed=in_range(0, 10**4),
        remedy="choose 0 pixels or more",
    )

    def told(self) -> str:
        """What is done, in words.

        >>> Augmentation(flip=True, crop=0.6).told()
        'mirrored half of the time, in parts of 60 % of height and width or more'
        """
        done = [
            "mirrored half of the time" if self.flip else "never mirrored",
            f"moved by up to {self.shift} pixels" if self.shift else "",
            f"in parts of {self.crop:.0%} of height and width or more" if self.crop < 1 else "",
            f"colours ± {self.colour:.0%}" if self.colour else "",
            f"a square of {self.cutout} pixels covered" if self.cutout else "",
        ]
        return ", ".join(filter(None, done)).replace("%", " %")


# Augmentations by name; each says what it is for and does.
AUGMENTS: dict[str, dict[str, Any]] = {
    "none": {"flip": False, "shift": 0, "crop": 1.0, "colour": 0.0, "cutout": 0},
    # What means something else in a mirror: digits, letters, hand signs.
    "symbols": {"flip": False, "shift": 0, "crop": 0.8, "colour": 0.2, "cutout": 0},
    # What a camera varies: mirror images, parts of 60 % and more, light and colour.
    "photos": {"flip": True, "shift": 0, "crop": 0.6, "colour": 0.2, "cutout": 0},
    # Very few pictures, or long trainings: smaller parts, more colour.
    "strong": {"flip": True, "shift": 0, "crop": 0.4, "colour": 0.4, "cutout": 0},
}


@dataclass(frozen=True, kw_only=True)
class Averaging:
    """An average of the weights over the steps, scored and kept in place of the last ones."""

    decay: float = setting(
        0.0,
        "Score and keep averaged weights; their decay a step, such as 0.999.",
        name="ema",
        allowed=in_range(0, 1, high_open=True),
        remedy="choose a decay in [0, 1), such as 0.999",
    )


MOST_EPOCHS = 30  # of a training whose length follows from `least_steps`
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")  # a part of a folder's name, too
# The kinds that each part comes in. Of several kinds each has settings of its own.
PARTS: dict[str, Mapping[str, type[Any]]] = {
    "model": {"": Model},
    "norm": {"": Norm},
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "augmentation": {"": Augmentation},
    "averaging": {"": Averaging},
}
# Settings that hang together with a network's design: changing the network changes them, too.
ORDINARY: dict[str, Any] = {"logit_scale": 1.0, "norm_momentum": 0.99}
USUAL: dict[str, dict[str, Any]] = {
    name: {"logit_scale": 1 / 3, "norm_momentum": 0.6}
    for name in (
        *("fast", "fast-deep", "fast-deeper"),
        *("fast-wide", "fast-wider", "fast-widest", "fast-huge"),
    )
}
USUAL["timm"] = {"logit_scale": 1.0, "norm_momentum": 0.9}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the weights, but for the data and the seed.

    Attributes:
        name: of the recipe function.
        head: `fitted` fits a new output layer to the features of the network that the training
            starts from, by a penalised logistic regression, before the first step.
        epochs: passes over the training images; 0, with a fitted head, for none.
        least_steps: on small data more passes over the images follow, until there are so many
            steps; 0 for none. Whoever sets `epochs` gets so many and no more.
        balance: `weights` weighs an image of class k by √(N/(K·N_k)), scaled to a mean of 1;
            `sampling` shows it so much more often instead; `auto` is `weights` where the largest
            class has three times the smallest's images, or more.
        half_size: share of the steps, the first ones, at half the images' height and width.
        validation: share of the training images, the last ones, held out; 0 for none.
        patience: stop after so many epochs without a lower validation loss; None for never.
            Fewer than 10 validation images end no training, and no epoch counts before a falling
            rate is down to half.

    Raises:
        UserError: a value out of its range, or an unknown name.
    """

    name: str
    model: Model = field(default_factory=Model)
    norm: Norm = field(default_factory=Norm)
    optimizer: Optimizer = field(default_factory=Adam)
    schedule: Schedule = field(default_factory=Constant)
    augmentation: Augmentation = field(default_factory=Augmentation)
    averaging: Averaging = field(default_factory=Averaging)
    head: str = setting(
        "new",
        "With --from: a new output layer begins from the seed, or fitted to the features.",
        names=("new", "fitted"),
    )
    epochs: int = setting(
        25,
        "Passes over the training images; 0 for none behind a fitted head.",
        allowed=in_range(0, 10**9),
        remedy="choose 1 or more; 0 with a fitted head",
    )
    least_steps: int = setting(
        0,
        "On small data, train for at least so many steps, whatever the epochs.",
        allowed=in_range(0, 10**9),
        remedy="choose 0 or more",
    )
    batch_size: int = setting(32, "Images a step.", **_WHOLE)
    label_smoothing: float = setting(
        0.0, "Share of the target that is spread evenly over all classes.", **_SHARE
    )
    balance: str = setting(
        "none",
        "Count rare classes more in the loss, or show them more often; auto counts them more where "
        "one has a third of another's images.",
        names=("none", "weights", "sampling", "auto"),
    )
    half_size: float = setting(
        0.0,
        "Share of the steps, the first ones, at half the images' size.",
        allowed=in_range(0, 1),
        remedy="choose a share in [0, 1]",
    )
    validation: float = setting(
        0.1, "Share of the training images, the last ones, to hold out.", **_SHARE
    )
    patience: int | None = setting(
        None, "Stop after so many epochs without a better val_loss.", **_WHOLE
    )

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise UserError(f"recipe name {self.name!r}: choose letters, digits and . _ + - only")
        for part in (self, *self._parts().values()):
            check_settings(part)
        if self.learns_nothing and self.head != "fitted":
            raise UserError("epochs=0: choose 1 or more; 0 is for a fitted head")
        if self.model.architecture is not None and self.model.name != "timm":
            raise UserError(
                f"architecture={self.model.architecture}: it is for model timm, not for "
                f"{self.model.name}: leave it out"
            )
        if self.patience is not None and self.validation == 0:
            raise UserError(f"patience={self.patience}: it needs --validation above 0")

    def length(self, batches: int) -> tuple[int, int]:
        """Epochs of a training, and steps of an epoch.

        An epoch is one pass over the training images. Where `least_steps` asks for more passes than
        `epochs` has, it may be another number of steps: of a hundred images a pass is over in a
        moment, and each epoch costs a validation and a write to the disk.

        Args:
            batches: of a pass.
        """
        least, passes = self.least_steps, -(-self.least_steps // batches)
        if passes <= self.epochs:
            return self.epochs, batches
        if passes <= MOST_EPOCHS and passes * batches <= 1.05 * least:
            return passes, batches
        each = -(-least // min(passes, MOST_EPOCHS))
        return -(-least // each), each

    @property
    def learns_nothing(self) -> bool:
        """Whether no step follows the fit of the output layer."""
        return self.epochs == 0 and self.least_steps == 0

    def _parts(self) -> dict[str, Any]:
        return {part: getattr(self, part) for part in PARTS}

    def settings(self) -> dict[str, Any]:
        """Every setting of this recipe by its flat name; those of other kinds of a part are not."""
        values: dict[str, Any] = {}
        for part, held in self._parts().items():
            if len(PARTS[part]) > 1:
                values[part] = held.name
            values |= {s.name: getattr(held, key) for key, s in settings_of(type(held)).items()}
        return values | {key: getattr(self, key) for key in settings_of(Recipe)}

    def override(self, **changes: Any) -> "Recipe":
        """Return this recipe with the given settings replaced; None leaves one as it is.

        Raises:
            UserError: as `with_settings`.
        """
        return self.with_settings({k: v for k, v in changes.items() if v is not None})

    def with_settings(self, changes: Mapping[str, Any]) -> "Recipe":
        """Return this recipe with settings replaced, by their flat names.

        A part that becomes another kind keeps the settings that both kinds have. Another network
        brings the settings that hang together with its design, unless `changes` name them.
        `augment` stands for the settings of that name in `AUGMENTS`.

        Raises:
            UserError: an unknown setting, one that the chosen kind of a part does not have, or a
                value out of its range.
        """
        for key in changes:
            if key not in SETTINGS:
                raise UserError(f"unknown recipe setting {nearest(key, SETTINGS)}")
        if (augment := changes.get("augment")) is not None:
            SETTINGS["augment"].check(augment)
            changes = {**AUGMENTS[augment], **changes}
        if "epochs" in changes:
            changes = {"least_steps": 0, **changes}
        if changes.get("validation") == 0:
            changes = {"patience": None, **changes}
        model = changes.get("model", self.model.name)
        if model != self.model.name:
            changes = {**USUAL.get(model, ORDINARY), **changes}
        parts = {part: _changed(part, held, changes) for part, held in self._parts().items()}
        return replace(
            self, **parts, **{k: v for k, v in changes.items() if k in settings_of(Recipe)}
        )

    def as_dict(self) -> dict[str, Any]:
        """The record as nested JSON."""
        values = asdict(self)
        for part, held in self._parts().items():
            if len(PARTS[part]) > 1:
                values[part] = {"name": held.name, **values[part]}
        return values

    @classmethod
    def from_dict(cls, values: Any) -> "Recipe":
        """Read what `as_dict` writes, or wrote in any release before.

        Raises:
            UserError: no recipe, an unknown key or a value out of its range.
        """
        if not isinstance(values, dict) or not isinstance(values.get("name"), str):
            raise UserError("this recipe has no name: it is not one that normlab wrote")
        flat: dict[str, Any] = {}
        for key, value in values.items():
            if key in PARTS and isinstance(value, dict):
                flat |= _flat(key, value)
            elif key != "name":
                flat[key] = value
        if isinstance(values.get("optimizer"), str) and values["optimizer"] != "muon":
            flat.pop("sgd_rate", None)  # before 0.2 it stood in every recipe
        return cls(name=values["name"]).with_settings(flat)


def _changed(part: str, held: Any, changes: Mapping[str, Any]) -> Any:
    """A part of a recipe with the changes that concern it."""
    kinds, kind = PARTS[part], type(held)
    if len(kinds) > 1 and part in changes:
        if changes[part] not in kinds:
            raise UserError(f"unknown {part} {nearest(str(changes[part]), kinds)}")
        kind = kinds[changes[part]]
    declared = settings_of(kind)
    mine = {s.name for s in declared.values()}
    for other in kinds.values():
        for s in settings_of(other).values():
            if s.name in changes and s.name not in mine:
                raise UserError(
                    f"{s.name}={changes[s.name]}: {kind.name} has no such setting: leave it out, "
                    f"or choose another {part}"
                )
    shared = {key: getattr(held, key) for key in declared if key in settings_of(type(held))}
    return kind(**shared | {k: changes[s.name] for k, s in declared.items() if s.name in changes})


def _flat(part: str, values: dict[str, Any]) -> dict[str, Any]:
    """The settings in a part's JSON by their flat names; unknown keys keep their place's name."""
    names: dict[str, str] = {"name": part} if len(PARTS[part]) > 1 else {}
    for kind in PARTS[part].values():
        names |= {key: s.name for key, s in settings_of(kind).items()}
    if part == "schedule" and values.get("name") == ToZero.name and values.get("end") == 0:
        values = {key: value for key, value in values.items() if key != "end"}
    return {names.get(key, f"{part}.{key}"): value for key, value in values.items()}


def _all_settings() -> Iterator[Setting]:
    for part, kinds in PARTS.items():
        if len(kinds) > 1:
            yield Setting(
                name=part,
                kind=str,
                optional=False,
                help=f"The {part.replace('optimizer', 'optimiser')}.",
                names=tuple(kinds),
                allowed=lambda value: True,
                remedy="",
            )
        for kind in kinds.values():
            yield from settings_of(kind).values()
    yield Setting(
        name="augment",
        kind=str,
        optional=False,
        help="How pictures are varied; symbols are not mirrored, strong is for very few pictures.",
        names=tuple(AUGMENTS),
        allowed=lambda value: True,
        remedy="",
    )
    yield from settings_of(Recipe).values()


# Every setting that a recipe may have, by its flat name.
SETTINGS: dict[str, Setting] = {s.name: s for s in _all_settings()}
