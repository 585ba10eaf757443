"""Recipes: what to train and how, as functions that return a frozen record.

A docstring says what the recipe gives, how long it takes, on what, and the command.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from normlab.errors import UserError, nearest
from normlab.recipes.fast import fast79, fast84, fast90, fast94, fast95, fast96
from normlab.recipes.notebook import notebook, notebook_plain
from normlab.recipes.paper import paper_sigmoid
from normlab.recipes.pictures import pictures
from normlab.recipes.pretrained import pretrained
from normlab.recipes.record import SETTINGS, Augmentation, Averaging, Model, Norm, Recipe

RECIPES: dict[str, Callable[[], Recipe]] = {
    "fast79": fast79,
    "fast84": fast84,
    "fast90": fast90,
    "fast94": fast94,
    "fast95": fast95,
    "fast96": fast96,
    "notebook": notebook,
    "notebook-plain": notebook_plain,
    "paper-sigmoid": paper_sigmoid,
    "pictures": pictures,
    "pretrained": pretrained,
}
DEFAULT = "fast79"
DEFAULT_OWN = "pictures"  # for data that are not CIFAR-10


def get(recipe: str | Recipe) -> Recipe:
    """Look a recipe up by name; a `Recipe` is returned as it is.

    Raises:
        UserError: an unknown name.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES and Path(recipe).is_dir():
        raise UserError(f"{recipe!r} is a folder, no recipe: give pictures as --data {recipe}")
    if recipe not in RECIPES:
        raise UserError(f"unknown recipe {nearest(recipe, RECIPES)}")
    return RECIPES[recipe]()


def changed_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings that are not as the recipe of that name has them; none of an unknown name."""
    if recipe.name not in RECIPES:
        return {}
    plain, nothing = get(recipe.name).settings(), object()
    return {k: v for k, v in recipe.settings().items() if v != plain.get(k, nothing)}


__all__ = [
    "DEFAULT",
    "RECIPES",
    "SETTINGS",
    "Augmentation",
    "Averaging",
    "Model",
    "Norm",
    "Recipe",
    "changed_settings",
    "get",
]
