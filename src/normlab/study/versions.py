"""Versions of Python and of the frameworks that it has; `commands.versions_of` asks others for it.

It imports what Python itself brings, since another Python runs its text.
"""

from __future__ import annotations

import json
import platform
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

FRAMEWORKS = (
    *("torch", "torchvision", "timm", "lightning", "tensorflow", "tensorflow-cpu", "keras"),
    *("jax", "flax", "scikit-learn", "xgboost", "lightgbm", "numpy"),
)


@lru_cache(maxsize=1)
def own_versions() -> dict[str, str]:
    """Versions of this Python and of those frameworks that are installed for it."""
    found = {"python": platform.python_version()}
    for name in FRAMEWORKS:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


if __name__ == "__main__":
    print(json.dumps(own_versions()))
