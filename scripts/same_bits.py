"""Train every recipe with every normaliser in two checkouts, and compare the results.

    python scripts/same_bits.py OLD_CHECKOUT NEW_CHECKOUT

For a change of structure that must not change a number: on the sample, two epochs, one thread.
The hash of the weights must be equal; losses and accuracies may differ in the last digit of a
double, and the largest such difference is printed. Both checkouts need compiled kernels, or
neither. Exit code 1 if anything differs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# What runs in each checkout: only names that have been there since the first release.
_RUN = """
import json, sys, tempfile, pathlib
import normlab
from normlab.recipes import RECIPES
from normlab.layers import NORMS

class Quiet:
    def before_training(self, *_): pass
    def after_step(self, *_): pass

cases = [(recipe, {"norm": norm}) for recipe in RECIPES if recipe != "pretrained" for norm in NORMS]
cases += [("fast84", {"ema": 0.99, "validation": 0.2}), ("notebook", {"ema": 0.99})]
cases += [("fast90", {"norm_position": "after"}), ("notebook", {"norm_position": "before"})]
cases += [("notebook", {"patience": 1, "epochs": 4})]
folder = pathlib.Path(tempfile.mkdtemp(dir=sys.argv[1]))
for number, (recipe, changes) in enumerate(cases):
    changes = {"epochs": 2, **changes}
    try:
        out = folder / str(number)
        run = normlab.train(
            recipe, data="sample", threads=1, out=out, observers=(Quiet(),), **changes
        )
    except normlab.UserError:  # instance normalisation of a vector
        print(json.dumps([f"{recipe} {changes}", "refused", []]), flush=True)
        continue
    history = [{k: v for k, v in row.items() if k != "seconds"} for row in run.history]
    keys = ("weights_sha256", "steps", "test_accuracy", "test_loss", "val_accuracy", "val_loss")
    result = {key: run.result[key] for key in keys}
    print(json.dumps([f"{recipe} {changes}", result, history]), flush=True)
"""
TOLERANCE = 1e-12


def results(checkout: Path, folder: str) -> dict[str, list[object]]:
    """What the cases give in `checkout`, by their names."""
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve() / "src")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", _RUN, folder],
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {name: [result, history] for name, result, history in rows}


def difference(a: object, b: object) -> float:
    """The largest difference of two nested results; infinite where they differ in kind."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return float("inf")
        return max((difference(a[key], b[key]) for key in a), default=0.0)
    if isinstance(a, list) and isinstance(b, list):
        if len(a) != len(b):
            return float("inf")
        return max((difference(x, y) for x, y in zip(a, b, strict=True)), default=0.0)
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b)
    return 0.0 if a == b else float("inf")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        old, new = results(options.old, folder), results(options.new, folder)
    worst, bad = 0.0, 0
    for name, values in old.items():
        found = difference(values, new.get(name))
        worst = max(worst, found)
        if found > TOLERANCE:
            bad += 1
            print(f"{name}: differs by {found:g}")
            print(f"  old {values}\n  new {new.get(name)}")
    print(f"{len(old) - bad} of {len(old)} trainings are equal; largest difference {worst:.2g}")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
