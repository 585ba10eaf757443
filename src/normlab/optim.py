"""Keras' Adam on PyTorch's fused kernel."""

import math

import torch


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
