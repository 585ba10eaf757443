"""Networks by name."""

from collections.abc import Callable
from functools import partial

from torch import nn

from normlab.models.fast import FastNet
from normlab.models.notebook import NotebookNet
from normlab.models.sigmoid import SigmoidNet
from normlab.models.summary import Summary, summarize

MODELS: dict[str, Callable[..., nn.Module]] = {
    "notebook": NotebookNet,
    "fast": FastNet,
    "fast-wide": partial(FastNet, components=16, stages=((32, 32), (128, 128), (128, 128))),
    "fast-wider": partial(FastNet, components=16, stages=((64, 64), (256, 256), (256, 256))),
    "sigmoid": SigmoidNet,
}

__all__ = ["MODELS", "FastNet", "NotebookNet", "SigmoidNet", "Summary", "summarize"]
