"""How much of the machine others took while something was measured."""

import os
import resource
import time

QUIET = 0.05  # of the processor time that there was: more, and a time is not to be quoted


class OtherLoad:
    """What share of the machine's processor time others took since this was made.

    Own time is that of this process and of its children that have ended: ask after they have.
    """

    def __init__(self) -> None:
        self.began = self._now()

    def share(self) -> float | None:
        """From 0 to 1; None on systems without /proc/stat."""
        if self.began is None:
            return None
        wall, busy, own = (a - b for a, b in zip(self._now() or (), self.began, strict=True))
        return max(0.0, (busy - own) / (wall * (os.cpu_count() or 1)))

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Seconds: on the clock, of all processors at work, of this process and its children."""
        try:
            with open("/proc/stat", encoding="ascii") as f:
                user, nice, system, _, _, irq, softirq, *_ = map(int, f.readline().split()[1:])
        except OSError:
            return None
        busy = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        own = time.process_time() + children.ru_utime + children.ru_stime
        return time.perf_counter(), busy, own


def is_quiet(share: float | None) -> bool:
    """Whether times measured meanwhile count."""
    return share is not None and share <= QUIET
