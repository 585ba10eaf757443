"""A network built for the clock: few channels where maps are large, many where they are small.

Pixels are whitened in patches of 3 × 3 by a convolution that is computed from the training images
and never trained, so no gradient is ever needed with respect to pixels or to whitened patches.
Pooling comes before the normaliser and ReLU, which then touch a quarter of the values.

Whitening and identity filters follow airbench (Jordan 2024, arXiv 2404.00498, sections 3.1 to 3.2).
"""

from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import conv2d, relu

from normlab import kernels
from normlab.core.streams import stream
from normlab.errors import UserError
from normlab.layers import (
    Conv2d,
    MaxPool2d,
    NoNorm,
    conv_pool,
    norm_add_relu,
    norm_relu,
    normalizer,
)

PATCH = 3  # pixels, high and wide
STATISTICS_IMAGES = 1_000  # of 32 × 32; of larger ones fewer, for as many patches


class Whitening(nn.Module):
    """Uncorrelated features of patches and their negatives, after ReLU.

    The filters are the leading eigenvectors e of the covariance of the patches, divided by the
    standard deviation along them: e/√(λ + ε). Nothing here is trained.

    Args:
        components: eigenvectors; the output has twice as many channels.
    """

    mean: Tensor
    kernel: Tensor

    def __init__(self, components: int) -> None:
        super().__init__()
        self.components = components
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("kernel", torch.zeros(2 * components, 3, PATCH, PATCH))

    @torch.no_grad()
    def fit(self, x: Tensor, eps: float = 3e-5) -> None:
        """Compute mean and filters from pixels `x` (N, 3, H, W) in [0, 1]."""
        self.mean.copy_(x.mean((0, 2, 3)))
        # On the processor, whatever the device: an eigenvector's sign is the library's choice.
        variances, vectors = torch.linalg.eigh(covariance(x - self.mean.view(3, 1, 1)).cpu())
        leading = vectors.flip(1)[:, : self.components]  # (27, components)
        scale = (variances.flip(0)[: self.components].clamp_min(0) + eps).rsqrt()
        kernel = (leading * scale).T.reshape(-1, 3, PATCH, PATCH)
        self.kernel.copy_(torch.cat([kernel, -kernel]))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) → (N, 2·components, H, W)."""
        if kernels.whitens(x, self.kernel):
            return kernels.whiten(x, self.mean, self.kernel)
        return conv2d(x - self.mean.view(3, 1, 1), self.kernel, padding=PATCH // 2).relu_()


def covariance(x: Tensor) -> Tensor:
    """Covariance (27, 27), float64, of the patches of `x` (N, 3, H, W), whose means are about 0.

    Products of a few images at a time are summed in float32, which is exact enough and fast.
    """
    values = 3 * PATCH * PATCH
    total, products = x.new_zeros(values).double(), x.new_zeros(values, values).double()
    count = 0
    for first in range(0, len(x), 50):
        patches = patches_of(x[first : first + 50])
        total += patches.sum(0)
        products += patches.T @ patches
        count += len(patches)
    mean = total / count
    return products / count - torch.outer(mean, mean)


def patches_of(x: Tensor) -> Tensor:
    """Patches of `x` (N, 3, H, W) that lie wholly inside, as rows (patches, 27)."""
    windows = x.unfold(2, PATCH, 1).unfold(3, PATCH, 1)
    return windows.permute(0, 2, 3, 1, 4, 5).flatten(0, 2).flatten(1)


class Block(nn.Module):
    """3 × 3 convolution, pooling if asked for, normaliser, ReLU; or ReLU, then normaliser.

    With `skips` the input is added right before the ReLU (He et al. 2016, arXiv 1512.03385,
    equation 1). The first filters start as the identity of the block's input, the others
    Glorot-uniform. With a normaliser the convolution has no bias: the normaliser's β is one.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        *,
        pooled: bool,
        skips: bool,
        norm: nn.Module,
        norm_position: str | None,
        rng: np.random.Generator,
    ) -> None:
        super().__init__()
        self.conv = Conv2d(c_in, c_out, padding=1, bias=isinstance(norm, NoNorm), rng=rng)
        with torch.no_grad():
            nn.init.dirac_(self.conv.weight[: min(c_in, c_out)])
        self.pool = MaxPool2d(2) if pooled else nn.Identity()
        self.norm = norm
        self.norm_last = norm_position == "after"
        self.skips = skips

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) → (N, C_out, H, W), or half of H and W when pooled."""
        h = conv_pool(x, self.conv, self.pool)
        if self.skips:
            return self.norm(relu(h + x)) if self.norm_last else norm_add_relu(h, self.norm, x)
        y: Tensor = self.norm(relu(h)) if self.norm_last else norm_relu(h, self.norm)
        return y


class FastNet(nn.Module):
    """Whitened patches, stages of blocks, the maximum over all positions, a linear layer.

    A stage's first block pools, so each stage works on maps of half the height and width of those
    before; whatever follows in a stage leaves the size as it is. From its third block on, each adds
    its input (as in airbench96, Jordan 2024).

    Every layer's initial values come from a stream named after the layer, so networks with
    different `norm` start with the same kernels. Any image size from 2ˢ⁺¹ pixels on will do, with S
    stages (16 with three), and a
    trained network takes images of other sizes.

    Args:
        num_classes: K.
        image_size: H = W, at least 2ˢ⁺¹.
        norm: a name in `normlab.layers.NORMS`.
        norm_position: of each block's, `before` the ReLU, as if None, or `after` it.
        norm_momentum, norm_epsilon: of the normalisers; see `normlab.layers.normalizer`.
        logit_scale: factor of the last answers.
        seed: of the initial values.
        components: of the whitening.
        stages: channels of the blocks of each stage; where there are three or more, the same from
            the second on.
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        image_size: int = 32,
        norm: str = "batch",
        norm_position: str | None = None,
        norm_momentum: float = 0.6,
        norm_epsilon: float = 1e-3,
        logit_scale: float = 1 / 3,
        seed: int = 0,
        components: int = 12,
        stages: tuple[tuple[int, ...], ...] = ((16,), (64,), (128, 128)),
    ) -> None:
        super().__init__()
        least = 2 ** (len(stages) + 1)
        if image_size < least:
            raise UserError(
                f"image size {image_size}: this network needs at least {least} × {least} pixels"
            )
        self.logit_scale = logit_scale
        self.whitening = Whitening(components)
        c_in = 2 * components
        blocks: list[Block] = []
        for stage in stages:
            for place, c_out in enumerate(stage):
                rng = stream(seed, "init", f"block{len(blocks) + 1}")
                block = Block(
                    *(c_in, c_out),
                    pooled=place == 0,
                    skips=place >= 2,
                    norm=normalizer(norm, c_out, momentum=norm_momentum, epsilon=norm_epsilon),
                    norm_position=norm_position,
                    rng=rng,
                )
                blocks.append(block)
                c_in = c_out
        self.blocks = nn.Sequential(*blocks)
        self.output = nn.Linear(c_in, num_classes, bias=False)
        if self.output.weight.is_meta:  # the network is only measured
            return
        limit = c_in**-0.5
        values = stream(seed, "init", "output").uniform(-limit, limit, (num_classes, c_in))
        with torch.no_grad():
            self.output.weight.copy_(torch.from_numpy(values))

    def fit_to(self, images: NDArray[np.uint8]) -> None:
        """Compute the whitening from training images (N, H, W, 3), evenly chosen among them."""
        count = max(1, STATISTICS_IMAGES * 32 * 32 // (images.shape[1] * images.shape[2]))
        chosen = images[:: -(-len(images) // count)]
        x = torch.from_numpy(np.array(chosen)).to(self.output.weight.device)
        self.whitening.fit(x.permute(0, 3, 1, 2).float() / 255)

    def forward(self, x: Tensor, rng: np.random.Generator | None = None) -> Tensor:
        """Logits (N, K) of pixels (N, 3, H, W) in [0, 1]; `rng` is not used: no dropout here."""
        return self.classify(self.features(x))

    def features(self, x: Tensor, rng: np.random.Generator | None = None) -> Tensor:
        """Features of pixels: (N, 128, 4, 4) for images of 32 × 32."""
        h = self.whitening(x.contiguous(memory_format=torch.channels_last))  # (N, 24, 32, 32)
        features: Tensor = self.blocks(h)
        return features

    def classify(self, features: Tensor) -> Tensor:
        """Logits (N, K) of features (N, C, H, W)."""
        logits: Tensor = self.output(features.amax((2, 3))) * self.logit_scale
        return logits


deep = partial(FastNet, stages=((16,), (64,), (128,), (128, 128)))  # for 64 × 64 pixels
deeper = partial(FastNet, stages=((16,), (32,), (64,), (128,), (128, 128)))  # for 96 and more
wide = partial(FastNet, components=16, stages=((32, 32), (128, 128), (128, 128)))
wider = partial(FastNet, components=16, stages=((64, 64), (256, 256), (256, 256)))
widest = partial(FastNet, components=16, stages=((128,) * 3, (384,) * 3, (384,) * 3))
huge = partial(FastNet, components=16, stages=((128,) * 3, (512,) * 3, (512,) * 3))
