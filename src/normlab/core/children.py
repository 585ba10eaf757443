"""Where Python looks for modules: never in the folder of somebody's data.

`python -m` and `python -c` put the current folder first on the path, and an empty part of
`PYTHONPATH` means the current folder, too. A `numpy.py` beside a stranger's pictures would run.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# The folder that holds this package; it stays on the path wherever the user is.
_GIVEN: dict[str, str | None] = {}  # PYTHONPATH and so on, as they were before they were made safe
_HOME = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))


def child_environment(**more: str) -> dict[str, str]:
    """The environment for a Python process: this one's, and a path without the current folder.

    Args:
        **more: further variables.
    """
    return {**os.environ, **_variables(), **more}


@contextmanager
def safe_children(**more: str) -> Iterator[None]:
    """Python processes that a library starts meanwhile have `child_environment`, too.

    Args:
        **more: further variables. All are put back at the end.
    """
    changes = {**_variables(), **more}
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def outer_environment() -> dict[str, str]:
    """The environment as the user has it, for programs of the user's own."""
    found = dict(os.environ)
    for name, value in _GIVEN.items():
        if value is None:
            found.pop(name, None)
        else:
            found[name] = value
    return found


def module_path() -> list[str]:
    """`sys.path` without the current folder."""
    return _without_current_folder(sys.path)


def leave_out_current_folder() -> None:
    """Take the current folder off this process's `sys.path`, and off that of its children."""
    sys.path[:] = module_path()
    changes = _variables()
    for name in changes:
        _GIVEN.setdefault(name, os.environ.get(name))
    os.environ.update(changes)


def _without_current_folder(path: list[str]) -> list[str]:
    try:
        here = os.path.realpath(os.getcwd())
    except OSError:  # it was removed, and holds nothing to import
        here = ""
    places = {p: os.path.realpath(p) for p in path if p}
    return [p for p, place in places.items() if place == _HOME or place != here]


def _variables() -> dict[str, str]:
    if "PYTHONPATH" not in os.environ:
        return {"PYTHONSAFEPATH": "1"}
    path = _without_current_folder(os.environ["PYTHONPATH"].split(os.pathsep))
    return {
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": os.pathsep.join(os.path.abspath(p) for p in path),
    }
