"""A learning curve: trainings on a quarter, a half and all of the training pictures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from normlab.api.run import Run, open_run
from normlab.api.train import train
from normlab.core.files import write_atomic, write_json
from normlab.core.streams import stream
from normlab.data import ImageData, load
from normlab.data.batches import split_images
from normlab.errors import UserError
from normlab.reports import plots
from normlab.reports.curve_figure import draw_learning_curve
from normlab.runs import create_folder
from normlab.study.learning_curve import LearningCurve, Point

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
    threads: int | None = None,
    settings: Mapping[str, Any] | None = None,
    told: Callable[[Point], object] = lambda point: None,
) -> LearningCurve:
    """Train on parts of the training pictures, and say whether more of them would help.

    Each part is of every class alike, holds the smaller ones of its seed, and is trained on for as
    many steps as all pictures are. Pictures held out and test pictures are the same for all. The
    test pictures decide nothing here, and so score every training.

    Args:
        recipe, data, image_size, skip_bad, threads, settings: as `normlab.train` takes them.
        shares: of the training pictures, each in (0, 1], the last one 1.
        seeds: trainings of each share.
        out: a folder for the runs, the figure and `curve.json`. Finished runs that are there are
            not trained again, so a study that was cut off goes on.
        told: is given each training's point.

    Raises:
        UserError: shares of which no line can be drawn, or too few pictures.
    """
    parts = sorted(set(shares))
    if len(parts) < 2 or not parts[0] > 0 or parts[-1] != 1:
        raise UserError(f"shares {list(shares)}: give two or more in (0, 1], 1 among them")
    if seeds < 1:
        raise UserError(f"seeds={seeds}: choose 1 or more")
    images = load(data, image_size=image_size, skip_bad=skip_bad)
    folder = Path(out) if out is not None else create_folder(None, "curve")
    folder.mkdir(parents=True, exist_ok=True)
    points: list[Point] = []
    chosen: dict[str, Any] = {"recipe": recipe, "threads": threads}
    for seed in range(seeds):
        steps = 0
        for share in reversed(parts):  # all pictures first: they say how many steps
            wanted = dict(settings or {})
            if share < 1:
                wanted["least_steps"] = steps
            run = _run(folder / f"{100 * share:g}-seed{seed}", images, share, seed, wanted, chosen)
            result = run.finished()
            if share == 1:
                steps = int(result["steps"])
            total = len(images.y_test)
            right = round(result["test_accuracy"] * total)
            count = len(_part(images, run.task.recipe.validation, share, seed).y_train)
            points.append(Point(share, count, seed, right, total, str(run.path)))
            told(points[-1])
    found = LearningCurve(run.task.recipe.name, images.name, tuple(points))
    write_json(folder / "curve.json", found.as_dict())
    drawn = plots.safely("the learning curve", lambda: plots.png(draw_learning_curve(found)))
    if drawn is not None:
        write_atomic(folder / "curve.png", drawn)
    return found


def _run(
    folder: Path,
    images: ImageData,
    share: float,
    seed: int,
    settings: dict[str, Any],
    chosen: dict[str, Any],
) -> Run:
    """The finished run in `folder`, or a new one."""
    if (folder / "result.json").exists():
        return open_run(folder)
    if share == 1:
        return train(data=images, seed=seed, out=folder, settings=settings, **chosen)
    whole = open_run(folder.with_name(f"100-seed{seed}")).task.recipe
    part = _part(images, whole.validation, share, seed)
    return train(data=part, seed=seed, out=folder, settings=settings, **chosen)


def _part(images: ImageData, validation: float, share: float, seed: int) -> ImageData:
    """The data with a share of the training pictures of each class; those held out stay apart."""
    learnt, held_out = split_images(images, validation)
    order = stream(seed, "learning curve").permutation(len(learnt))
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
        **(own if len(held_out) else {}),
    )
