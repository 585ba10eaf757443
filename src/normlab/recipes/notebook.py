"""The seed notebook's training, and its twin."""

from normlab.recipes.record import Recipe


def notebook() -> Recipe:
    """The seed notebook as its author wrote it: 25 epochs of Adam in batches of 32."""
    return Recipe(name="notebook")


def notebook_plain() -> Recipe:
    """The notebook's twin without batch normalisation; the same as `notebook --norm none`."""
    return notebook().override(norm="none")
