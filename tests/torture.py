"""Kill trainings and studies at random instants and let their writes fail; count what survives.

    python tests/torture.py --out docs/results/torture.json

Sessions are processes forked from one that has loaded PyTorch, so that a kill costs a second and
not five. Each is `normlab train` or `normlab train --resume` on 70 images of 16 × 16, with a
checkpoint after every step, or `normlab compare`. After each kill the next session goes on; what it
ends with must be, bit for bit, what a run ends with that nobody touched.
"""

import argparse
import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np

from faults import KILL, Faults

TIMEOUT = 120.0  # seconds a session may take on a busy machine
LOSSES = {errno.ENOSPC: "ENOSPC", errno.EIO: "EIO"}
# Files of a run that must be the same bytes; reports have times in them.
SAME_FILES = ("last.safetensors", "best.safetensors")
SAME_SCORES = ("weights_sha256", "test_loss", "test_accuracy", "val_loss", "steps")


@cache
def server() -> Any:
    """Where sessions are forked: a process of one thread with everything loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torture_preload"])
    before = dict(os.environ)
    # Its own path argument is not heeded by Python 3.11, and what cannot be loaded is passed over.
    places = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    os.environ |= {"PYTHONPATH": os.pathsep.join(filter(None, places)), "OMP_NUM_THREADS": "1"}
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ |= before
    return context


def _session(
    words: list[str], errors: str, folder: Path, n: int, fault: int | str, lasting: bool, ready: Any
) -> None:
    """What a forked process does: the command, with its n-th event below `folder` failing."""
    assert "torture_preload" in sys.modules
    import normlab.training.checkpoint
    from normlab.__main__ import run
    from normlab.reports import plots

    normlab.training.checkpoint.SECONDS_BETWEEN = 0.0
    plots.png = lambda _: b"no picture"  # drawing would take two thirds of the time
    stream = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    ready.send_bytes(b"1")
    with Faults(folder, n, fault, lasting=lasting) as faults:
        code = run(words)
        # The second of two may come when the command has ended, and must not end what follows here.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stderr.flush()
    ready.send_bytes(json.dumps(faults.events).encode())
    os._exit(code)


@dataclass
class Session:
    """A running or ended session."""

    process: Any
    pipe: Any
    errors: Path

    def wait(self) -> int:
        """The exit code; negative for the signal that ended it."""
        self.process.join(TIMEOUT)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"a session hangs: {self.errors.read_text()}")
        return int(self.process.exitcode)

    def kill(self, signum: int = signal.SIGKILL) -> None:
        if self.process.exitcode is None:
            os.kill(self.process.pid, signum)

    @property
    def events(self) -> list[tuple[str, str]]:
        """Of a session that ended by itself."""
        return [tuple(e) for e in json.loads(self.pipe.recv_bytes())]

    @property
    def lines(self) -> list[str]:
        return self.errors.read_text(encoding="utf-8").splitlines()


def begin(
    words: list[str],
    folder: Path,
    n: int = 0,
    fault: int | str = KILL,
    *,
    lasting: bool = False,
) -> Session:
    """Start a session and wait until its command is about to begin."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    errors = folder.parent / f"{folder.name}.stderr"
    process = server().Process(
        target=_session, args=(words, str(errors), folder, n, fault, lasting, theirs)
    )
    process.start()
    theirs.close()
    ours.recv_bytes()
    return Session(process, ours, errors)


