"""Recipes: what to train and how, as functions that return a frozen dataclass.

A docstring says what the recipe gives, how long it takes, on what, and the command.
"""

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
        optimizer: `adam` or `sgd`.
        learning_rate: of the optimiser.
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
    validation: float = 0.1
    patience: int | None = None

    def __post_init__(self) -> None:
        _check(self.epochs >= 1, "epochs", self.epochs, "train for at least 1")
        _check(self.batch_size >= 1, "batch_size", self.batch_size, "choose 1 or more")
        _check(self.learning_rate > 0, "learning_rate", self.learning_rate, "choose more than 0")
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
        if not isinstance(values.get("name"), str):
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


def notebook_short() -> Recipe:
    """The notebook's network for 3 epochs: a first look in about a minute or two."""
    return replace(notebook(), name="notebook-short", epochs=3)


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
    "notebook": notebook,
    "notebook-plain": notebook_plain,
    "notebook-short": notebook_short,
    "paper-sigmoid": paper_sigmoid,
}
DEFAULT = "notebook-short"


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
