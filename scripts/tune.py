"""Train one variant of a recipe and score it on images held out of the training set.

    python scripts/tune.py fast79 --seed 3 epochs=2 "stages=((32,),(64,),(128,128))"

A tenth of the training images is held out, another one for each seed: the difference of two recipes
on one tenth is off by half a point, however many seeds. The test images are never looked at. Every
run is a line in docs/results/tuning.jsonl, whatever comes of it.
"""

import argparse
import ast
import json
import resource
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from normlab import recipes
from normlab.core.environment import describe_machine, settings
from normlab.data import ImageData, load
from normlab.data.batches import split_validation
from normlab.evaluation.forward import logits_of
from normlab.evaluation.scores import score
from normlab.kernels import Tiles
from normlab.layers import use_tiles
from normlab.models import MODELS
from normlab.training.loop import fit
from normlab.training.optimisers import make_optimizer
from normlab.training.state import Plan, State

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "tuning.jsonl"
NETWORK = ("components", "stages")  # of FastNet, not of a recipe


def parse(setting: str) -> tuple[str, Any]:
    """`name=value`, the value a Python literal or else a word."""
    name, _, value = setting.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def tune(
    name: str,
    wanted: Sequence[str],
    seed: int,
    threads: int,
    device: torch.device,
    images: ImageData,
) -> dict[str, Any]:
    """Train a variant; returns what it was, how it did on the images held out, and what it took."""
    changes = dict(map(parse, wanted))
    network = {name: changes.pop(name) for name in NETWORK if name in changes}
    recipe = recipes.get(name).override(**changes, validation=0.1)
    tenth = seed % 10  # lines without it held out the last one
    last = [np.roll(a, -(tenth + 1) * len(a) // 10, 0) for a in (images.x_train, images.y_train)]
    train, validation = split_validation(*last, recipe.validation)
    with settings(threads, device):
        started, processor = time.perf_counter(), time.process_time()
        model = partial(MODELS[recipe.model.name], **network)(
            norm=recipe.norm.name,
            norm_momentum=recipe.norm.momentum,
            norm_epsilon=recipe.norm.epsilon,
            logit_scale=recipe.model.logit_scale,
            seed=seed,
        ).to(device)
        use_tiles(model, Tiles(recipe.model.winograd, recipe.model.products == "bfloat16"))
        if hasattr(model, "fit_to"):
            model.fit_to(train.images)
        state = State(model=model, optimizer=make_optimizer(recipe.optimizer, model))
        plan = Plan(
            recipe=recipe,
            folder=None,
            seed=seed,
            threads=threads,
            train=train,
            validation=validation.__class__(validation.images[:0], validation.labels[:0]),
        )
        fit(plan, state, device)
        seconds, processor = time.perf_counter() - started, time.process_time() - processor
        found = score(model, validation.images, validation.labels)
        seen = {
            views: logits_of(model, validation.images, views=views).argmax(1).numpy()
            for views in ("shift", "unsure")
        }
    return {
        "recipe": recipe.as_dict() | network,
        "seed": seed,
        "tenth": tenth,
        "val_accuracy": found.accuracy,
        **{
            f"val_accuracy_{views}": float((answers == validation.labels).mean())
            for views, answers in seen.items()
        },
        "val_loss": found.loss,
        "seconds": round(seconds, 1),
        "processor_seconds": round(processor, 1),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "environment": describe_machine(threads, device),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("settings", nargs="*", metavar="name=value")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_intermixed_args()
    line = tune(
        *(arguments.recipe, arguments.settings, arguments.seed, arguments.threads),
        *(torch.device(arguments.device), load()),
    )
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with open(RESULTS, "a", encoding="utf-8") as f:
        f.write(json.dumps(line) + "\n")
    print(
        f"{line['val_accuracy']:.4f} {line['seconds']} s {line['processor_seconds']} cpu-s",
        arguments.settings,
        flush=True,
    )


if __name__ == "__main__":
    main()
