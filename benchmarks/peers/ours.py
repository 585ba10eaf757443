"""normlab's networks, under the settings that `normlab train` makes.

What `layers` of an entry says: `normlab`; `no kernels`, the same without what is compiled when the
package is installed; `stock`, PyTorch's own layers in the network of `fast79`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from benchmarks.entry import (
    Case,
    Entry,
    Images,
    Options,
    Probabilities,
    batches,
    inference_cases,
)
from benchmarks.networks import build_prepared
from benchmarks.peers.plain_pytorch import use_threads
from benchmarks.peers.stock_layers import stock
from normlab import kernels, recipes
from normlab.core.streams import streams
from normlab.data import ImageData, load
from normlab.data.augment import to_input
from normlab.data.batches import split_validation
from normlab.evaluation.scores import score
from normlab.kernels.memory import keep_freed_memory
from normlab.recipes import Recipe
from normlab.runs import Task
from normlab.training.captured import Captured
from normlab.training.optimisers import make_optimizer
from normlab.training.preparation import make_plan
from normlab.training.step import train_step

CPU = torch.device("cpu")


def start(options: Options, network: str) -> tuple[nn.Module, dict[str, Any]]:
    """The network with the prepared weights, and what to tell of it."""
    about = use_threads(options.threads)
    keep_freed_memory()
    model = build_prepared(options, network)
    if options.extra["layers"] == "stock":
        model = stock(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with allowed_kernels(options):
        about["compiled_kernels"] = kernels.available()
    return model, about


def allowed_kernels(options: Options) -> AbstractContextManager[None]:
    """Compiled kernels where the entry has them, none elsewhere."""
    return nullcontext() if options.extra["layers"] == "normlab" else kernels.disabled()


def make_task(options: Options, recipe: Recipe, seed: int = 0) -> tuple[Task, ImageData]:
    """What to train, and the images."""
    images = load(options.extra["data"])
    task = Task(
        recipe=recipe,
        seed=seed,
        data=images.name,
        data_sha256=images.sha256,
        class_names=images.class_names,
        image_size=images.x_train.shape[1],
    )
    return task, images


def training(options: Options) -> Entry:
    """The body of `normlab.training.loop.fit`, step by step."""
    model, about = start(options, "notebook")
    recipe = recipes.get("notebook").override(batch_size=options.extra["batch"])
    task, images = make_task(options, recipe)
    optimizer = make_optimizer(recipe.optimizer, model)
    plan = make_plan(task, images, options.threads)
    data, network = plan.batches(CPU), Captured(model)
    done = 0

    def run(repeats: int) -> None:
        nonlocal done
        model.train()
        with allowed_kernels(options):
            rngs = streams(0, "dropout", numbers=range(done, done + repeats))
            for step, rng in enumerate(rngs, done):
                x, labels = data(step)
                train_step(network, optimizer, x, labels, rng)
        done += repeats

    return Entry({"": Case(run, recipe.batch_size)}, answer_with(model, options), about)


def validation(options: Options) -> Entry:
    """What `fit` does after an epoch."""
    model, about = start(options, "notebook")
    _, images = make_task(options, recipes.get("notebook"))
    _, held_out = split_validation(images.x_train, images.y_train, 0.1)

    def run(repeats: int) -> None:
        with allowed_kernels(options):
            for _ in range(repeats):
                score(model, held_out.images, held_out.labels)

    return Entry({"": Case(run, len(held_out))}, answer_with(model, options), about)


def answer_with(model: nn.Module, options: Options) -> Callable[..., Probabilities]:
    def answer(images: Images, batch: int = 256) -> Probabilities:
        model.eval()
        with torch.inference_mode(), allowed_kernels(options):
            parts = [model(to_input(x)).softmax(1) for x in batches(images, batch)]
            return torch.cat(parts).numpy()

    return answer


def predict(options: Options) -> Entry:
    """Evaluation mode without gradients."""
    model, about = start(options, options.extra["network"])
    answer = answer_with(model, options)
    return Entry(inference_cases(answer, options.array("x_test"), 1024), answer, about)
