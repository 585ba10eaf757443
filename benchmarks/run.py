"""Run the benchmark, keep its samples, render its tables and pictures."""

import argparse
import multiprocessing
import os
import shlex
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import groups
from benchmarks.contestant import Options
from benchmarks.rounds import BenchError, Group, measure

ROOT = Path(__file__).parents[1]
QUIET_LOAD = 0.3  # a core


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds: under five minutes")
    parser.add_argument("--threads", type=int, default=None, help="of every peer (default: cores)")
    parser.add_argument("--data", default="cifar10", help="`sample` to try the benchmark itself")
    parser.add_argument("--out", type=Path, help="the JSON (default: in docs/results)")
    parser.add_argument("--only", help="one part: training, accuracy, layers, inference, start-up")
    return parser.parse_args()


def run(args: argparse.Namespace, threads: int, folder: Path) -> dict[str, Any]:
    """Measure every group; the result as it is kept."""
    started, load = time.time(), os.getloadavg()[0]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        machine = pool.submit(_prepare, folder, args.data, threads).result()
    options = Options(folder, threads, {})
    results: dict[str, Any] = {}

    def wanted(part: str) -> bool:
        return args.only in (None, part)

    def add(group: Group) -> None:
        print(f"{time.time() - started:5.0f} s  {group.key}", file=sys.stderr, flush=True)
        results[group.key] = measure(group, options)

    if wanted("training") or wanted("accuracy"):
        for batch in groups.BATCHES:
            add(groups.training(batch, args.data, args.quick))
    if wanted("accuracy"):
        faster = groups.faster_layout(results["training-32"])
        add(groups.accuracy(faster, args.data, args.quick))
    if wanted("layers"):
        add(groups.layers(args.quick))
    if wanted("inference"):
        for network in ("notebook", "fast79"):
            add(groups.inference(network, args.quick))
    result = {
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        "commit": _commit(),
        "quick": args.quick,
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "load_at_start": load,
        "quiet": load <= QUIET_LOAD * machine["cores"],
        "machine": machine,
        "groups": results,
    }
    if wanted("start-up"):
        from benchmarks.start_up import measure_start_up

        result["start_up"] = measure_start_up(args.data, threads, 2 if args.quick else 7)
    return {**result, "seconds": time.time() - started}


def _prepare(folder: Path, data: str, threads: int) -> dict[str, Any]:
    from benchmarks.prepare import prepare
    from normlab.errors import NormlabError

    try:
        return prepare(folder, data, threads)
    except NormlabError as e:
        raise BenchError(str(e)) from None


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def main() -> int:
    args = parse()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = args.threads or cores or 1
    # Every peer's OpenMP; set before any process of theirs begins.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    with tempfile.TemporaryDirectory(prefix="normlab-bench-") as scratch:
        try:
            result = run(args, threads, Path(scratch))
        except BenchError as e:
            print(f"benchmarks: {e}", file=sys.stderr)
            return 2
    from benchmarks.report import keep

    keep(result, args.out, ROOT)
    return 0
