"""Train a recipe from seeds 0…n−1 on all training images and keep every test score.

    python -m benchmarks.headline fast79 --seeds 10
    python -m benchmarks.headline fast79 --seeds 10 --norm none
    python -m benchmarks.headline fast84 --seeds 1 --no-kernels

One JSON a run in docs/results/headline/RECIPE/; seeds that have theirs are not run again. A time
counts only where the machine was `quiet`: nobody else took more than 5 % of it meanwhile.
"""

import argparse
import resource
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import normlab
from benchmarks.other_load import OtherLoad, is_quiet
from normlab import kernels, recipes
from normlab.core.files import write_json
from normlab.core.records import read_json
from normlab.data.augment import VIEWS
from normlab.errors import UserError
from normlab.recipes import Recipe
from normlab.runs import Run

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "headline"


def record(run: Run, others: float | None) -> dict[str, Any]:
    """What is kept of a run."""
    result, flip = run.result or {}, run.evaluate(views="flip")
    looked = {}
    for views in ("shift", "unsure"):
        started = time.perf_counter()
        looked[f"test_accuracy_{views}"] = run.evaluate(views=views).accuracy
        looked[f"{views}_seconds"] = time.perf_counter() - started
    return {
        "recipe": run.task.recipe.as_dict(),
        "seed": run.task.seed,
        "test_accuracy": result["test_accuracy"],
        "test_loss": result["test_loss"],
        "test_accuracy_flip": flip.accuracy,
        **looked,
        "view_weights": VIEWS["shift"],
        "train_seconds": result["train_seconds"],
        "data_seconds": result["data_seconds"],
        "evaluation_seconds": result["evaluation_seconds"],
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "others_share": others,
        "quiet": is_quiet(others),
        "weights_sha256": result["weights_sha256"],
        "compiled_kernels": kernels.available(),
        "environment": run.environment,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--norm")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--first", type=int, default=0, help="seed to begin with")
    parser.add_argument("--no-kernels", action="store_true", help="as without a compiler")
    arguments = parser.parse_args()
    try:
        recipe = recipes.get(arguments.recipe).override(norm=arguments.norm)
    except UserError as e:
        parser.error(str(e))
    name = recipe.name if recipe.norm.name == "batch" else f"{recipe.name}-{recipe.norm.name}"
    folder = RESULTS / (f"{name}-no-kernels" if arguments.no_kernels else name)
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(arguments.first, arguments.seeds):
        target = folder / f"seed-{seed}.json"
        if not target.exists():
            others = OtherLoad()
            allowed = kernels.disabled() if arguments.no_kernels else nullcontext()
            with tempfile.TemporaryDirectory() as scratch, allowed:
                run = normlab.train(recipe, out=scratch, seed=seed, threads=arguments.threads)
                write_json(target, record(run, others.share()))
        kept = read_json(target)
        if Recipe.from_dict(kept["recipe"]) != recipe:
            parser.error(f"{target} is of another recipe than today's: move its folder away")
        print(f"seed {seed}: {kept['test_accuracy']:.4f} in {kept['train_seconds']:.1f} s")
    kept = [read_json(path) for path in sorted(folder.glob("seed-*.json"))]
    scores = [k["test_accuracy"] for k in kept]
    spread = statistics.stdev(scores) if len(scores) > 1 else float("nan")
    print(f"{statistics.mean(scores):.4f} ± {spread:.4f} (standard deviation), n = {len(scores)}")


if __name__ == "__main__":
    main()
