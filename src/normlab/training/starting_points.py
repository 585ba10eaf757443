"""Start from a trained network: its body, an output layer, and a say in what may still move.

The network is a run's, or one that was pretrained elsewhere (`normlab.training.pretrained`).

The body is everything but the output layer. Its normalisation statistics are

    keep         the source's to the end; the normalisers are frozen, γ and β with them
    adapt        moved on from the source's by the batches, as in any training
    recalibrate  taken from all training images before the first step, then as in `keep`

A network whose normalisers are fixed is an ordinary one with affine maps in their places; what
the new pictures do to its statistics is then known before the first step (He et al. 2016,
arXiv 1512.03385, fix them for detection; Li et al. 2016, arXiv 1603.04779, recompute them).
"""

from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normlab import recipes
from normlab.core.tensors import digest, read_tensors, write_tensors
from normlab.data.batches import Split, split_images
from normlab.data.images import ImageData
from normlab.errors import DataError, UserError
from normlab.evaluation.features import Head, features, fit_head
from normlab.evaluation.forward import normalizers
from normlab.evaluation.population import population_moments, set_statistics
from normlab.layers import BatchNorm
from normlab.models.timm_net import TimmNet
from normlab.recipes import Recipe
from normlab.runs import STATISTICS, Run, Start, Task, open_run
from normlab.training.pretrained import Pretrained, open_pretrained
from normlab.training.state import class_weights

START = "start.safetensors"
BUILTIN = "builtin"  # a run on CIFAR-10 that comes with this package


def open_source(
    start: str | Path | Run | None, *, freeze: bool = False, statistics: str | None = None
) -> Run | None:
    """The run to start from, if there is one, and the choices that go with it checked.

    Raises:
        UserError: an unfinished or damaged run, other `statistics` than there are or none in the
            network to speak of, or choices without a run.
    """
    if start is None:
        for name, given in (("freeze", freeze), ("statistics", statistics)):
            if given:
                raise UserError(
                    f"{name}={given!r}: it is about a run to start from: name one, --from"
                )
        return None
    run = start if isinstance(start, Run) else _open(start)
    model = run.model()
    if statistics not in (None, *STATISTICS):
        raise UserError(f"statistics={statistics!r}: choose one of {', '.join(STATISTICS)}")
    if statistics is not None and not normalizers(model):
        raise UserError(
            f"statistics={statistics!r}: run {run.path} has no batch normalisation: leave them out"
        )
    return run


def _open(start: str | Path) -> Run:
    if start == BUILTIN:
        return open_run(_builtin())
    return open_run(start) if Path(start).is_dir() else open_pretrained(start)


def _builtin() -> Path:
    return Path(str(resources.files("normlab") / BUILTIN))


def choose_recipe(run: Run | None, recipe: str | Recipe | None, changes: dict[str, Any]) -> Recipe:
    """The recipe with its changes; to start from `run`, with that run's normaliser.

    Args:
        recipe: None for that of `run`, or for the default one.

    Raises:
        UserError: the recipe, or a change to it, is for another network or normaliser.
    """
    if run is None:
        named = recipes.get(recipes.DEFAULT if recipe is None else recipe).with_settings(changes)
        if named.head == "fitted":
            raise UserError(
                f"recipe {named.name!r} fits an output layer to a trained network: name one, "
                "--from NAME, --from FILE or --from RUN"
            )
        return named
    theirs = run.task.recipe
    chosen = theirs if recipe is None else recipes.get(recipe)
    if chosen.model.name == theirs.model.name:  # of timm's networks this says which
        own = replace(chosen.model, architecture=theirs.model.architecture)
        chosen = replace(chosen, model=own)
    chosen = chosen.with_settings(changes)
    if chosen.model.name != theirs.model.name:
        raise UserError(
            f"recipe {chosen.name!r} trains the network {chosen.model.name!r}, "
            f"run {run.path} holds {theirs.model.name!r}: name a recipe for that network, "
            "or none for the run's own"
        )
    fixed = theirs.settings()
    for key in ("norm", "norm_position", "norm_epsilon", "architecture"):
        if changes.get(key, fixed[key]) != fixed[key]:
            raise UserError(
                f"{key}={changes[key]!r}: run {run.path} has {fixed[key]!r}, which "
                "cannot be changed in a trained network: leave it out"
            )
    free = {"norm_momentum": "momentum", "norm_images": "images"}  # no weight depends on these
    kept = {name: getattr(chosen.norm, name) for key, name in free.items() if key in changes}
    return replace(chosen, norm=replace(theirs.norm, **kept))


def size_of(run: Run | None) -> int | None:
    """The image size to go on with: that of `run`; None, to let the data decide, for the body that
    comes with this package, which takes any.
    """
    return None if run is None or run.path == _builtin() else run.task.image_size


def suits(run: Run | None, recipe: str) -> bool:
    """Whether a recipe trains the network of `run`; any does, to begin from a seed."""
    return run is None or recipes.get(recipe).model.name == run.task.recipe.model.name


