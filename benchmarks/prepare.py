"""What all peers start from: images, weights and the answers that belong to them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.networks import build
from normlab.core.environment import describe_machine, settings
from normlab.core.streams import stream
from normlab.data import load
from normlab.evaluation.forward import logits_of
from normlab.layers import BatchNorm
from normlab.models import FastNet

CHECKED = 64  # images


def prepare(folder: Path, data: str, threads: int) -> dict[str, Any]:
    """Write images, weights and answers into `folder`; describe the machine."""
    device = torch.device("cpu")
    with settings(threads, device):
        images = load(data)
        for name in ("x_train", "y_train", "x_test", "y_test"):
            np.save(folder / f"{name}.npy", getattr(images, name))
        for name in ("notebook", "fast79"):
            model = build(name)
            if isinstance(model, FastNet):
                model.fit_to(images.x_train)
            settle(model, images.x_train[:250])
            state = {k: v.numpy() for k, v in model.state_dict().items()}
            np.savez(folder / f"{name}.npz", **state)
            answers = logits_of(model, images.x_test[:CHECKED]).softmax(1)
            np.save(folder / f"{name}-answers.npy", answers.numpy())
        # Plain values: PyTorch's version is of a class that would bring PyTorch into the parent.
        values: dict[str, Any] = json.loads(json.dumps(describe_machine(threads, device)))
        return {**values, "data": images.name}


def settle(model: nn.Module, images: np.ndarray) -> None:
    """Give every normaliser γ and β of its own, and the statistics of `images`.

    With γ = 1 and β = 0 a peer that mixes them up would go unnoticed. β is wide enough for some
    channels to give what follows ReLU a sign that folding cannot take in, as training does, too.
    """
    rng = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, BatchNorm) and module.weight is not None and module.bias is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=rng)
            nn.init.normal_(module.bias, std=0.4, generator=rng)
            module.momentum = 0.0  # the old value's weight
    x = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        model.train()(x, stream(0, "dropout"))
    model.eval()
