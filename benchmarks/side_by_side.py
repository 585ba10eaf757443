"""Runs an hour: one after the other with every core, or as many side by side with one thread each.

    python -m benchmarks.side_by_side fast79 --out docs/results/side-by-side.json

Each round trains as many runs as there are cores, both ways, by the real command, from its start to
its end: loading, training and the test score. The ratio is taken within each round.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.other_load import OtherLoad, is_quiet
from normlab.core.cores import cores
from normlab.core.environment import describe_machine


def train(recipe: str, seed: int, threads: int, folder: Path) -> subprocess.Popen[bytes]:
    """Start one run."""
    out = str(folder / f"{threads}-threads-seed-{seed}")
    command = [sys.executable, "-m", "normlab", "train", recipe]
    options = ["--seed", str(seed), "--threads", str(threads), "--out", out]
    return subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL)


def ended(process: subprocess.Popen[bytes]) -> None:
    """Wait for a run, which must have succeeded."""
    if process.wait():
        raise SystemExit(f"{shlex.join(map(str, process.args))} failed")


def measure(recipe: str, rounds: int, runs: int, folder: Path) -> list[dict[str, float]]:
    """Seconds of every round, for `runs` runs each way."""
    samples = []
    for r in range(rounds):
        seeds = range(r * runs, (r + 1) * runs)
        started = time.perf_counter()
        for seed in seeds:
            ended(train(recipe, seed, runs, folder))
        between = time.perf_counter()
        for process in [train(recipe, seed, 1, folder) for seed in seeds]:
            ended(process)
        seconds = {
            "one_after_the_other": between - started,
            "side_by_side": time.perf_counter() - between,
        }
        print(json.dumps(seconds), flush=True)
        samples.append(seconds)
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    others, runs = OtherLoad(), cores()
    with tempfile.TemporaryDirectory() as scratch:
        samples = measure(options.recipe, options.rounds, runs, Path(scratch))
    share = others.share()
    ratios = [s["one_after_the_other"] / s["side_by_side"] for s in samples]
    result: dict[str, Any] = {
        "command": f"python -m benchmarks.side_by_side {options.recipe} --rounds {options.rounds}",
        "recipe": options.recipe,
        "runs_a_round": runs,
        "samples": samples,
        "runs_an_hour": {
            way: statistics.median(3600 * runs / s[way] for s in samples) for way in samples[0]
        },
        "ratio": {"median": statistics.median(ratios), "all": ratios},
        "others_share": share,
        "quiet": is_quiet(share),
        "machine": describe_machine(runs, torch.device("cpu")),
    }
    print(json.dumps({k: result[k] for k in ("runs_an_hour", "ratio", "quiet")}, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
