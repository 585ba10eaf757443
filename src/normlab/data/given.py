"""Which paths of data this user has named before.

A run says where its data are, and a run that somebody sent may name any place. So that place is
read only if this user has given it to normlab before, on this machine. Each such path is an empty
file in the cache's folder `given`, named after the SHA-256 of the path.
"""

import contextlib
import hashlib
import os
from pathlib import Path

from normlab.data.cache import cache_folder


def remember(path: Path) -> None:
    """Note that the user has named this path, if the cache can be written."""
    with contextlib.suppress(OSError):
        place = _place(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()


def was_given(path: Path) -> bool:
    """Whether the user has named this path, or another that leads to the same place."""
    return _place(path).exists()


def _place(path: Path) -> Path:
    real = os.path.realpath(os.path.expanduser(path))
    return cache_folder() / "given" / hashlib.sha256(os.fsencode(real)).hexdigest()
