"""A learning curve: trainings on a quarter, a half and all of the training pictures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from normlab.api.run import Run, open_run
from normlab.api.train import resume, settle_recipe, train
from normlab.core.files import write_atomic, write_json
from normlab.core.streams import stream
from normlab.data import ImageData, load
from normlab.data.batches import split_images
from normlab.data.loading import PUBLIC, check_size
from normlab.errors import UserError
from normlab.recipes import DEFAULT_OWN, Recipe
from normlab.reports import plots
from normlab.reports.curve_figure import draw_learning_curve
from normlab.runs import create_folder
from normlab.study.learning_curve import LearningCurve, Point
from normlab.text import listed

SHARES = (0.25, 0.5, 1.0)


def learning_curve(
    recipe: str | None = None,
    *,
    data: str | Path | Mapping[str, Any] | ImageData | None = None,
    shares: Sequence[float] = SHARES,
    seeds: int = 3,
    out: str | Path | None = None,
    image_size: int | None = None,
    skip_bad: bool = False,
    group_by: str | None = None,
    threads: int | None = None,
    settings: Mapping[str, Any] | None = None,
    told: Callable[[Point], object] = lambda point: None,
) -> LearningCurve:
    """Train on parts of the training pictures, and say whether more of them would help.

    Each part is of every class alike, holds the smaller ones of its seed, and is trained on for as
    many steps as all pictures are, or up to a twentieth more, to end with a whole epoch; so
    patience ends none of them. Pictures held out and test pictures are the same for all. The test
    pictures decide nothing here, and so score every training.

    Args:
        recipe, data, image_size, skip_bad, group_by, threads, settings: as `normlab.train` takes
            them. With `group_by` a part takes up whole groups one after another.
        shares: of the training pictures, each in (0, 1], the last one 1.
        seeds: trainings of each share.
        out: a folder for the runs, the figure and `curve.json`. Runs that are there are not trained
            again, so a study that was cut off goes on.
        told: is given each training's point.

    Raises:
        UserError: shares of which no line can be drawn, too few pictures, a patience, or runs in
            `out` of other data or another recipe.
    """
    parts = sorted(set(shares))
    if len(parts) < 2 or not parts[0] > 0 or parts[-1] != 1:
        raise UserError(f"shares {list(shares)}: give two or more in (0, 1], 1 among them")
    if seeds < 1:
        raise UserError(f"seeds={seeds}: choose 1 or more")
    wanted = {"patience": None, **(settings or {})}
    if wanted["patience"] is not None:
        raise UserError(
            f"patience={wanted['patience']}: all trainings of a curve take as many steps: leave it "
            "out"
        )
    images = load(data, image_size=image_size, skip_bad=skip_bad, group_by=group_by)
    check_size(images.name, images.image_shape, image_size)
    if recipe is None and images.name not in PUBLIC:
        recipe = DEFAULT_OWN
    whole = settle_recipe(None, recipe, images, images.image_shape[0], wanted)
    folder = Path(out) if out is not None else create_folder(None, "curve")
    folder.mkdir(parents=True, exist_ok=True)
    points: list[Point] = []
    for seed in range(seeds):
        settled = whole
        for share in reversed(parts):  # all pictures first: they say how many steps
            part = _part(images, whole.validation, share, seed)
            place = folder / f"{100 * share:g}-seed{seed}"
            run = _run(place, images if share == 1 else part, seed, settled, threads)
            result = run.finished()
            if share == 1:
                settled = whole.with_settings({"least_steps": int(result["steps"])})
            total = len(images.y_test)
            right = round(result["test_accuracy"] * total)
            points.append(Point(share, len(part.y_train), seed, right, total, str(run.path)))
            told(points[-1])
    found = LearningCurve(whole.name, images.name, tuple(points))
    write_json(folder / "curve.json", found.as_dict())
    drawn = plots.safely("the learning curve", lambda: plots.png(draw_learning_curve(found)))
    if drawn is not None:
        write_atomic(folder / "curve.png", drawn)
    return found


def _run(folder: Path, images: ImageData, seed: int, recipe: Recipe, threads: int | None) -> Run:
    """The finished run in `folder`: the one that is there, gone on with if it was cut off, or new.

    Raises:
        UserError: the one that is there is of other data or another recipe.
    """
    if not (folder / "recipe.json").exists():
        return train(recipe, data=images, seed=seed, out=folder, threads=threads)
    run = open_run(folder)
    was, now = run.task.recipe.settings(), recipe.settings()
    differs = [key for key in {**was, **now} if was.get(key) != now.get(key)]
    if run.task.data_sha256 != images.sha256:
        differs.append("data")
    if differs:
        raise UserError(
            f"{folder} holds a run with other {listed(differs)}: choose another folder for --out"
        )
    return resume(folder, data=images) if run.result is None else run


def _part(images: ImageData, validation: float, share: float, seed: int) -> ImageData:
    """The data with a share of the training pictures of each class; those held out stay apart.

    Of pictures in groups it takes group after group, so that of each class one at most is cut.
    """
    learnt, held_out = split_images(images, validation)
    order = stream(seed, "learning curve").permutation(len(learnt))
    if images.groups_train is not None:  # those of a group stand together, where its first one is
        own_groups = images.groups_train[order]
        _, first, group = np.unique(own_groups, return_index=True, return_inverse=True)
        order = order[np.argsort(first[group], kind="stable")]
    kept: list[int] = []
    for k in range(images.num_classes):
        of_class = [int(i) for i in order if learnt.labels[i] == k]
        kept += of_class[: max(1, round(share * len(of_class)))] if of_class else []
    rows = np.array(sorted(kept))
    own: dict[str, Any] = {
        "x_val": held_out.images,
        "y_val": held_out.labels,
        "files_val": held_out.files,
    }
    return replace(
        images,
        x_train=np.ascontiguousarray(learnt.images[rows]),
        y_train=learnt.labels[rows],
        files_train=None if learnt.files is None else tuple(learnt.files[i] for i in rows),
        groups_train=None,  # what is held out is so already
        **(own if len(held_out) else {}),
    )
