"""Run the benchmark, keep its samples, render its tables and pictures."""

import argparse
import json
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
from benchmarks.entry import Options
from benchmarks.other_load import OtherLoad, is_quiet
from benchmarks.rounds import BenchError, Group, measure

ROOT = Path(__file__).parents[1]


PARTS = ("training", "accuracy", "layers", "inference", "start-up")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds: under five minutes")
    parser.add_argument("--threads", type=int, default=cores(), help="of every peer (all cores)")
    parser.add_argument("--data", default="cifar10", help="`sample` to try the benchmark itself")
    parser.add_argument("--out", type=Path, help="the JSON (in docs/results); leaves docs alone")
    parser.add_argument("--only", choices=PARTS, help="one part; accuracy needs training as well")
    parser.add_argument(
        "--render", action="store_true", help="measure nothing: docs/results/bench.json into docs"
    )
    args = parser.parse_args()
    if not 1 <= args.threads <= cores():
        parser.error(f"--threads {args.threads}: choose from 1 to {cores()}, this machine's cores")
    return args


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure what is asked for; the result as it is kept."""
    started, others = time.time(), OtherLoad()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        machine = pool.submit(_prepare, folder, args.data, args.threads).result()
    result = {
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        "commit": _commit(),
        "quick": args.quick,
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "machine": machine,
        "groups": measure_groups(args, Options(folder, args.threads, {})),
    }
    if args.only in (None, "start-up"):
        from benchmarks.start_up import measure_start_up

        rounds = 2 if args.quick else 7
        result["start_up"] = measure_start_up(args.data, args.threads, rounds)
    share = others.share()
    return {
        **result,
        "others_share": share,
        "quiet": is_quiet(share),
        "seconds": time.time() - started,
    }


def measure_groups(args: argparse.Namespace, options: Options) -> dict[str, Any]:
    """What `rounds.measure` returns, by the group's key."""
    results: dict[str, Any] = {}
    started = time.time()

    def add(group: Group) -> None:
        print(f"{time.time() - started:5.0f} s  {group.key}", file=sys.stderr, flush=True)
        results[group.key] = measure(group, options)

    if args.only in (None, "training", "accuracy"):
        for batch in groups.BATCHES:
            add(groups.training(batch, args.data, args.quick))
    if args.only in (None, "accuracy"):
        faster = groups.faster_layout(results["training-32"])
        add(groups.accuracy(faster, args.data, args.quick))
    if args.only in (None, "layers"):
        add(groups.layers(args.quick))
    if args.only in (None, "inference"):
        for network in ("notebook", "fast79"):
            add(groups.inference(network, args.quick))
    return results


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
    from benchmarks.report import keep, write_docs

    if args.render:
        kept = ROOT / "docs" / "results" / "bench.json"
        write_docs(json.loads(kept.read_text(encoding="utf-8")), ROOT)
        return 0
    # Every peer's OpenMP; set before any process of theirs begins.
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    with tempfile.TemporaryDirectory(prefix="normlab-bench-") as scratch:
        try:
            result = run(args, Path(scratch))
        except BenchError as e:
            print(f"benchmarks: {e}", file=sys.stderr)
            return 1
    keep(result, args.out, ROOT)
    return 0