@dataclass
class Torture:
    """A tiny data set, a run on it that nobody touched, and counts of what was done to others."""

    place: Path
    rng: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    epochs: int = 2
    batch_size: int = 16

    def __post_init__(self) -> None:
        self.place.mkdir(exist_ok=True)
        self.data = self.place / "data.npz"
        write_data(self.data)
        self.whole = self.place / "whole"
        begin(["--version"], self.place / "warm").wait()  # until then everything is loaded
        started = time.monotonic()
        session = begin(self.command(self.whole), self.whole)
        assert session.wait() == 0, session.lines
        self.seconds = time.monotonic() - started
        self.events = session.events
        self.number = 0

    def command(self, out: Path) -> list[str]:
        """`normlab train` into `out`; or on with it, where it can be gone on with."""
        if (out / "environment.json").exists():
            return ["train", "--resume", str(out)]
        shutil.rmtree(out, ignore_errors=True)  # as its message says: nothing was done yet
        options = ["--epochs", str(self.epochs), "--batch-size", str(self.batch_size)]
        options += ["--threads", "1", "--seed", "3", "--ema", "0.9"]
        return ["train", "notebook", "--data", str(self.data), "--out", str(out), *options,
                "--record"]  # fmt: skip

    def new(self) -> Path:
        self.number += 1
        return self.place / f"cut{self.number}"

    def finish(self, out: Path) -> None:
        """Go on with `out` to its end and compare it with the run that nobody touched."""
        if not (out / "result.json").exists():
            session = begin(self.command(out), out)
            assert session.wait() == 0, session.lines
            assert "Traceback" not in "".join(session.lines)
        else:
            self.counts["ended before its kill"] += 1
            leftovers = begin(["train", "--resume", str(out)], out)
            # Finished: nothing is left to resume, or no more than its report.
            assert leftovers.wait() in (0, 2), leftovers.lines
        check_same(self.whole, out)
        sampled = [np.load(run / "recording.npz")["step"].tolist() for run in (self.whole, out)]
        assert sampled[0] == sampled[1]
        shutil.rmtree(out)

    def kill_run(self, kills: int) -> None:
        """Train with that many SIGKILLs at random instants, every other one inside a write."""
        out = self.new()
        for _ in range(kills):
            if (out / "result.json").exists():
                break
            self.note(out, self.killed(self.command(out), out), "SIGKILL of a run")
        self.finish(out)

    def killed(self, words: list[str], out: Path) -> int:
        """A session killed at a random instant, or at one of its next 40 events."""
        inside = self.rng.random() < 0.5
        session = begin(words, out, self.rng.randint(1, 40) if inside else 0)
        if not inside:
            time.sleep(self.rng.uniform(0, self.seconds))
            session.kill()
        return session.wait()

    def note(self, out: Path, code: int, what: str) -> None:
        """Count a kill, and whether it fell into the writing of a file or of a checkpoint."""
        if code != -signal.SIGKILL:
            self.counts[f"{what} that came too late"] += 1
            return
        self.counts[what] += 1
        torn = [p.name for p in out.rglob(".*.tmp")] if out.exists() else []
        self.counts[f"{what}, inside the writing of a file"] += bool(torn)
        self.counts[f"{what}, inside the writing of a checkpoint"] += any(
            name.startswith(".checkpoint") for name in torn
        )

    def signal_run(self, signum: int, *, twice: bool = False) -> None:
        """SIGTERM, or Ctrl-C twice in quick succession, at a random instant."""
        out = self.new()
        session = begin(self.command(out), out)
        time.sleep(self.rng.uniform(0, self.seconds))
        session.kill(signum)
        if twice:
            time.sleep(self.rng.uniform(0, 0.1))
            session.kill(signum)
        code, name = session.wait(), signal.Signals(signum).name
        # Outside the training loop SIGTERM ends Python itself, which a shell calls 143, too.
        assert code in (0, 128 + signum, -signum), (code, session.lines)
        assert "Traceback" not in "\n".join(session.lines), session.lines
        what = f"double {name}" if twice else name
        self.counts[what if code else f"{what} that came too late"] += 1
        self.finish(out)

    def fail_write(self, n: int, fault: int) -> None:
        """The n-th event of a training fails, on a full disk all later writes, too."""
        out = self.new()
        session = begin(self.command(out), out, n, fault, lasting=fault == errno.ENOSPC)
        code = session.wait()
        assert code == 2, (code, n, session.lines)
        check_one_line(session.lines)
        assert not stray(out), stray(out)
        kind = self.events[n - 1][0]
        self.counts[f"{LOSSES[fault]} at a {kind}"] += 1
        self.finish(out)


def write_data(path: Path) -> None:
    import normlab

    sample = normlab.load("sample")
    arrays = {"x_train": sample.x_train[:70, ::2, ::2], "y_train": sample.y_train[:70]}
    arrays |= {"x_test": sample.x_test[:20, ::2, ::2], "y_test": sample.y_test[:20]}
    np.savez(path, **arrays, class_names=np.array(sample.class_names))


def stray(folder: Path) -> list[str]:
    return [str(p) for p in folder.rglob("*") if p.name.endswith(".tmp") or p.name == ".lock"]


def check_one_line(lines: list[str]) -> None:
    assert lines, "nothing was said"
    assert lines[-1].startswith("normlab: "), lines
    assert not any("Traceback" in line for line in lines), lines


def check_same(whole: Path, cut: Path) -> None:
    """Two runs ended with the same bits, and neither has a stray file."""
    ends = [json.loads((run / "result.json").read_text()) for run in (whole, cut)]
    for key in SAME_SCORES:
        assert ends[0][key] == ends[1][key], key
    histories = [
        [
            {**json.loads(row), "seconds": 0}
            for row in (run / "history.jsonl").read_text().splitlines()
        ]
        for run in (whole, cut)
    ]
    assert histories[0] == histories[1]
    for name in SAME_FILES:
        assert (whole / name).read_bytes() == (cut / name).read_bytes(), name
    assert not stray(cut), stray(cut)
    there, here = ({p.name for p in run.iterdir()} for run in (whole, cut))
    assert there == here, there ^ here