def plan_start(
    run: Run | None,
    recipe: Recipe,
    class_names: tuple[str, ...],
    *,
    freeze: bool,
    statistics: str | None,
) -> Start | None:
    """Say how a training on classes `class_names` begins; None for: from its seed.

    Args:
        freeze: let the output layer alone learn.
        statistics: `keep`, `adapt` or `recalibrate`; None for `keep` when frozen or when the
            network comes from elsewhere, else `adapt`.
    """
    if run is None:
        return None
    if recipe.learns_nothing and statistics == "adapt":
        raise UserError("statistics='adapt': no step follows in which they could: add --epochs")
    theirs = run.task.start
    origin = None if theirs is None else theirs.origin
    if isinstance(run, Pretrained):
        origin = run.origin
    same = sorted(class_names) == sorted(run.task.class_names)  # whatever their order
    return Start(
        run=BUILTIN if run.path == _builtin() else str(run.path),
        weights_sha256=digest(run.model().state_dict()),
        head="fitted" if recipe.head == "fitted" else "kept" if same else "new",
        freeze=freeze or recipe.learns_nothing,
        statistics=statistics or ("keep" if freeze or origin else "adapt"),
        origin=origin,
    )


def begin(run: Run | None, task: Task, images: ImageData) -> tuple[Task, dict[str, Tensor] | None]:
    """What `task` begins with: the body of `run` and an output layer; None to begin from its seed.

    A kept output layer is the run's, its rows in the new order of the classes; a new one is fresh
    from the task's seed; a fitted one is the best for the body's features of the training images.

    Returns:
        The task, which now tells the penalty of a fitted layer, and the weights.

    Raises:
        UserError: the run's network is for images of another size.
        DataError: its weights are others than those that `task` is to start from.
    """
    if run is None or task.start is None:
        return task, None
    model, state = task.build(), run.model().state_dict()
    if digest(state) != task.start.weights_sha256:
        raise DataError(
            f"the weights of {run.path} are others than when a training from them was planned: "
            "put those back, or begin anew with another --out"
        )
    fresh, body = model.state_dict(), {k: t for k, t in state.items() if _in_body(k)}
    if any(fresh[k].shape != t.shape for k, t in body.items()):
        raise UserError(
            f"images of {task.image_size} × {task.image_size} pixels: the network of run "
            f"{run.path} is for {run.task.image_size} × {run.task.image_size}; for pictures give "
            f"--image-size {run.task.image_size}"
        )
    if task.start.head == "kept":
        rows = torch.tensor([run.task.class_names.index(name) for name in task.class_names])
        fresh |= {k: t[rows] for k, t in state.items() if not _in_body(k)}
    model.load_state_dict(fresh | body)
    train, _ = split_images(images, task.recipe.validation)
    if task.start.statistics == "recalibrate":
        set_statistics(model, population_moments(model, train.images))
    if task.start.head == "fitted":
        head = _fit(model, train, task)
        task = replace(task, start=replace(task.start, penalty=head.penalty))
    return task, model.state_dict()


@torch.no_grad()
def _fit(model: nn.Module, train: Split, task: Task) -> Head:
    """Fit the output layer of `model` to the training images."""
    output: nn.Linear = model.get_submodule("output")  # type: ignore[assignment]
    weights = class_weights(train, task.recipe.balance)
    head = fit_head(
        features(model, train.images),
        train.labels,
        len(task.class_names),
        class_weights=weights,
        bias=output.bias is not None,
        seed=task.seed,
    )
    scale = task.recipe.model.logit_scale
    output.weight.copy_(torch.from_numpy(head.weights) / scale)
    if output.bias is not None:
        output.bias.copy_(torch.from_numpy(head.bias) / scale)
    return head


def _in_body(key: str) -> bool:
    """Whether a parameter or statistic belongs to any other layer than the last."""
    return not key.startswith("output.")


def freeze(model: nn.Module, start: Start) -> None:
    """Hold still what `start` says: the body's weights, its normalisers, both or nothing."""
    if start.freeze:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not _in_body(name))
    if start.statistics != "adapt":
        if isinstance(model, TimmNet):
            model.freeze()
        for layer in normalizers(model).values():
            if isinstance(layer, BatchNorm):
                layer.freeze()


def write_start(folder: Path, task: Task, weights: dict[str, Tensor] | None) -> None:
    """Keep what the first step begins with, so that a resumed run needs its source no more."""
    if weights is not None:
        write_tensors(folder / START, weights, task.as_dict()["start"])


def read_start(folder: Path, task: Task) -> dict[str, Tensor] | None:
    """What `write_start` wrote; None for a task that starts from its seed.

    Raises:
        DataError: it is missing or damaged, or belongs to another start.
    """
    if task.start is None:
        return None
    weights, document = read_tensors(folder / START)
    if document != task.as_dict()["start"]:
        raise DataError(
            f"{folder / START} belongs to another start than {folder / 'recipe.json'} tells of, "
            f"which is {task.start}: train again, with a new --out"
        )
    return weights


def remove_start(folder: Path) -> None:
    """Remove what a finished run needs no more."""
    (folder / START).unlink(missing_ok=True)
