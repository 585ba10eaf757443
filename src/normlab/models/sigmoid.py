"""The network of figure 1 of the batch normalisation paper."""

from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from normlab.core.streams import stream
from normlab.errors import UserError
from normlab.layers import normalizer

SIDE, UNITS, HIDDEN = 28, 100, 3
STD = 0.1  # of the initial weights; the paper says "small random Gaussian values" and no more
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


class SigmoidNet(nn.Module):
    """Three dense layers of 100 sigmoids on 28 × 28 grey pixels (Ioffe and Szegedy 2015, 4.1).

    The normaliser stands between a dense layer and its sigmoid, so its output, or that of the
    `NoNorm` in its place, is the distribution that the paper's figure 1 (b, c) shows. Larger
    images are cut to their middle 28 × 28 pixels.

    Args:
        num_classes: K.
        image_size: H = W, at least 28.
        norm: a name in `normlab.layers.NORMS`.
        norm_position: of the normalisers, `before` the sigmoid, as if None, or `after` it.
        norm_momentum, norm_epsilon: of the normalisers; see `normlab.layers.normalizer`.
        logit_scale: factor of the last answers.
        seed: of the initial values.
    """

    luma: Tensor

    def __init__(
        self,
        *,
        num_classes: int = 10,
        image_size: int = 28,
        norm: str = "batch",
        norm_position: str | None = None,
        norm_momentum: float = 0.99,
        norm_epsilon: float = 1e-3,
        logit_scale: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.logit_scale = logit_scale
        place = partial(normalizer, norm, momentum=norm_momentum, epsilon=norm_epsilon)
        if image_size < SIDE:
            raise UserError(f"image size {image_size}: this network needs at least 28 × 28 pixels")
        self.norm_last = norm_position == "after"
        self.margin = (image_size - SIDE) // 2
        self.register_buffer("luma", torch.tensor(LUMA).view(1, 3, 1, 1), persistent=False)
        width = SIDE * SIDE
        for i in range(1, HIDDEN + 1):
            self.add_module(f"dense{i}", _gaussian(width, UNITS, stream(seed, "init", f"dense{i}")))
            self.add_module(f"norm{i}", place(UNITS))
            width = UNITS
        self.output = _gaussian(width, num_classes, stream(seed, "init", "output"))

    def forward(self, x: Tensor, rng: np.random.Generator | None = None) -> Tensor:
        """Logits (N, K) of pixels (N, 3, H, W) in [0, 1]; nothing in here is random."""
        a, b = self.margin, self.margin + SIDE
        h = (x[:, :, a:b, a:b] * self.luma).sum(1).flatten(1)  # (N, 784)
        for i in range(1, HIDDEN + 1):
            dense, norm = self.get_submodule(f"dense{i}"), self.get_submodule(f"norm{i}")
            h = dense(h)  # (N, 100)
            h = norm(torch.sigmoid(h)) if self.norm_last else torch.sigmoid(norm(h))
        logits: Tensor = self.output(h)  # (N, K)
        return logits if self.logit_scale == 1 else logits * self.logit_scale


def _gaussian(c_in: int, c_out: int, rng: np.random.Generator) -> nn.Linear:
    """A dense layer with weights from N(0, 0.1²) and biases 0."""
    dense = nn.Linear(c_in, c_out)
    if dense.weight.is_meta:  # its network is only measured
        return dense
    with torch.no_grad():
        dense.weight.copy_(torch.from_numpy(rng.normal(0, STD, (c_out, c_in))))
        nn.init.zeros_(dense.bias)
    return dense