@dataclass
class StudyTorture:
    """The same for `normlab compare`: two arms, three seeds, one run at a time."""

    torture: Torture
    seeds: int = 3

    def __post_init__(self) -> None:
        self.whole = self.torture.place / "whole-study"
        session = begin(self.command(self.whole), self.whole)
        assert session.wait() == 0, session.lines
        self.events = session.events

    def command(self, out: Path) -> list[str]:
        options = ["--epochs", "1", "--batch-size", "16", "--checks", "1", "--jobs", "1"]
        return ["compare", "notebook", "--arms", "batch,none", "--seeds", str(self.seeds),
                "--data", str(self.torture.data), "--out", str(out), *options]  # fmt: skip

    def kill_study(self, kills: int) -> None:
        out = self.torture.new()
        for _ in range(kills):
            code = self.torture.killed(self.command(out), out)
            self.torture.note(out, code, "SIGKILL of a study")
        self.finish(out)

    def fail_write(self, n: int, fault: int) -> None:
        out = self.torture.new()
        session = begin(self.command(out), out, n, fault, lasting=fault == errno.ENOSPC)
        code = session.wait()
        assert code == 2, (code, n, session.lines)
        check_one_line(session.lines)
        assert not stray(out), stray(out)
        self.torture.counts[f"{LOSSES[fault]} in a study"] += 1
        self.finish(out)

    def finish(self, out: Path) -> None:
        session = begin(self.command(out), out)
        assert session.wait() == 0, session.lines
        assert figures(out) == figures(self.whole)
        assert not stray(out), stray(out)
        shutil.rmtree(out)


def figures(study: Path) -> dict[str, Any]:
    """All that must repeat, by run; times may differ."""
    keys = ("weights_sha256", "test_accuracy", "test_loss", "test_correct", "curve", "steps")
    runs = {p.name: json.loads(p.read_text()) for p in (study / "runs").iterdir()}
    return {name: [run[key] for key in keys] for name, run in runs.items()}


def long_form(
    place: Path, rng: random.Random, kills: int, studies: int, say: Callable[[str], None]
) -> Counter[str]:
    """Everything: `kills` SIGKILLs of runs, `studies` of studies, signals, every write fault."""
    torture = Torture(place, rng)
    while torture.counts["SIGKILL of a run"] < kills:
        torture.kill_run(kills=5)
        say(f"{torture.counts['SIGKILL of a run']} of {kills} SIGKILLs of runs")
    for _ in range(max(1, kills // 10)):
        torture.signal_run(signal.SIGTERM)
        torture.signal_run(signal.SIGINT, twice=True)
    say("signals done")
    short = Torture(place / "short", rng, torture.counts, epochs=1, batch_size=32)
    for fault in LOSSES:
        for n in range(1, len(short.events) + 1):
            short.fail_write(n, fault)
        say(f"{len(short.events)} × {LOSSES[fault]} in a training done")
    study = StudyTorture(torture)
    while torture.counts["SIGKILL of a study"] < studies:
        study.kill_study(kills=4)
        say(f"{torture.counts['SIGKILL of a study']} of {studies} SIGKILLs of studies")
    step = max(1, len(study.events) * len(LOSSES) // max(1, studies))
    for i, n in enumerate(range(1, len(study.events) + 1, step)):
        study.fail_write(n, list(LOSSES)[i % 2])
    return torture.counts


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill, and count what survives.")
    parser.add_argument("--kills", type=int, default=200, help="SIGKILLs of runs")
    parser.add_argument("--studies", type=int, default=40, help="SIGKILLs of studies")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file for the counts")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        counts = long_form(
            Path(place), random.Random(options.seed), options.kills, options.studies,
            lambda line: print(f"{time.monotonic() - started:6.0f} s  {line}", flush=True),
        )  # fmt: skip
    for what, count in sorted(counts.items()):
        print(f"{count:5}  {what}")
    print("all of them ended with the bits of the run that nobody touched")
    if options.out:
        import torch

        from normlab.core.environment import describe_machine

        done = {
            "seed": options.seed,
            "seconds": round(time.monotonic() - started),
            "counts": dict(sorted(counts.items())),
            "environment": describe_machine(1, torch.device("cpu")),
        }
        options.out.write_text(json.dumps(done, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
