"""Optimisers: Adam as Keras computes it, Muon for the fast recipes, plain SGD.

Their numbers are declared in `normlab.recipes.optimizers`, under the same names.
"""

import math
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from normlab import kernels
from normlab.recipes import optimizers as recipes


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

    def __init__(self, params: list[torch.nn.Parameter], learning_rate: float) -> None:
        super().__init__([{"params": params}], lr=learning_rate)

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

    That is what the compiled pass does. Where it does not apply, PyTorch's
    fused kernel adds its ε to √(v/(1 − β₂ᵗ)) instead, which is the same update when its ε is
    ε/√(1 − β₂ᵗ); so each step hands it that value.
    """

    def __init__(
        self,
        params: list[torch.nn.Parameter],
        learning_rate: float = 1e-3,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-7,
    ) -> None:
        betas = beta1, beta2
        super().__init__([{"params": params}], lr=learning_rate, betas=betas, keras_eps=epsilon)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            ours: list[tuple[Tensor, ...]] = []
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                values = p, p.grad, state["exp_avg"], state["exp_avg_sq"], state["step"]
                if kernels.adapts(*values[:4]):
                    ours.append(values)
                else:
                    self._by_pytorch(*values, group)
            if ours:
                eps = group["keras_eps"]
                kernels.adam(ours, rate=group["lr"], betas=group["betas"], eps=eps)

    @staticmethod
    def _by_pytorch(
        p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: Tensor, group: dict[str, Any]
    ) -> None:
        step.add_(1)
        beta1, beta2 = group["betas"]
        torch._fused_adam_(
            *([p], [g], [m], [v], [], [step]),
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=0.0,
            eps=group["keras_eps"] / math.sqrt(1 - beta2 ** int(step)),
            amsgrad=False,
            maximize=False,
        )


ROWS_OF_BFLOAT16 = 128  # below, conversion takes what the faster products save


def orthogonalize(matrix: Tensor, iterations: int = 3, *, bfloat16: bool = False) -> Tensor:
    """Move the singular values of `matrix` (rows, columns) towards 1, roughly, and fast.

    The quintic Newton–Schulz iteration X ← B·X, B = a + b·A + c·A², A = X·Xᵀ, with the coefficients
    of Jordan et al. (2024), "Muon"; they trade accuracy for speed, and values end within 0.5 to
    1.5. Each B is a polynomial of the first A, so all are multiplied before X is: of the products
    two have X's longer side, instead of two an iteration. With `bfloat16` the products are bfloat16
    where the kernels' are, as in the authors' own program.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / (wide.norm() + 1e-7)
    many = len(x) >= ROWS_OF_BFLOAT16
    if bfloat16 and many and x.device.type == "cpu" and kernels.has_bfloat16():
        x = x.bfloat16()
    square = x @ x.T
    factors = None
    for left in range(iterations - 1, -1, -1):
        factor = torch.addmm(square, square, square, beta=b, alpha=c)
        factor.diagonal().add_(a)
        factors = factor if factors is None else factor @ factors
        if left:
            square = factor @ square @ factor
    x = x if factors is None else factors @ x
    result: Tensor = x if wide is matrix else x.T
    return result.to(matrix.dtype)


class Muon(Optimizer):
    """Momentum whose step for a convolution's kernel is orthogonalised; Nesterov SGD for the rest.

    A kernel W, as a matrix (filters, inputs·height·width), with gradient G and momentum μ:

        M ← μ·M + G
        W ← W·√filters/‖W‖ − lr·orthogonalize(G + μ·M)

    Every filter keeps a norm of about 1, so lr is an angle: how far a step turns the filters. Dense
    weights and vectors θ with gradient g, momentum m and weight decay λ:

        v ← m·v + g + λ·θ
        θ ← θ − r·(g + λ·θ + m·v)

    r is `sgd_rate` for dense weights and `bias_factor` times that for biases, γ and β, whose λ is
    so much smaller: rate times decay is one number for all (Jordan 2024, arXiv 2404.00498, section
    3.4, has a factor of 64).
    """

    def __init__(
        self,
        params: list[torch.nn.Parameter],
        learning_rate: float = 0.15,
        momentum: float = 0.6,
        newton_schulz_steps: int = 3,
        newton_schulz_products: str = "float32",
        sgd_rate: float = 0.37,
        sgd_momentum: float = 0.85,
        bias_factor: float = 8.0,
        weight_decay: float = 1.3e-3,
    ) -> None:
        dense = {"momentum": sgd_momentum, "orthogonal": False}
        groups: list[dict[str, Any]] = [
            {"params": [p for p in params if p.ndim == 4], "lr": learning_rate},
            {"params": [p for p in params if p.ndim == 2], "lr": sgd_rate, **dense},
            {"params": [p for p in params if p.ndim == 1], "lr": bias_factor * sgd_rate, **dense},
        ]
        groups[2]["weight_decay"] = weight_decay / bias_factor
        defaults = {"momentum": momentum, "weight_decay": weight_decay, "orthogonal": True}
        bfloat16 = newton_schulz_products == "bfloat16"
        super().__init__(groups, **defaults, steps=newton_schulz_steps, bfloat16=bfloat16)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                buffers = self.state[p]
                if "momentum" not in buffers:
                    buffers["momentum"] = torch.zeros_like(p)
                if group["orthogonal"]:
                    _turn_filters(p, p.grad, buffers["momentum"], group)
                else:
                    _nesterov(p, p.grad, buffers["momentum"], group)


def _turn_filters(p: Tensor, g: Tensor, buffer: Tensor, group: dict[str, Any]) -> None:
    buffer.mul_(group["momentum"]).add_(g)
    update = orthogonalize(
        g.add(buffer, alpha=group["momentum"]).flatten(1),
        group["steps"],
        bfloat16=group["bfloat16"],
    )
    p.mul_(math.sqrt(len(p)) / p.norm()).sub_(update.view_as(p), alpha=group["lr"])


def _nesterov(p: Tensor, g: Tensor, buffer: Tensor, group: dict[str, Any]) -> None:
    g = g.add(p, alpha=group["weight_decay"])
    buffer.mul_(group["momentum"]).add_(g)
    p.sub_(g.add(buffer, alpha=group["momentum"]), alpha=group["lr"])


# Which class carries out the settings of which kind.
OPTIMIZERS: dict[type, type[Any]] = {recipes.Adam: Adam, recipes.SGD: SGD, recipes.Muon: Muon}


def make_optimizer(settings: recipes.Optimizer, model: torch.nn.Module) -> Optimizer:
    """Make the optimiser of a recipe; `set_rate` moves its rates from step to step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: Optimizer = OPTIMIZERS[type(settings)](trained, **asdict(settings))
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def set_rate(optimizer: Optimizer, share: float) -> None:
    """Give every group of parameters `share` of the learning rate it was made with."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * share
