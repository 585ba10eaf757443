"""What an export's chain of steps computes, each step by its definition."""

import torch
from torch.nn import functional as F

from normlab.interchange.steps import (
    Add,
    Affine,
    Array,
    Chain,
    Clip,
    Conv,
    Dense,
    Flatten,
    GlobalMax,
    Keep,
    MaxPool,
    Norm,
    Relu,
    Step,
)


def computed(chain: Chain, x: Array) -> Array:
    """What the steps of `chain` make of `x` (N, C, H, W), each by its definition."""
    h = kept = torch.from_numpy(x)
    for step in chain.steps:
        match step:
            case Keep():
                kept = h
            case Add():
                h = h + kept
            case _:
                h = _computed(step, h)
    return h.numpy()


def _computed(step: Step, h: torch.Tensor) -> torch.Tensor:
    match step:
        case Norm():
            shape = (1, -1, *[1] * (h.ndim - 2))
            mean, std, gamma, beta = (
                torch.from_numpy(v).view(shape)
                for v in (step.mean, step.std, step.gamma, step.beta)
            )
            return gamma * (h - mean) / std + beta
        case Conv():
            kernel, bias = torch.from_numpy(step.kernel), torch.from_numpy(step.bias)
            near, far = step.padding, step.padding - step.trim
            border = (near, far, near, far)
            z = F.conv2d(F.pad(h, border), kernel, bias, step.stride)
            if step.of_ones is None:
                return z
            ones = F.pad(torch.ones_like(h[:1, :1]), border)
            return z + F.conv2d(ones, torch.from_numpy(step.of_ones)[:, None], stride=step.stride)
        case Affine():
            scale, shift = (torch.from_numpy(v).view(-1, 1, 1) for v in (step.scale, step.shift))
            return scale * h + shift
        case Dense():
            return h @ torch.from_numpy(step.kernel).T + torch.from_numpy(step.bias)
        case Relu():
            return h.relu()
        case Clip():
            return h.clamp_min(step.low)
        case MaxPool():
            return F.max_pool2d(h, 2)
        case GlobalMax():
            return h.amax((2, 3))
        case Flatten():
            return h.flatten(1)
