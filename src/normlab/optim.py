"""Optimisers and schedules: Keras' Adam on PyTorch's fused kernel, Muon for the fast recipes."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from normlab.recipes import Recipe


class Adam(torch.optim.Adam):
    """Adam exactly as Keras computes it (Kingma and Ba 2015, arXiv 1412.6980, end of section 2).

        m ← β₁·m + (1 − β₁)·g
        v ← β₂·v + (1 − β₂)·g²
        θ ← θ − lr·√(1 − β₂ᵗ)/(1 − β₁ᵗ) · m/(√v + ε)

    PyTorch adds its ε to √(v/(1 − β₂ᵗ)) instead, which is the same update when its ε is
    ε/√(1 − β₂ᵗ); so each step hands PyTorch's fused kernel that value.
    """

    def __init__(
        self,
        params: list[torch.nn.Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        keras_eps: float = 1e-7,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=keras_eps, fused=True)
        self.keras_eps = keras_eps

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter from its gradient."""
        for group in self.param_groups:
            done = self.state[group["params"][0]].get("step", 0)
            beta2 = group["betas"][1]
            group["eps"] = self.keras_eps / math.sqrt(1 - beta2 ** (int(done) + 1))
        super().step()


def orthogonalize(matrix: Tensor, iterations: int = 3) -> Tensor:
    """Move the singular values of `matrix` (rows, columns) towards 1, roughly, and fast.

    The quintic Newton–Schulz iteration X ← a·X + (b·A + c·A²)·X, A = X·Xᵀ, with the coefficients of
    Jordan et al. (2024), "Muon"; they trade accuracy for speed, and values end within 0.5 to 1.5.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / (wide.norm() + 1e-7)
    for _ in range(iterations):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    result: Tensor = x if wide is matrix else x.T
    return result


class Muon(torch.optim.Optimizer):
    """Momentum whose step for a convolution's kernel is orthogonalised; Nesterov SGD for the rest.

    A kernel W, as a matrix (filters, inputs·height·width), with gradient G and momentum μ:

        M ← μ·M + G
        W ← W·√filters/‖W‖ − lr·orthogonalize(G + μ·M)

    Every filter keeps a norm of about 1, so lr is an angle: how far a step turns the filters. Dense
    weights and vectors θ with gradient g, momentum m and weight decay λ:

        v ← m·v + g + λ·θ
        θ ← θ − r·(g + λ·θ + m·v)

    r is `sgd_lr` for dense weights and eight times that for biases, γ and β, whose λ is an eighth:
    rate times decay is one number for all (Jordan 2024, arXiv 2404.00498, section 3.4, has 64).
    """

    BIAS_FACTOR = 8

    def __init__(
        self,
        params: list[torch.nn.Parameter],
        lr: float = 0.15,
        momentum: float = 0.6,
        sgd_lr: float = 0.37,
        sgd_momentum: float = 0.85,
        weight_decay: float = 1.3e-3,
    ) -> None:
        dense = {"momentum": sgd_momentum, "orthogonal": False}
        factor = self.BIAS_FACTOR
        groups: list[dict[str, Any]] = [
            {"params": [p for p in params if p.ndim == 4], "lr": lr},
            {"params": [p for p in params if p.ndim == 2], "lr": sgd_lr, **dense},
            {"params": [p for p in params if p.ndim == 1], "lr": factor * sgd_lr, **dense},
        ]
        groups[2]["weight_decay"] = weight_decay / factor
        defaults = {"momentum": momentum, "weight_decay": weight_decay, "orthogonal": True}
        super().__init__([g for g in groups if g["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter from its gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                buffers = self.state[p]
                if "momentum" not in buffers:
                    buffers["momentum"] = torch.zeros_like(p)
                if group["orthogonal"]:
                    _turn(p, p.grad, buffers["momentum"], group)
                else:
                    _nesterov(p, p.grad, buffers["momentum"], group)


def _turn(p: Tensor, g: Tensor, buffer: Tensor, group: dict[str, Any]) -> None:
    buffer.mul_(group["momentum"]).add_(g)
    update = orthogonalize(g.add(buffer, alpha=group["momentum"]).flatten(1))
    p.mul_(math.sqrt(len(p)) / p.norm()).sub_(update.view_as(p), alpha=group["lr"])


def _nesterov(p: Tensor, g: Tensor, buffer: Tensor, group: dict[str, Any]) -> None:
    g = g.add(p, alpha=group["weight_decay"])
    buffer.mul_(group["momentum"]).add_(g)
    p.sub_(g.add(buffer, alpha=group["momentum"]), alpha=group["lr"])


def constant(done: float) -> float:
    """Share of the learning rate after the share `done` of the steps: all of it."""
    return 1.0


def triangle(done: float, start: float = 0.2, peak: float = 0.23, end: float = 0.07) -> float:
    """Share of the learning rate: straight up from `start` to 1 at `peak`, straight down to `end`.

    >>> [round(triangle(t), 3) for t in (0, 0.115, 0.23, 0.615, 1)]
    [0.2, 0.6, 1.0, 0.535, 0.07]
    """
    if done < peak:
        return start + (1 - start) * done / peak
    return end + (1 - end) * (1 - done) / (1 - peak)


SCHEDULES: dict[str, Callable[[float], float]] = {"constant": constant, "triangle": triangle}


def make_optimizer(recipe: Recipe, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Make the optimiser that the recipe names; `set_rate` moves its rates from step to step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer
    if recipe.optimizer == "muon":
        optimizer = Muon(trained, lr=recipe.learning_rate, sgd_lr=recipe.sgd_rate)
    elif recipe.optimizer == "sgd":
        optimizer = torch.optim.SGD(trained, lr=recipe.learning_rate, fused=True)
    else:
        optimizer = Adam(trained, lr=recipe.learning_rate)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Give every group of parameters `share` of the learning rate it was made with."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * share
