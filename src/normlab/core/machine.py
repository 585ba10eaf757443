"""What a machine is called, for whoever reads a result; it needs no framework."""

import contextlib
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from normlab.core.cores import cores

CPUINFO = Path("/proc/cpuinfo")


def describe_host() -> dict[str, Any]:
    """Versions, system and processor of this process's machine."""
    return {
        "normlab": version("normlab"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_model": cpu_model(),
        "cores": cores(),
    }


def cpu_name() -> str:
    """The processor as its maker names it."""
    return _cpu().get("model name") or platform.processor() or platform.machine()


def cpu_model() -> str:
    """The numbers that tell a processor's generation, such as "family 26, model 2", or nothing.

    A virtual machine's "AMD EPYC" may be any: of family 25 are Zen 3 and Zen 4, of 26 is Zen 5.
    """
    numbers = {"family": "cpu family", "model": "model"}
    return ", ".join(f"{name} {_cpu()[key]}" for name, key in numbers.items() if key in _cpu())


def _cpu() -> dict[str, str]:
    """What Linux says of the first processor."""
    if sys.platform != "linux":
        return {}
    with contextlib.suppress(OSError):
        first = CPUINFO.read_text(encoding="utf-8").partition("\n\n")[0]
        lines = (line.partition(":") for line in first.splitlines())
        return {key.strip(): value.strip() for key, _, value in lines}
    return {}
