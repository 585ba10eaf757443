"""The layer alone, forward and backward: `normlab.BatchNorm` or `torch.nn.BatchNorm1d` and `2d`.

Both keep freed memory, so that the difference is the layer alone.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.entry import Case, Entry, Options
from benchmarks.peers.plain_pytorch import use_threads
from normlab import kernels
from normlab.kernels.memory import keep_freed_memory
from normlab.layers import BatchNorm

LAYOUTS = {"channels-first": torch.contiguous_format, "channels-last": torch.channels_last}
Shape = tuple[int, ...]


def shapes(batch: int) -> list[tuple[Shape, str]]:
    """The inputs of the notebook's five normalisers, and how they lie in memory."""
    images = [(batch, 3, 32, 32), (batch, 32, 30, 30), (batch, 32, 15, 15)]
    return [
        *((shape, layout) for shape in images for layout in LAYOUTS),
        ((batch, 3136), "dense"),
        ((batch, 512), "dense"),
    ]


def tensors(shape: Shape, layout: str) -> tuple[Tensor, Tensor]:
    """An input and the gradient that comes back to its layer's output."""
    x, g = torch.randn(shape), torch.randn(shape)
    if layout in LAYOUTS:
        x, g = (t.contiguous(memory_format=LAYOUTS[layout]) for t in (x, g))
    return x.requires_grad_(), g


def layers(options: Options) -> Entry:
    """A case for each shape and layout."""
    about = use_threads(options.threads)
    keep_freed_memory()
    torch.manual_seed(0)
    about["compiled_kernels"] = kernels.available() and options.extra["layer"] == "normlab"
    cases = {}
    for batch in (32, 256):
        for shape, layout in shapes(batch):
            sizes = " × ".join(map(str, shape))
            cases[f"{sizes}, {layout}"] = Case(_timed(options, shape, layout), batch)
    return Entry(cases, None, about)


def _timed(options: Options, shape: Shape, layout: str) -> Callable[[int], None]:
    norm: nn.Module
    if options.extra["layer"] == "normlab":
        norm = BatchNorm(shape[1])
    else:
        norm = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(shape[1])
    parameters = list(norm.parameters())
    held: list[Tensor] = []

    def run(repeats: int) -> None:
        if not held:  # made when they are first needed, as in a training
            held.extend(tensors(shape, layout))
        x, g = held
        for _ in range(repeats):
            torch.autograd.grad(norm(x), [x, *parameters], g)

    return run
