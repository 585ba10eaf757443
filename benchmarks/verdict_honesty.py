"""Does the verdict keep its promise? Simulated studies of an arm with itself.

Every simulated study draws both arms from the same distribution and goes through `judge`, the
function that real studies use. A winner may then be named in at most 5 % of studies, and the
intervals must cover the true difference, zero, in at least 95 %, each within three Monte-Carlo
standard errors of that limit. Covering more is allowed.

    python benchmarks/verdict_honesty.py --studies 20000 --jobs 2

writes docs/results/verdict-honesty.json and exits with 1 if a limit is broken. The numbers do
not depend on the number of jobs.
"""

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray

from normlab.statistics import Contrast, judge, level_of_look

RESULT = Path(__file__).parents[1] / "docs" / "results" / "verdict-honesty.json"
SEED = 20150211  # the day of arXiv 1502.03167
BATCH = 500  # studies that share a generator and are simulated as one task
LIMIT = 0.05

# Accuracies (n,) of one arm: 79 % with a spread over seeds of about half a point.
ARMS: dict[str, Callable[[np.random.Generator, int], NDArray[np.float64]]] = {
    "normal": lambda generator, n: 0.79 + 0.005 * generator.standard_normal(n),
    "t3": lambda generator, n: 0.79 + 0.005 * generator.standard_t(3, n),
    # 100 test images: a quarter of the differences is zero, most others tied
    "ties": lambda generator, n: (79 + np.rint(generator.standard_normal(n))) / 100,
}
DESIGNS: dict[str, tuple[int, ...]] = {  # pairs at each look
    "looks at 6, 12, 24": (6, 12, 24),
    "6 pairs": (6,),
    "10 pairs": (10,),
    "30 pairs": (30,),
}


def simulate(arm: str, looks: tuple[int, ...], seed: list[int], studies: int) -> NDArray[np.bool_]:
    """Run studies of an arm with itself; return (studies, looks, 2): winner named, zero covered."""
    generator = np.random.default_rng(seed)
    outcome = np.empty((studies, len(looks), 2), bool)
    for study in range(studies):
        first, other = (ARMS[arm](generator, looks[-1]) for _ in range(2))
        for look, n in enumerate(looks):
            contrast = Contrast(arm, f"{arm} again", (first - other)[:n])
            [result] = judge([contrast], look=look + 1, generator=generator)
            lower, upper = result.interval
            outcome[study, look] = result.verdict in ("better", "worse"), lower <= 0 <= upper
    return outcome


def summarise(arm: str, design: str, outcome: NDArray[np.bool_]) -> dict[str, Any]:
    """Rates of one cell beside their limits; a winner on any look counts, once."""
    studies = len(outcome)
    error = math.sqrt(LIMIT * (1 - LIMIT) / studies)
    winner = outcome[:, :, 0].any(axis=1).mean()
    covered = outcome[:, :, 1].all(axis=1).mean()
    return {
        "arm": arm,
        "design": design,
        "studies": studies,
        "winner_named": round(float(winner), 5),
        "winner_limit": round(LIMIT + 3 * error, 5),
        "all_intervals_cover": round(float(covered), 5),
        "coverage_limit": round(1 - LIMIT - 3 * error, 5),
        "looks": [
            {
                "pairs": n,
                "level": level_of_look(look + 1),
                "winner_named": round(float(outcome[:, look, 0].mean()), 5),
                "interval_covers": round(float(outcome[:, look, 1].mean()), 5),
            }
            for look, n in enumerate(DESIGNS[design])
        ],
        "passed": bool(winner <= LIMIT + 3 * error and covered >= 1 - LIMIT - 3 * error),
    }


def run(studies: int, jobs: int) -> list[dict[str, Any]]:
    """Simulate every arm under every design."""
    cells = [(arm, design) for arm in ARMS for design in DESIGNS]
    with ProcessPoolExecutor(jobs) as pool:
        pending = [
            [
                pool.submit(
                    simulate, arm, DESIGNS[design], [SEED, cell, at], min(BATCH, studies - at)
                )
                for at in range(0, studies, BATCH)
            ]
            for cell, (arm, design) in enumerate(cells)
        ]
        results = []
        for (arm, design), batches in zip(cells, pending, strict=True):
            outcome = np.concatenate([batch.result() for batch in batches])
            results.append(summarise(arm, design, outcome))
            print(
                "{arm:7} {design:19} winner {winner_named:.4f}  all cover "
                "{all_intervals_cover:.4f}  passed {passed}".format(**results[-1]),
                flush=True,
            )
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=20_000, help="per arm and design")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    start = time.perf_counter()
    results = run(options.studies, options.jobs)
    report = {
        "what": "studies of an arm with itself: winners named and coverage of zero",
        "command": f"python benchmarks/verdict_honesty.py --studies {options.studies} "
        f"--jobs {options.jobs}",
        "seconds": round(time.perf_counter() - start, 1),
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "scipy": scipy.__version__,
        },
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "seed": SEED,
        "passed": all(result["passed"] for result in results),
        "results": results,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
