"""normlab's networks as their recipes make them."""

import torch
from torch import nn

from benchmarks.entry import Options
from normlab import recipes
from normlab.runs import Task

CLASSES = 10
SIZE = 32  # pixels


def build(network: str) -> nn.Module:
    """The network of the recipe of that name, with its initial values."""
    task = Task(
        recipe=recipes.get(network),
        seed=0,
        data="",
        data_sha256="",
        class_names=tuple(map(str, range(CLASSES))),
        image_size=SIZE,
    )
    return task.build()


def build_prepared(options: Options, network: str) -> nn.Module:
    """The same with the prepared weights."""
    model = build(network)
    weights = options.weights(network)
    model.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})
    return model
