"""Experiments of the batch normalisation paper."""

from normlab.recipes.optimizers import SGD
from normlab.recipes.record import Model, Recipe


def paper_sigmoid() -> Recipe:
    """Figure 1 of the batch normalisation paper: 3 × 100 sigmoids, batches of 60.

    On MNIST, as in the paper, 50,400 steps; docs/inspect.md has the commands and what came out.
    """
    return Recipe(
        name="paper-sigmoid",
        model=Model(name="sigmoid"),
        epochs=56,
        batch_size=60,
        optimizer=SGD(learning_rate=0.1),
    )
