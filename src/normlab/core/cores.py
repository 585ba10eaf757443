"""How many processors this process may use, and whether other programs use them already."""

import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

LOADAVG = Path("/proc/loadavg")
AWAKE = "1000"  # turns of a loop for which a thread waits before it sleeps; some microseconds


def cores() -> int:
    """How many cores this process may use: those it is bound to, or fewer if a container says so.

    A share of a core counts as one.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min([bound or 1, *(math.ceil(quota) for quota in quotas())]))


def spare_others() -> None:
    """Let threads that wait for each other sleep sooner, if other programs want the cores now.

    PyTorch's threads wait awake. That is the fastest where the cores are theirs; beside another
    busy program a thread often waits for one that has no core, and takes that core itself. Their
    library, libgomp of Linux, reads how long they do once, when PyTorch is loaded: so this is
    called before, and does nothing where the environment says what the user wants.
    """
    chosen = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys()
    if "torch" not in sys.modules and not chosen and crowded():
        os.environ["GOMP_SPINCOUNT"] = AWAKE


def crowded() -> bool:
    """Whether others are at work on cores that this process would use, for some milliseconds."""
    for pause in (0, 0.004, 0.004):
        time.sleep(pause)
        try:
            running = int(LOADAVG.read_text().split()[3].partition("/")[0])  # this process, too
        except (OSError, ValueError, IndexError):
            return False
        if running - 1 + cores() <= (os.cpu_count() or 1):
            return False
    return True


def quotas(root: Path = Path("/")) -> Iterator[float]:
    """The limits, in cores, that the control groups of Linux set for this process.

    root: where /proc and /sys/fs/cgroup are looked for.

    A limit of any group above the process's own holds for it, too. Inside a container the group
    may be called otherwise than the mounted folders are, so the mount's top is looked at as well.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return
    mount = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, place = [*line.split(":", 2), "", ""][:3]
        if not controllers:  # version 2
            for folder in _upwards(mount, place):
                yield from _quota(folder / "cpu.max")
        elif "cpu" in controllers.split(","):  # version 1
            for name in {controllers, "cpu"}:
                for folder in _upwards(mount / name, place):
                    yield from _quota(folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us")


def _upwards(mount: Path, place: str) -> Iterator[Path]:
    """The folder of the group `place`, and all above it up to `mount`."""
    parts = [part for part in place.split("/") if part not in ("", ".", "..")]
    for length in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:length])


def _quota(*files: Path) -> Iterator[float]:
    """Time allowed over period, if both are there and there is a limit ("max" and −1 are none)."""
    try:
        quota, period = (float(word) for file in files for word in file.read_text().split())
    except (OSError, ValueError):
        return
    if quota > 0 and period > 0:
        yield quota / period
