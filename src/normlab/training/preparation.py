"""What stands before the first step: a network, an optimiser, a plan, and what cannot be done."""

from dataclasses import replace
from pathlib import Path

import torch

from normlab.core.ranks import ALONE, Ranks
from normlab.data import ImageData
from normlab.data.augment import halve
from normlab.data.batches import split_images
from normlab.data.loading import PUBLIC
from normlab.errors import UserError
from normlab.models import FastNet
from normlab.runs import Task
from normlab.training import starting_points
from normlab.training.optimisers import make_optimizer
from normlab.training.state import Plan, State


def refuse_impossible(task: Task, images: ImageData) -> None:
    """Find out before a folder is made what a step of this training could not do.

    Raises:
        UserError: pictures that are not square, sizes that the network cannot take, a normaliser
            that one of its layers cannot have, or batches of a single image.
    """
    height, width, _ = images.image_shape
    if height != width:
        raise UserError(
            f"data {images.name!r} has images of {height} × {width} pixels: make them square"
        )
    recipe = task.recipe
    check_network(task)
    train, _ = split_images(images, recipe.validation)
    if recipe.norm.name == "batch" and min(recipe.batch_size, len(train)) < 2:
        raise UserError(
            f"batch_size={recipe.batch_size} with {len(train):,} training images gives batches of "
            "one, which have no variance: take two or more, or --norm none"
        )


@torch.no_grad()
def check_network(task: Task) -> None:
    """Build the network and ask it for an answer at every size that the recipe will show it.

    Raises:
        UserError: such as `instance` on a layer whose input is a vector, or images too small.
    """
    model = task.build().eval()
    x = torch.zeros(1, 3, task.image_size, task.image_size)
    model(x)
    if not task.recipe.half_size:
        return
    small = halve(x)
    try:
        model(small)
    except (UserError, RuntimeError) as e:
        raise UserError(
            f"half_size={task.recipe.half_size:g}: the network {task.recipe.model.name!r} for "
            f"{task.image_size} × {task.image_size} pixels does not take {small.shape[2]} × "
            f"{small.shape[3]} ({e}): choose half_size 0, or a network that takes any size"
        ) from None


def new_state(
    task: Task,
    images: ImageData,
    device: torch.device,
    weights: dict[str, torch.Tensor] | None = None,
) -> State:
    """The network with its initial values and its optimiser, before the first step.

    Args:
        weights: in place of the initial values, as `starting_points.starting_weights` has them.
    """
    model = task.build().to(device)
    if weights is not None:
        model.load_state_dict(weights)
    elif isinstance(model, FastNet):
        train, _ = split_images(images, task.recipe.validation)
        model.fit_to(train.images)
    if task.start is not None:
        starting_points.freeze(model, task.start)
    return State(model=model, optimizer=make_optimizer(task.recipe.optimizer, model))


def make_plan(
    task: Task,
    images: ImageData,
    threads: int,
    folder: Path | None = None,
    ranks: Ranks = ALONE,
) -> Plan:
    """Split the images and plan a training on them."""
    train, validation = split_images(images, task.recipe.validation)
    classes = "" if images.name in PUBLIC else images.summary()
    if classes and images.x_val is None and len(validation):
        share = len(validation) / (len(train) + len(validation))
        classes += f"; for validation {share:.0%} of the training images are held out"
    return Plan(
        recipe=task.recipe,
        folder=folder,
        seed=task.seed,
        threads=threads,
        train=train,
        validation=validation,
        start="" if task.start is None else str(task.start),
        classes=classes.replace("%", " %"),
        ranks=replace(ranks, piece=task.recipe.norm.images or 1),
    )
