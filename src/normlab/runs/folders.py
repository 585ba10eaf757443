"""Where runs lie, and how a new one gets its folder."""

import re
from pathlib import Path

from normlab.core.files import LOCK
from normlab.errors import UserError

RUNS = Path("runs")
NUMBERED = re.compile(r"(\d{4,})-.+")


def latest(runs: Path = RUNS) -> Path:
    """Return the run with the highest number; the clock has no say.

    Numbered folders without a `recipe.json`, as `normlab curve` makes them, are no runs.

    Raises:
        UserError: there is none.
    """
    numbered = [found for found in _numbered(runs) if (found[1] / "recipe.json").exists()]
    if not numbered:
        raise UserError(f"no run in {str(runs)!r}: `normlab train` makes one, or name a run")
    return max(numbered)[1]


def create_folder(out: str | Path | None, recipe: str) -> Path:
    """Make a run's folder: `out`, new or empty, or the next number in `runs/`.

    Raises:
        UserError: it is not empty or cannot be written.
    """
    try:
        return _create_numbered(RUNS, recipe) if out is None else _create(Path(out))
    except OSError as e:
        where = e.filename or out or RUNS
        raise UserError(
            f"cannot make the folder {str(where)!r} ({e.strerror}): choose another --out"
        ) from None


def _create(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if any(p.name != LOCK for p in folder.iterdir()):  # of a process that was killed
        raise UserError(f"folder {str(folder)!r} is not empty: choose a new one for --out")
    return folder


def _create_numbered(runs: Path, recipe: str) -> Path:
    """Take the next number. A reservation `.NNNN` keeps two processes from taking the same one;
    that of a killed process stays, and its number is not used."""
    runs.mkdir(parents=True, exist_ok=True)
    while True:
        reserved = [int(p.name[1:]) for p in runs.glob(".[0-9]*") if p.name[1:].isdecimal()]
        number = max([n for n, _ in _numbered(runs)] + reserved, default=0) + 1
        reservation = runs / f".{number:04d}"
        try:
            reservation.mkdir()
        except FileExistsError:
            continue
        try:
            if all(n < number for n, _ in _numbered(runs)):
                folder = runs / f"{number:04d}-{recipe}"
                folder.mkdir()
                return folder
        finally:
            reservation.rmdir()


def _numbered(runs: Path) -> list[tuple[int, Path]]:
    if not runs.is_dir():
        return []
    found = [(NUMBERED.fullmatch(p.name), p) for p in runs.iterdir() if p.is_dir()]
    return [(int(match[1]), path) for match, path in found if match]
