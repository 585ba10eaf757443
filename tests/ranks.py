"""`normlab train` in several processes, as a scheduler starts them; and what ends some of them.

    python tests/ranks.py [--kills 30] [--out docs/results/ranks.json]

kills one of two ranks that many times, each at a random instant, and counts what survives.
"""

import argparse
import faulthandler
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torture import check_one_line, check_same, server, stray, write_data

END = 30.0  # seconds within which the survivors of a rank have ended
TIMEOUT = 120.0


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _rank(
    words: list[str], errors: str, variables: dict[str, str], change: Callable[[], None] | None
) -> None:
    os.environ |= variables
    import normlab.training.checkpoint
    from normlab.__main__ import run
    from normlab.reports import plots

    normlab.training.checkpoint.SECONDS_BETWEEN = 0.0
    plots.png = lambda _: b"no picture"
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    faulthandler.register(signal.SIGUSR1)
    if change is not None:
        change()
    code = run(words)
    sys.stderr.flush()
    os._exit(code)


@dataclass
class Rank:
    """A process that runs or has ended."""

    process: Any
    errors: Path

    def wait(self, seconds: float = TIMEOUT) -> int:
        """The exit code; negative for the signal that ended it."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.kill(signal.SIGUSR1)  # it says where it stands
            time.sleep(1)
            self.process.kill()
            raise AssertionError(f"a rank hangs: {self.errors.read_text()}")
        return int(self.process.exitcode)

    def kill(self, signum: int = signal.SIGKILL) -> None:
        if self.process.exitcode is None:
            os.kill(self.process.pid, signum)

    @property
    def lines(self) -> list[str]:
        """What it said; gloo's own remarks are not ours."""
        lines = self.errors.read_text(encoding="utf-8").splitlines()
        return [line for line in lines if line.startswith(("normlab:", "Traceback"))]


def begin(
    size: int,
    words: list[str],
    place: Path,
    *,
    leave_out: int | None = None,
    changes: dict[int, Callable[[], None]] | None = None,
    port: int | None = None,
) -> dict[int, Rank]:
    """Start `normlab` with these words in `size` ranks, all but one if asked for.

    changes: what the process of a rank does first.
    """
    variables = {
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port or free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    ranks = {}
    for rank in range(size):
        if rank == leave_out:
            continue
        errors = place / f"rank{rank}.stderr"
        mine = {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        change = (changes or {}).get(rank)
        process = server().Process(target=_rank, args=(words, str(errors), mine, change))
        process.start()
        ranks[rank] = Rank(process, errors)
    return ranks


def end(ranks: dict[int, Rank]) -> None:
    """Leave none behind, whatever happened."""
    for rank in ranks.values():
        rank.kill()
        rank.process.join()


@dataclass
class Trainings:
    """A tiny data set, and trainings on it by so many ranks."""

    place: Path

    def __post_init__(self) -> None:
        self.place.mkdir(exist_ok=True)
        self.data = self.place / "data.npz"
        write_data(self.data)
        begin(1, ["--version"], self.place)[0].wait()  # until then everything is loaded

    def words(self, out: Path, *more: str) -> list[str]:
        """`normlab train` into `out`; or on with it, where it can be gone on with."""
        wait = ["--wait", "10"]
        if (out / "environment.json").exists():
            return ["train", "--resume", str(out), *wait, *more]
        shutil.rmtree(out, ignore_errors=True)
        options = ["--epochs", "4", "--batch-size", "16", "--seed", "3", "--ema", "0.9"]
        options += ["--threads", "1", "--data", str(self.data), "--out", str(out)]
        return ["train", "notebook", *options, *wait, *more]

    def run(self, size: int, out: Path, *more: str) -> Path:
        """Train, or go on, to the end."""
        ranks = begin(size, self.words(out, *more), self.place)
        try:
            for number, rank in ranks.items():
                assert rank.wait() == 0, (number, rank.errors.read_text())
        finally:
            end(ranks)
        return out

    def kill_one(self, size: int, out: Path, after: float, which: int) -> bool:
        """Train and kill a rank after so many seconds; whether it lived so long.

        The others end in time, with one line that names it.
        """
        ranks = begin(size, self.words(out), self.place)
        try:
            print(f"  kill rank {which} after {after:.2f} s", flush=True)
            time.sleep(after)
            ranks[which].kill()
            killed = ranks[which].wait() == -signal.SIGKILL
            started = time.monotonic()
            for number, rank in ranks.items():
                if number == which:
                    continue
                code = rank.wait(END)
                if code == 0:  # it had done its part
                    continue
                assert killed, rank.lines
                assert code == 1, (code, rank.lines)
                check_one_line(rank.lines)
                assert len(rank.lines) == 1, rank.lines
                assert f"rank {which}" in rank.lines[0], rank.lines
            assert time.monotonic() - started < END
        finally:
            end(ranks)
        return killed


def kill_many(place: Path, kills: int, rng: random.Random, say: Any = print) -> dict[str, int]:
    """So many kills of one of two ranks; each training is gone on with to the same bits."""
    trainings, counts = Trainings(place), Counter[str]()
    started = time.monotonic()
    whole = trainings.run(2, place / "whole")
    seconds = time.monotonic() - started
    number = 0
    while counts["SIGKILL of a rank"] < kills:
        number += 1
        out = place / f"cut{number}"
        which = rng.randrange(2)
        if not trainings.kill_one(2, out, rng.uniform(0, seconds), which):
            counts["kills that came too late"] += 1
        else:
            counts["SIGKILL of a rank"] += 1
            counts[f"of rank {which}"] += 1
            counts["before the first checkpoint"] += not (out / "checkpoint.safetensors").exists()
        if not (out / "result.json").exists():
            trainings.run(2, out)
            counts["gone on with"] += 1
        else:  # killed at its very end, if at all: it leaves a lock, or has no page yet
            assert begin(1, trainings.words(out), place)[0].wait() in (0, 2)
        check_same(whole, out)
        counts["ended with the same bits"] += 1
        assert not stray(out), stray(out)
        shutil.rmtree(out)
        say(f"{number}: {dict(counts)}")
    return dict(counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = kill_many(Path(folder), options.kills, random.Random(options.seed))
    if options.out:
        options.out.write_text(json.dumps(counts, indent=2) + "\n")
    print(json.dumps(counts))


if __name__ == "__main__":
    multiprocessing.freeze_support()
    main()
