"""What a peer offers to be timed, and the process that it lives in."""

import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]  # (N, H, W, 3)
Probabilities = NDArray[np.floating[Any]]  # (N, K)
Notes = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What a peer is told.

    Attributes:
        folder: what `prepare` wrote: images, weights, expected answers.
        threads: to compute with.
        extra: of the entry: batch size, layout, network.
    """

    folder: Path
    threads: int
    extra: dict[str, Any]

    def array(self, name: str) -> NDArray[Any]:
        """Read a prepared array; its pages come from the disk when they are used."""
        array: NDArray[Any] = np.load(self.folder / f"{name}.npy", mmap_mode="r")
        return array

    def weights(self, network: str) -> dict[str, NDArray[Any]]:
        """Read prepared weights, under normlab's names."""
        with np.load(self.folder / f"{network}.npz") as arrays:
            return dict(arrays)


@dataclass(frozen=True)
class Case:
    """One thing to time.

    Attributes:
        run: does it so many times; may return notes, of which `seconds` replaces what the clock
            said.
        images: that pass in one repeat.
        whole: whether a repeat is so long that it is timed once, without a warm-up.
    """

    run: Callable[[int], Notes | None]
    images: int
    whole: bool = False


@dataclass(frozen=True)
class Entry:
    """What a peer built.

    Attributes:
        cases: by name.
        answer: probabilities with the prepared weights, if this is a network.
        about: versions and settings.
    """

    cases: dict[str, Case]
    answer: Callable[[Images], Probabilities] | None = None
    about: Notes = field(default_factory=dict)


def inference_cases(
    answer: Callable[[Images, int], object], images: Images, amount: int
) -> dict[str, Case]:
    """Cases `256` and `1`: `answer` gets images and the batch size, and loops over batches itself.

    Args:
        amount: of images in a repeat of the case `256`.
    """
    many = np.ascontiguousarray(images[:amount])

    def throughput(repeats: int) -> None:
        for _ in range(repeats):
            answer(many, 256)

    def latency(repeats: int) -> None:
        for i in range(repeats):
            j = i % len(many)
            answer(many[j : j + 1], 1)

    return {"256": Case(throughput, len(many)), "1": Case(latency, 1)}


def batches(images: Images, batch: int) -> Iterable[Images]:
    """Cut `images` into batches, the last one partial."""
    return (images[i : i + batch] for i in range(0, len(images), batch))


def serve(pipe: Connection, module: str, maker: str, options: Options) -> None:
    """Build the entry and do what the pipe asks for, to the end of the process."""
    try:
        entry: Entry = getattr(import_module(f"benchmarks.peers.{module}"), maker)(options)
        pipe.send(_introduction(entry))
        while (order := pipe.recv()) is not None:
            pipe.send(_obey(entry, *order))
        pipe.send(peak_mib())
    except Exception:
        pipe.send(traceback.format_exc())
    sys.stdout.flush()
    # Frameworks may wait for their threads at the end, and there is nothing left to tidy up.
    os._exit(0)


def _introduction(entry: Entry) -> Notes:
    cases = {name: {"images": c.images, "whole": c.whole} for name, c in entry.cases.items()}
    return {**entry.about, "cases": cases, "answers": entry.answer is not None}


def _obey(entry: Entry, what: str, *arguments: Any) -> Any:
    if what == "answer":
        assert entry.answer is not None
        return entry.answer(*arguments)
    case, repeats = arguments
    run = entry.cases[case].run
    started = time.perf_counter()
    notes = run(repeats)
    return {"seconds": time.perf_counter() - started, **(notes or {})}


def peak_mib() -> int:
    """The most memory that this process has had in use, in MiB.

    On Linux from /proc: there `ru_maxrss` of a new process begins with its parent's.
    """
    try:
        with open("/proc/self/status", encoding="ascii") as f:
            return next(int(line.split()[1]) >> 10 for line in f if line.startswith("VmHWM"))
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak >> (20 if sys.platform == "darwin" else 10)
