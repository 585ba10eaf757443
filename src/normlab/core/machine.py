"""What a machine is called, for whoever reads a result; it needs no framework."""

import contextlib
import platform
import sys
from importlib.metadata import version
from typing import Any

from normlab.core.cores import cores


def describe_host() -> dict[str, Any]:
    """Versions, system and processor of this process's machine."""
    return {
        "normlab": version("normlab"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": cores(),
    }


def cpu_name() -> str:
    """The processor as its maker names it."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as f:
            for line in f:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
