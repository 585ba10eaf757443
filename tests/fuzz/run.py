"""Fuzz the parsers of files: seeded changes to a corpus, until so many executions are done.

    python tests/fuzz/run.py all --out docs/results/fuzz.json
    python tests/fuzz/run.py npz --executions 10000 --seed 3

Each parser runs in a child process. A finding is an exception other than `UserError`, a crash, an
input that takes over two seconds of processor time, or more memory than the target may take. For a
parser that the package runs in a process with limits, the last three are what the limits are for:
they are counted. Without `--executions`: a million for parsers written here, 100,000 for
those of libraries.
"""

import argparse
import faulthandler
import hashlib
import json
import mmap
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from targets import CORPUS, TARGETS, Target, attempt

from normlab.core.sandbox import _limit

HANG = 2.0  # seconds of processor time
MAX_INPUT = 1 << 16
INTERESTING = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, (1 << 63) - 1)
PACKAGES = ("numpy", "pillow", "h5py", "pyarrow", "onnx", "protobuf", "safetensors", "torch")


class Shared:
    """What the child tells even if it dies: how far it is, and on which input."""

    def __init__(self) -> None:
        self.map = mmap.mmap(-1, MAX_INPUT * 2 + 24)

    def begin(self, count: int, data: bytes) -> None:
        self.map[: 16 + len(data)] = struct.pack("<QQ", count, len(data)) + data

    @property
    def passed(self) -> int:
        """Calls that passed the limit of memory."""
        return int(struct.unpack_from("<Q", self.map, MAX_INPUT * 2 + 16)[0])

    @passed.setter
    def passed(self, value: int) -> None:
        struct.pack_into("<Q", self.map, MAX_INPUT * 2 + 16, value)

    @property
    def count(self) -> int:
        return int(struct.unpack_from("<Q", self.map)[0])

    @property
    def data(self) -> bytes:
        (length,) = struct.unpack_from("<Q", self.map, 8)
        return self.map[16 : 16 + length]


def mutate(rng: random.Random, seeds: list[bytes], tokens: tuple[bytes, ...]) -> bytes:
    """One of the seeds with one to six changes."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.randint(1, rng.choice((1, 3, 6)))):
        kind, size = rng.randrange(9 if tokens else 8), len(data)
        at = rng.randrange(size + 1)
        if kind <= 1 and at < size:
            data[at] = rng.randrange(256)
        elif kind == 2 and at < size:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 3:
            number, width = rng.choice(INTERESTING), rng.choice((1, 2, 4, 8))
            whole = (number & ((1 << 8 * width) - 1)).to_bytes(width, rng.choice(("little", "big")))
            data[at : at + width] = whole
        elif kind == 4:
            del data[at : at + rng.randint(1, 16)]
        elif kind == 5:
            start = rng.randrange(size + 1)
            data[at:at] = data[start : start + rng.randint(1, 32)]
        elif kind == 6:
            other = rng.choice(seeds)
            start = rng.randrange(len(other) + 1)
            data[at : at + 24] = other[start : start + rng.randint(1, 64)]
        elif kind == 7 and rng.random() < 0.2:
            del data[at:]
        elif kind == 8:
            data[at : at + rng.randrange(12)] = rng.choice(tokens)
    return bytes(data[:MAX_INPUT]) or b"\0"


def child(target: Target, seed: int, begin: int, end: int, shared: Shared, found: Path) -> None:
    """Executions `begin` to `end`; never returns."""
    warnings.simplefilter("ignore")
    faulthandler.disable()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where libtiff complains
    seeds = [path.read_bytes() for path in sorted((CORPUS / target.name).iterdir())]
    seen: set[str] = set()
    with tempfile.TemporaryDirectory(dir=fast_folder()) as folder:
        path = Path(folder) / "x"
        for data in seeds:
            attempt(target, data, path)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if target.in_child:
            _limit(target.memory)
        rng = random.Random(f"{target.name} {seed} {begin}")
        for count in range(begin, end):
            data = mutate(rng, seeds, target.tokens)
            shared.begin(count, data)
            error = attempt(target, data, path)
            now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            if now - memory > target.memory >> 10:
                error, memory = MemoryError(f"{(now - memory) >> 10} MiB"), now
            if target.in_child and isinstance(error, MemoryError):
                shared.passed += 1  # one line where the package reads it
            elif error is not None:
                note(error, data, seen, found)
        shared.begin(end, b"")
    os._exit(0)


def fast_folder() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def note(error: Exception, data: bytes, seen: set[str], found: Path) -> None:
    """Keep the first input of each place that raises."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "fuzz" not in f.filename]
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    ours = next((f for f in reversed(frames) if "normlab" in f.filename), None)
    key = f"{type(error).__name__}: {error!s:.80} at {place}" + (
        f", {Path(ours.filename).name}:{ours.lineno}" if ours else ""
    )
    kind = f"{type(error).__name__} {place}"
    if kind not in seen:
        seen.add(kind)
        keep(found, key, data)


