"""The machine and versions behind a figure, and the settings a training runs under."""

import contextlib
import hashlib
import os
import platform
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from normlab import kernels
from normlab.core.cores import cores
from normlab.core.machine import cpu_model, cpu_name
from normlab.errors import UserError
from normlab.kernels.memory import keep_freed_memory


def resolve_threads(threads: int | None, processes: int = 1) -> int:
    """Return `threads`, or this process's share of the cores, if it is one of so many alike here.

    Raises:
        UserError: fewer than one, or more than there are cores.
    """
    if threads is None:
        return max(1, cores() // processes)
    if not 1 <= threads <= cores():
        raise UserError(f"threads={threads}: choose from 1 to {cores()}, this machine's cores")
    return threads


def resolve_device(device: str, local_rank: int | None = None) -> torch.device:
    """Return the device called `device`; `auto` is CUDA where there is one, else the CPU.

    Args:
        local_rank: of one process of several on this machine, which takes the CUDA device of that
            number (with more than one such device not run yet).

    Raises:
        UserError: an unknown device, or one that is not here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError:
        raise UserError(f"unknown device {device!r}: choose auto, cpu or cuda") from None
    if found.type not in ("cpu", "cuda"):
        raise UserError(f"device {device!r} is not supported: choose auto, cpu or cuda")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {device!r}: PyTorch finds no CUDA device here; choose cpu")
    if found.type == "cuda" and local_rank is not None:
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank} of this machine has no CUDA device of its own: start at "
                f"most {torch.cuda.device_count()} here, or choose --device cpu"
            )
        return torch.device("cuda", local_rank)
    return found


def describe_machine(threads: int, device: torch.device) -> dict[str, Any]:
    """What a reader needs to judge a time or to repeat a run."""
    return {
        "normlab": version("normlab"),
        "code_sha256": _own_code(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": version("numpy"),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_model": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "compiled_kernels": kernels.available(),
        "bfloat16": kernels.available() and kernels.has_bfloat16(),
        "amx": kernels.available() and kernels.has_amx(),
        "cores": cores(),
        "threads": threads,
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


_CODE = (".py", ".so", ".pyd")


def digest_of_code(package: Path = Path(__file__).parents[1]) -> str:
    """SHA-256 of the package's code as it lies on the disk now, compiled code included: a checkout
    changes within a version.
    """
    digest = hashlib.sha256()
    for path in sorted(p for p in package.rglob("*") if p.suffix in _CODE and p.is_file()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


@cache
def _own_code() -> str:
    """The digest when it is first asked for: later edits are not what this process runs."""
    return digest_of_code()


@contextlib.contextmanager
def settings(threads: int, device: torch.device) -> Iterator[None]:
    """Run with `threads` threads, denormals flushed to zero and deterministic kernels.

    PyTorch's CPU kernels are deterministic at a fixed number of threads as they are; CUDA's have
    to be asked.
    """
    keep_freed_memory()
    threads_before = torch.get_num_threads()
    deterministic_before = torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads)
    kernels.flush_denormals(True)
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        kernels.flush_denormals(False)
        torch.set_num_threads(threads_before)
        if device.type == "cuda":  # else nothing changed, and the call imports PyTorch's compiler
            torch.use_deterministic_algorithms(deterministic_before)
