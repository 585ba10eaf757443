"""How long a training takes beside other programs, and what waiting threads change about it.

    python -m benchmarks.beside [--recipe fast79] [--rounds 5]

Trains by the command line: alone, beside a program that keeps one core busy, and twice at once;
each with what `normlab` chooses by itself, and with threads that wait awake as long as libgomp's
default has them wait (GOMP_SPINCOUNT=300000). Written to docs/results/beside.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

from benchmarks.summary import spread, table
from normlab.core.files import write_json
from normlab.core.machine import describe_host

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "beside.json"
CHOICES = {"chosen": {}, "awake": {"GOMP_SPINCOUNT": "300000"}}
CASES = {"alone": (1, 0), "beside one busy program": (1, 1), "two at once": (2, 0)}


def trained(recipe: str, times: int, busy: int, environment: dict[str, str]) -> float:
    """Training seconds of the slowest of `times` trainings, beside so many `busy` programs."""
    with ExitStack() as stack:
        for _ in range(busy):
            hog = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.callback(hog.wait)
            stack.callback(hog.kill)
        folders = [stack.enter_context(tempfile.TemporaryDirectory()) for _ in range(times)]
        runs = [
            subprocess.Popen(
                [sys.executable, "-m", "normlab", "train", recipe, "--out", f"{folder}/run"],
                env=os.environ | environment,
                stdout=subprocess.DEVNULL,
            )
            for folder in folders
        ]
        codes = [run.wait() for run in runs]
        if any(codes):
            raise SystemExit("a training failed")
        found = [json.loads(Path(f, "run", "result.json").read_text()) for f in folders]
        return max(float(result["train_seconds"]) for result in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="fast79")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    seconds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for _ in range(options.rounds):
        for case, (times, busy) in CASES.items():
            for choice, environment in CHOICES.items():
                took = trained(options.recipe, times, busy, environment)
                seconds[case][choice].append(took)
                print(f"{case}, {choice}: {took:.1f} s", flush=True)
    result = {"recipe": options.recipe, "seconds": seconds, "environment": describe_host()}
    write_json(RESULTS, result)
    rows = []
    for case, by_choice in seconds.items():
        found = [spread(values) for values in by_choice.values()]
        rows.append([case, *(f"{s.median:.1f} ({s.low:.1f} to {s.high:.1f})" for s in found)])
    print(table(["", *CHOICES], rows))


if __name__ == "__main__":
    main()
