"""Look at data before they are trained on, and keep what was found as a folder."""

import re
from pathlib import Path

from normlab.core.environment import resolve_threads
from normlab.curation import Check, check, read_pictures
from normlab.curation.check import Say
from normlab.data.loading import check_size
from normlab.errors import UserError
from normlab.reports.check_page import write_check
from normlab.training.pretrained import open_pretrained
from normlab.training.starting_points import size_of


def check_data(
    data: str | Path | None = None,
    *,
    out: str | Path | None = None,
    image_size: int | None = None,
    group_by: str | None = None,
    start: str | Path | None = None,
    threads: int | None = None,
    say: Say = lambda _: None,
) -> tuple[Check, Path]:
    """Look for copies, doubtful labels, odd pictures and small classes in a data set.

        found, folder = check_data("pets")
        found.groups, found.suspects, found.oddities

    Nothing in the data is changed. The folder has `index.html` to decide on, `check.json` and
    `findings.csv`.

    Args:
        data: as `normlab.data.load` takes it, but no arrays; None for CIFAR-10.
        out: the folder to write; None for `check-NAME` here, which is written anew.
        image_size: at which labels are looked at; see `normlab.data.load`. None for what suits
            the pictures, or the network `start`.
        group_by: as `normlab.data.load` takes it. No model judges the label of a picture after it
            has seen others of its group.
        start: a pretrained network, by whose features labels are judged: a name in timm, a file of
            weights, or NAME=FILE. None for the body that comes with normlab.
        threads: CPU threads; None for all cores.
        say: told what is being done.

    Raises:
        UserError: there is something else in the folder to write, or no such network.
        DataError: the data cannot be read.
    """
    folder = None if out is None else Path(out)
    if folder is not None:
        _refuse_others(folder)
    body = None if start is None else open_pretrained(start)
    size = size_of(body) if image_size is None else image_size
    pictures = read_pictures(data, size, group_by)
    check_size(pictures.name, pictures.pixels.shape[1:], image_size)
    if folder is None:
        name = re.sub(r"[^\w.-]+", "-", pictures.name).strip("-.") or "data"
        folder = Path(f"check-{name}")
        _refuse_others(folder)
    found = check(pictures, threads=resolve_threads(threads), body=body, say=say)
    write_check(found, "cifar10" if data is None else str(data), folder)
    return found, folder


def _refuse_others(folder: Path) -> None:
    ours = (folder / "check.json").exists()
    if folder.exists() and not ours and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{str(folder)!r} is there and is no check: choose another --out")
