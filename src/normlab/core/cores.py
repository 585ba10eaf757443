"""How many cores there are to work with."""

import contextlib
import math
import os
from pathlib import Path

# What a container may use, in microseconds of processor time and of the clock: "50000 100000".
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def cores() -> int:
    """How many cores this process may use: those it is bound to, and no more than its quota."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = _QUOTA.read_text(encoding="ascii").split()
        if quota != "max":
            return max(1, min(there or 1, math.ceil(int(quota) / int(period))))
    return there or 1
