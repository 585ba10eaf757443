"""What a machine is called, for whoever reads a result; it needs no framework."""

import contextlib
import platform
import sys
from collections.abc import Mapping
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


def told(environment: Mapping[str, Any]) -> str:
    """Versions, processor and threads of an environment in a line, as far as it tells them.

    Args:
        environment: as `describe_host` or `normlab.core.environment.describe_machine` gives it;
            `versions` are those of a study's own program.
    """
    versions = environment.get("versions", {})
    if "torch" in environment:
        names = {"torch": "PyTorch", "numpy": "NumPy", "python": "Python"}
        versions = {names[key]: environment.get(key) for key in names}
    cores, threads = environment.get("cores"), environment.get("threads")
    processor = [environment.get("cpu_model"), environment.get("cpu_capability")]
    processor.append("AMX" if environment.get("amx") else None)
    processor.append(f"{cores} core{'' if cores == 1 else 's'}")
    code = environment.get("code_sha256", "")[:8]  # a checkout changes within a version
    parts = [
        f"normlab {environment.get('normlab')}{f' (code {code})' if code else ''}",
        *(f"{name} {version}" for name, version in versions.items()),
        "" if environment.get("compiled_kernels", True) else "no compiled kernels",
        f"{environment.get('cpu')} ({', '.join(filter(None, processor))})",
        f"{threads} thread{'' if threads == 1 else 's'} a run" if threads else "its own threads",
        environment.get("platform"),
    ]
    return ", ".join(filter(None, parts))


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
