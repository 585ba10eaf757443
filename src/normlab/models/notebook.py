"""The seed notebook's network, layer for layer."""

from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from normlab.core.streams import stream
from normlab.errors import UserError
from normlab.layers import (
    Conv2d,
    Dense,
    Dropout,
    Flatten,
    MaxPool2d,
    conv_pool,
    norm_conv,
    normalizer,
    relu_dropout,
    relu_dropout_norm,
)


class NotebookNet(nn.Module):
    """Three convolutions and two dense layers, a normaliser before each of the five.

    Every layer's initial values come from a stream named after the layer, so networks with
    different `norm` start with the same kernels. ReLU comes after the pooling where the notebook
    has it before: the maximum commutes with it, and it touches a quarter of the values.

    Args:
        num_classes: K.
        image_size: H = W, at least 8.
        norm: a name in `normlab.layers.NORMS`.
        norm_position: `after` ReLU, pooling and dropout, right before the next layer with weights,
            as if None; or `before`: after pooling, before ReLU and dropout. The input's stays.
        norm_momentum, norm_epsilon: of the normalisers; see `normlab.layers.normalizer`.
        logit_scale: factor of the last answers.
        seed: of the initial values.
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        image_size: int = 32,
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
        if image_size < 8:
            raise UserError(f"image size {image_size}: this network needs at least 8 × 8 pixels")
        side = (image_size - 2) // 2 // 2
        self.norm_first = norm_position == "before"

        def rng(layer: str) -> np.random.Generator:
            return stream(seed, "init", layer)

        self.batch_normalization = place(3)
        self.conv1 = Conv2d(3, 32, padding=0, rng=rng("conv1"))
        self.dropout = Dropout(0.2)
        self.batch_normalization_1 = place(32)
        self.conv2 = Conv2d(32, 32, padding=1, rng=rng("conv2"))
        self.pool1 = MaxPool2d(2)
        self.batch_normalization_2 = place(32)
        self.conv3 = Conv2d(32, 64, padding=1, rng=rng("conv3"))
        self.pool2 = MaxPool2d(2)
        self.flatten = Flatten()
        self.dropout_1 = Dropout(0.2)
        self.batch_normalization_3 = place(side * side * 64)
        self.hidden = Dense(side * side * 64, 512, rng=rng("hidden"))
        self.dropout_2 = Dropout(0.2)
        self.batch_normalization_4 = place(512)
        self.output = Dense(512, num_classes, rng=rng("output"))

    def forward(self, x: Tensor, rng: np.random.Generator | None = None) -> Tensor:
        """Logits (N, K) of pixels (N, 3, H, W) in [0, 1]; `rng` draws the dropout masks."""
        x = x.contiguous(memory_format=torch.channels_last)  # convolutions and kernels like it so
        h = norm_conv(x, self.batch_normalization, self.conv1)  # (N, 32, 30, 30)
        h = self.activate(h, self.dropout, self.batch_normalization_1, rng)
        h = conv_pool(h, self.conv2, self.pool1)  # (N, 32, 15, 15)
        h = self.activate(h, None, self.batch_normalization_2)
        h = self.flatten(conv_pool(h, self.conv3, self.pool2))  # (N, 3136)
        h = self.activate(h, self.dropout_1, self.batch_normalization_3, rng)
        h = self.hidden(h)  # (N, 512)
        h = self.activate(h, self.dropout_2, self.batch_normalization_4, rng)
        logits: Tensor = self.output(h)  # (N, K)
        return logits if self.logit_scale == 1 else logits * self.logit_scale

    def activate(
        self,
        h: Tensor,
        dropout: Dropout | None,
        norm: nn.Module,
        rng: np.random.Generator | None = None,
    ) -> Tensor:
        """ReLU, dropout and normaliser in the order that `norm_position` asks for."""
        if self.norm_first:
            return relu_dropout(norm(h), dropout, rng)
        return relu_dropout_norm(h, dropout, norm, rng)
