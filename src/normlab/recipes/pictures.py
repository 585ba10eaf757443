"""For people's own pictures."""

from normlab.recipes.optimizers import Muon
from normlab.recipes.record import Augmentation, Model, Norm, Recipe
from normlab.recipes.schedules import ToZero


def pictures() -> Recipe:
    """For a folder of your own pictures: as long as they need, with what photographs vary in."""
    return Recipe(
        name="pictures",
        model=Model(name="fast", logit_scale=1 / 3),
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
    )
