"""Optimisers and schedules: Keras' Adam on PyTorch's fused kernel, Muon for the fast recipes."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from normlab.recipes import Recipe


class Optimizer:
    """Parameters in groups with settings of their own, and a state for each parameter.

    As much of `torch.optim.Optimizer` as a training needs; the first object of that class costs a
    process more than a second, because it imports a compiler.

    Attributes:
        param_groups: each a dictionary with `params`, `lr` and further settings.
        state: tensors by parameter and name, in the order of the groups.
    """

    def __init__(self, groups: list[dict[str, Any]], **defaults: Any) -> None:
        self.param_groups = [{**defaults, **group} for group in groups if group["params"]]
        self.state: dict[Tensor, dict[str, Tensor]] = {
            p: {} for group in self.param_groups for p in group["params"]
        }

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for p in self.state:
            p.grad = None

    def step(self) -> None:
        """Update every parameter from its gradient."""
        raise NotImplementedError


class SGD(Optimizer):
    """θ ← θ − lr·g, nothing else."""

    def __init__(self, params: list[torch.nn.Parameter], lr: float) -> None:
        super().__init__([{"params": params}], lr=lr)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"])


class Adam(Optimizer):
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
        super().__init__([{"params": params}], lr=lr, betas=betas, keras_eps=keras_eps)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            states = [self.state[p] for p in params]
            for p, state in zip(params, states, strict=True):
                if not state:
                    state["step"] = torch.zeros((), device=p.device)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["step"] += 1
            beta1, beta2 = group["betas"]
            torch._fused_adam_(
                params,
                [p.grad for p in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=0.0,
                eps=group["keras_eps"] / math.sqrt(1 - beta2 ** int(states[0]["step"])),
                amsgrad=False,
                maximize=False,
            )


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


class Muon(Optimizer):
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
        super().__init__(groups, **defaults)

    @torch.no_grad()
    def step(self) -> None:
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


def to_zero(done: float) -> float:
    """Share of the learning rate: as `triangle`, but down to 0.

    >>> [round(to_zero(t), 3) for t in (0, 0.115, 0.23, 0.615, 1)]
    [0.2, 0.6, 1.0, 0.5, 0.0]
    """
    return triangle(done, end=0.0)


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": constant,
    "triangle": triangle,
    "to_zero": to_zero,
}


def make_optimizer(recipe: Recipe, model: torch.nn.Module) -> Optimizer:
    """Make the optimiser that the recipe names; `set_rate` moves its rates from step to step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: Optimizer
    if recipe.optimizer == "muon":
        optimizer = Muon(trained, lr=recipe.learning_rate, sgd_lr=recipe.sgd_rate)
    elif recipe.optimizer == "sgd":
        optimizer = SGD(trained, lr=recipe.learning_rate)
    else:
        optimizer = Adam(trained, lr=recipe.learning_rate)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def set_rate(optimizer: Optimizer, share: float) -> None:
    """Give every group of parameters `share` of the learning rate it was made with."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * share
