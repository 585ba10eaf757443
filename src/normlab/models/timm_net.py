"""Networks of `timm` (PyTorch image models) with an output layer of our own.

The body keeps timm's own names of weights. Pixels in [0, 1] are normalised inside, by the mean and
standard deviation that the network's pretrained weights were trained with, so that such a network
is fed like any other here.
"""

import os
import re
import sys
import warnings
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normlab.core.streams import stream
from normlab.errors import UserError, install

_DECLARED: list[torch.library.Library] = []  # what PyTorch forgets when nobody holds it


class TimmNet(nn.Module):
    """A network of timm up to its pooled features, then a dense layer.

    Args:
        architecture: its name in timm, with or without the tag of its weights, such as `resnet18`
            or `resnet18.a1_in1k`.
        num_classes: K.
        image_size: H = W; most networks take any size from 32 pixels on.
        norm, norm_position: `batch` where the network has batch normalisations, `none` where not:
            they are part of its design.
        norm_momentum, norm_epsilon: of all its batch normalisations.
        logit_scale: factor of the last answers.
        seed: of the initial values.

    Raises:
        UserError: timm is missing or does not know the network, or another normaliser.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        architecture: str | None,
        num_classes: int = 10,
        image_size: int = 224,
        norm: str = "batch",
        norm_position: str | None = None,
        norm_momentum: float = 0.9,
        norm_epsilon: float = 1e-5,
        logit_scale: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        config = config_of(architecture)
        self.logit_scale, self.frozen = logit_scale, False
        sized = {"img_size": image_size} if config["fixed_input_size"] else {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream(seed, "init", "body").integers(2**63))
            self.body = load_timm().create_model(architecture, num_classes=0, **sized)
            features = getattr(self.body, "head_hidden_size", None) or self.body.num_features
            self.output = nn.Linear(features, num_classes)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(config[name], dtype=torch.float32))
        own = "batch" if batch_norms(self.body) else "none"
        if norm != own or norm_position is not None:
            raise UserError(
                f"norm={norm!r}, norm_position={norm_position!r}: the normalisers of "
                f"{architecture} are part of it (norm={own!r}): leave both out"
            )
        for layer in batch_norms(self.body):
            layer.momentum, layer.eps = 1 - norm_momentum, norm_epsilon  # as PyTorch has it
        if self.output.weight.is_meta:  # the network is only measured
            return
        limit = features**-0.5
        values = stream(seed, "init", "output").uniform(-limit, limit, (num_classes, features))
        with torch.no_grad():
            self.output.weight.copy_(torch.from_numpy(values))
            self.output.bias.zero_()

    def freeze(self) -> None:
        """Let all normalisers go on with the statistics, γ and β that they have, in training too.

        timm's layers have no `freeze()`, and PyTorch's thaw at the next `.train()`.
        """
        self.frozen = True
        for layer in batch_norms(self.body):
            layer.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "TimmNet":
        super().train(mode)
        if self.frozen:
            for layer in batch_norms(self.body):
                layer.eval()
        return self

    def forward(self, x: Tensor, rng: np.random.Generator | None = None) -> Tensor:
        """Logits (N, K) of pixels (N, 3, H, W) in [0, 1]; `rng` is not used: no dropout here."""
        return self.answer(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """What the body makes of pixels: (N, D)."""
        h: Tensor = self.body((x - self.mean.view(3, 1, 1)) / self.std.view(3, 1, 1))
        return h

    def answer(self, features: Tensor) -> Tensor:
        """Logits (N, K) of features."""
        logits: Tensor = self.output(features) * self.logit_scale
        return logits


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """The batch normalisations inside a module."""
    return [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]


def config_of(architecture: str | None) -> dict[str, Any]:
    """What timm knows of a network: image size, mean, std, licence, where its weights are.

    Raises:
        UserError: timm is missing, or does not know it.
    """
    timm = load_timm()
    if architecture is None:
        raise UserError("architecture=None: name a network of timm, such as resnet18")
    name, _, tag = architecture.partition(".")
    tags = timm.list_pretrained(f"{name}.*") if timm.is_model(name) else []
    if not timm.is_model(name) or (tag and architecture not in tags):
        close = get_close_matches(architecture, tags or timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "give one of its names"
        raise UserError(f"timm has no network {architecture!r}: {hint}")
    # A network whose weights were never published has no configuration.
    config = timm.get_pretrained_cfg(architecture) or timm.models.PretrainedCfg()
    found: dict[str, Any] = config.to_dict()
    found.setdefault("fixed_input_size", False)
    return found


@cache
def load_timm() -> ModuleType:
    """Import timm, also beside a torchvision whose compiled operators do not load.

    Raises:
        UserError: it is not installed, or cannot be imported.
    """
    for name in ("timm", "torchvision"):
        if find_spec(name) is None:
            raise UserError(
                f"networks pretrained on ImageNet need the package {name}: {install('pretrained')}"
            )
    # timm imports the hub's client, which would tell its makers who uses it.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    with warnings.catch_warnings():  # torchvision's own, about operators that nothing here calls
        warnings.simplefilter("ignore")
        try:
            _load_torchvision()
            import timm
            import timm.models
        except (ImportError, RuntimeError, OSError) as e:
            raise UserError(
                f"timm cannot be imported ({str(e).splitlines()[0]}): install the torchvision that "
                f"belongs to PyTorch {torch.__version__}"
            ) from None
    module: ModuleType = timm
    return module


def _load_torchvision() -> None:
    """Import torchvision; declare the operators that it describes if its own do not load.

    torchvision's Python part describes operators, such as non-maximum suppression, that its
    compiled part defines. Built for another PyTorch (the CUDA build beside the CPU one, say) that
    part does not load, and the description fails. timm's networks call none of them, so a
    declaration without a body is enough.
    """
    try:
        import_module("torchvision")
    except RuntimeError as e:
        spec = find_spec("torchvision")
        if "torchvision::" not in str(e) or spec is None or spec.origin is None:
            raise
        source = (Path(spec.origin).parent / "_meta_registrations.py").read_text(encoding="utf-8")
        library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        _DECLARED.append(library)
        for name in sorted(set(re.findall(r'register_fake\("torchvision::(\w+)"\)', source))):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        import_module("torchvision")
