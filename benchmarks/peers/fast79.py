"""`fast79` from data to score: with normlab's layers, without its kernels, and on stock layers.

Stock layers are PyTorch's own convolution, normalisation and pooling in the same network. Recipe,
schedule, optimiser, data and settings stay normlab's, kept memory and channels-last included, so
that the difference is the layers alone.
"""

import tempfile
import time
from pathlib import Path

import torch

from benchmarks.entry import Case, Entry, Notes, Options
from benchmarks.peers.ours import CPU, allowed_kernels, answer_with, make_task, start
from benchmarks.peers.stock_layers import stock
from normlab import recipes
from normlab.evaluation.forward import logits_of
from normlab.recipes import Recipe
from normlab.training.checkpoint import Checkpoints
from normlab.training.loop import fit
from normlab.training.optimisers import make_optimizer
from normlab.training.preparation import make_plan, new_state


def training(options: Options) -> Entry:
    """Whole trainings, each from a new seed, and their scores on the test images.

    `seconds` are those that a run calls `train_seconds`: the network made, its whitening computed,
    trained to the last step with checkpoints on the way; without imports and the one scoring at the
    end.
    """
    model, about = start(options, "fast79")
    seed = 0

    def run(repeats: int) -> Notes:
        nonlocal seed
        with allowed_kernels(options):
            notes = _train(options, recipes.get("fast79"), seed)
        seed += 1
        return notes

    n = len(options.array("x_train"))
    return Entry({"": Case(run, n, whole=True)}, answer_with(model, options), about)


def _train(options: Options, recipe: Recipe, seed: int) -> Notes:
    task, images = make_task(options, recipe, seed)
    plan = make_plan(task, images, options.threads)
    started = time.perf_counter()
    state = new_state(task, images, CPU)
    if options.extra["layers"] == "stock":
        state.model = stock(state.model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        state.optimizer = make_optimizer(recipe.optimizer, state.model)
    state.seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as scratch:
        fit(plan, state, CPU, (Checkpoints(Path(scratch), state),))
    right = logits_of(state.model, images.x_test).argmax(1).numpy() == images.y_test
    return {"seconds": state.seconds, "seed": seed, "test_accuracy": float(right.mean())}
