"""For a network that was pretrained elsewhere, on ImageNet as a rule."""

from normlab.recipes.optimizers import Adam
from normlab.recipes.record import Augmentation, Model, Norm, Recipe
from normlab.recipes.schedules import ToZero


def pretrained() -> Recipe:
    """For --from NAME|FILE, a network of timm: its body frozen, a new output layer fitted.

    With `epochs` the whole network learns on from there, at a low rate, and the best weights are
    kept.
    """
    return Recipe(
        name="pretrained",
        model=Model(name="timm"),
        norm=Norm(momentum=0.9),
        head="fitted",
        epochs=0,
        batch_size=32,
        # A rate for weights that are good already: tenfold destroys more than it teaches.
        optimizer=Adam(learning_rate=1e-4),
        schedule=ToZero(start=0.2, peak=0.23),
        balance="auto",
        augmentation=Augmentation(flip=True, crop=0.6, colour=0.2),
        validation=0.1,
    )
