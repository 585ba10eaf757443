"""The table of a network's layers that a Keras user expects."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Layer:
    """One line of the table."""

    name: str
    kind: str
    output_shape: tuple[int | None, ...]
    parameters: int


@dataclass(frozen=True)
class Summary:
    """Layers in the order they run, and the totals. Buffers count as not trainable, as in Keras."""

    layers: tuple[Layer, ...]
    trainable: int
    non_trainable: int

    @property
    def total(self) -> int:
        return self.trainable + self.non_trainable

    def __str__(self) -> str:
        rows = [
            (f"{x.name} ({x.kind})", str(x.output_shape), f"{x.parameters:,}") for x in self.layers
        ]
        rows.insert(0, ("Layer (type)", "Output shape", "Param #"))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows]
        rule = "─" * (sum(widths) + 4)
        return "\n".join(
            [
                lines[0],
                rule,
                *lines[1:],
                rule,
                f"Total params: {self.total:,}",
                f"Trainable params: {self.trainable:,}",
                f"Non-trainable params: {self.non_trainable:,}",
            ]
        )


def summarize(model: nn.Module, image_size: int = 32) -> Summary:
    """Describe `model` without touching it: shapes come from a run in evaluation mode.

    Counters of batches are bookkeeping, not parameters, and are left out.
    """
    layers: list[Layer] = []
    names = {module: name for name, module in model.named_modules()}

    def note(module: nn.Module, _: object, y: Tensor) -> None:
        shape = (None, *y.shape[2:], y.shape[1]) if y.ndim == 4 else (None, *y.shape[1:])
        size = sum(_sizes(module))
        layers.append(Layer(names[module], type(module).__name__, shape, size))

    leaves = [m for m in model.modules() if not list(m.children())]
    hooks = [m.register_forward_hook(note) for m in leaves if not isinstance(m, nn.Identity)]
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, image_size, image_size))
    finally:
        for module, mode in modes:
            module.training = mode
        for hook in hooks:
            hook.remove()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Summary(tuple(layers), trainable, sum(_sizes(model)) - trainable)


def _sizes(module: nn.Module) -> list[int]:
    return [
        t.numel() for name, t in module.state_dict().items() if "num_batches_tracked" not in name
    ]