def keep(found: Path, key: str, data: bytes) -> None:
    name = f"found-{hashlib.sha256(data).hexdigest()[:8]}"
    (found / name).write_bytes(data)
    with (found / "keys.txt").open("a") as f:
        f.write(f"{name} {key}\n")
    print(f"  FOUND {name}: {key}", flush=True)


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def watch(pid: int, shared: Shared) -> str | None:
    """Wait for the child; what ended it too early, if anything did."""
    since, at = 0.0, -1
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return None if code == 0 else f"died: {code}"
        seconds = processor_seconds(pid)
        if shared.count != at:
            at, since = shared.count, seconds
        elif seconds - since > HANG and shared.data:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return f"takes over {HANG} s"
        time.sleep(0.05)


def fuzz(target: Target, executions: int, seed: int, found: Path) -> dict[str, object]:
    """Fuzz one parser; counts for the report."""
    found.mkdir(parents=True, exist_ok=True)
    started, done, passed = time.monotonic(), 0, 0
    ended: list[str] = []
    while done < executions:
        shared = Shared()
        pid = os.fork()
        if pid == 0:
            try:
                child(target, seed, done, executions, shared, found)
            finally:
                traceback.print_exc(file=sys.stdout)
                sys.stdout.flush()
                os._exit(1)
        problem = watch(pid, shared)
        done = shared.count
        passed += shared.passed
        if problem is not None:
            ended.append(problem)
            if not target.in_child:
                keep(found, problem, shared.data)
            elif len(ended) <= 5:
                (found / f"ended-{len(ended)}").write_bytes(shared.data)
            done += 1
    keys = found / "keys.txt"
    findings = keys.read_text().splitlines() if keys.exists() else []
    return {
        "written here": target.ours,
        "executions": done,
        "seconds": round(time.monotonic() - started, 1),
        "in a process with limits": target.in_child,
        "crashes": sum(problem.startswith("died") for problem in ended),
        "hangs": sum(problem.startswith("takes") for problem in ended),
        "over the limit of memory": passed,
        "findings": len(findings),
        "what": sorted({line.partition(" ")[2] for line in findings}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzz parsers.")
    parser.add_argument("parser", choices=("all", *TARGETS))
    parser.add_argument("--executions", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file for the counts")
    parser.add_argument("--found", type=Path, help="a folder for the inputs of findings")
    options = parser.parse_args()
    found = options.found or Path(tempfile.mkdtemp(prefix="fuzz-"))
    names = list(TARGETS) if options.parser == "all" else [options.parser]
    results: dict[str, object] = {}
    for name in names:
        target = TARGETS[name]
        executions = options.executions or (1_000_000 if target.ours else 100_000)
        results[name] = fuzz(target, executions, options.seed, found / name)
        print(name, results[name], flush=True)
        if options.out:
            document = {
                "seed": options.seed,
                "python": sys.version.split()[0],
                "versions": {package: version(package) for package in PACKAGES},
                "parsers": results,
            }
            options.out.write_text(json.dumps(document, indent=2) + "\n")
    print(f"inputs of findings are in {found}")
    raise SystemExit(any(result["findings"] for result in results.values()))  # type: ignore[index]


if __name__ == "__main__":
    main()
