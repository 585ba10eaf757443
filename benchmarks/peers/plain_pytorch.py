"""Plain PyTorch: the notebook's network and training loop as most people would write them.

In its favour: the images are one float tensor in memory, where a `DataLoader` would copy every
image by itself; Adam is the fused one; denormals are flushed; channels-last is tried as well as
PyTorch's own layout, and the faster of the two is the peer. `torch.compile` was measured slower.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu

from benchmarks.entry import (
    Case,
    Entry,
    Images,
    Options,
    Probabilities,
    batches,
    inference_cases,
)

LAYOUTS = {"channels-first": torch.contiguous_format, "channels-last": torch.channels_last}
# Our names of the layers, in normlab's files.
NAMES = {
    "bn0": "batch_normalization",
    "bn1": "batch_normalization_1",
    "bn2": "batch_normalization_2",
    "bn3": "batch_normalization_3",
    "bn4": "batch_normalization_4",
}
EVALUATION_BATCH = 250


class PlainNet(nn.Module):
    """The notebook's network; ε and momentum are Keras' values."""

    def __init__(self) -> None:
        super().__init__()
        keras: dict[str, Any] = {"eps": 1e-3, "momentum": 0.01}
        self.bn0, self.conv1 = nn.BatchNorm2d(3, **keras), nn.Conv2d(3, 32, 3)
        self.bn1, self.conv2 = nn.BatchNorm2d(32, **keras), nn.Conv2d(32, 32, 3, padding=1)
        self.bn2, self.conv3 = nn.BatchNorm2d(32, **keras), nn.Conv2d(32, 64, 3, padding=1)
        self.bn3, self.hidden = nn.BatchNorm1d(3136, **keras), nn.Linear(3136, 512)
        self.bn4, self.output = nn.BatchNorm1d(512, **keras), nn.Linear(512, 10)
        self.pool, self.dropout = nn.MaxPool2d(2), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 10) of pixels (N, 3, 32, 32) in [0, 1]."""
        x = self.dropout(relu(self.conv1(self.bn0(x))))
        x = self.pool(relu(self.conv2(self.bn1(x))))
        x = self.pool(relu(self.conv3(self.bn2(x))))
        x = self.dropout(x.flatten(1))
        x = self.dropout(relu(self.hidden(self.bn3(x))))
        logits: Tensor = self.output(self.bn4(x))
        return logits


def plain(weights: dict[str, np.ndarray]) -> PlainNet:
    """The network with normlab's weights; what follows `flatten` is reordered to C, H, W."""
    net = PlainNet()
    order = torch.arange(3136).view(7, 7, 64).permute(2, 0, 1).flatten()
    state = {}
    for key in net.state_dict():
        layer, kind = key.split(".")
        value = torch.from_numpy(weights[f"{NAMES.get(layer, layer)}.{kind}"])
        if layer == "bn3" and value.ndim:
            value = value[order]
        if key == "hidden.weight":
            value = value[:, order]
        state[key] = value
    net.load_state_dict(state)
    return net


def use_threads(threads: int) -> dict[str, Any]:
    """Set threads and flush denormals, before any other thread exists; what to tell of it."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    tiny = torch.full((1 << 20,), 1e-30) * 1e-10
    return {"version": f"PyTorch {torch.__version__}", "flushes_denormals": not tiny.any().item()}


def pixels(images: Images) -> Tensor:
    """(N, 3, H, W) in [0, 1], as it comes: channels-last."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 255


def training(options: Options) -> Entry:
    """The usual loop, with the loss and accuracy that `fit` reports, too."""
    about, layout = use_threads(options.threads), LAYOUTS[options.extra["layout"]]
    batch = options.extra["batch"]
    net = plain(options.weights("notebook")).to(memory_format=layout)
    first = int(len(options.array("x_train")) * 0.9)
    x = pixels(options.array("x_train")[:first]).contiguous(memory_format=layout)
    labels = torch.from_numpy(options.array("y_train")[:first].astype(np.int64))
    optimizer = torch.optim.Adam(net.parameters(), eps=1e-7, fused=True)

    def epochs() -> Iterator[None]:
        while True:
            net.train()
            total, correct = 0.0, 0
            for chosen in torch.randperm(first).split(batch):
                logits = net(x[chosen].contiguous(memory_format=layout))
                loss = cross_entropy(logits, labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item()
                correct += int((logits.argmax(1) == labels[chosen]).sum())
                yield

    steps = epochs()

    def run(repeats: int) -> None:
        for _ in range(repeats):
            next(steps)

    return Entry({"": Case(run, batch)}, lambda x: answer(net, layout, x, 256), about)


def validation(options: Options) -> Entry:
    """Loss and accuracy on the last tenth of the training images."""
    about, layout = use_threads(options.threads), LAYOUTS[options.extra["layout"]]
    net = plain(options.weights("notebook")).to(memory_format=layout).eval()
    first = int(len(options.array("x_train")) * 0.9)
    x = pixels(options.array("x_train")[first:]).contiguous(memory_format=layout)
    labels = torch.from_numpy(options.array("y_train")[first:].astype(np.int64))

    @torch.inference_mode()
    def run(repeats: int) -> None:
        for _ in range(repeats):
            total, correct = 0.0, 0
            for a, b in zip(x.split(EVALUATION_BATCH), labels.split(EVALUATION_BATCH), strict=True):
                logits = net(a)
                total += cross_entropy(logits, b, reduction="sum").item()
                correct += int((logits.argmax(1) == b).sum())

    return Entry({"": Case(run, len(x))}, lambda x: answer(net, layout, x, 256), about)


@torch.inference_mode()
def answer(
    net: nn.Module, layout: torch.memory_format, images: Images, batch: int
) -> Probabilities:
    """Probabilities (N, 10), in evaluation mode."""
    net.eval()
    parts = [
        net(pixels(x).contiguous(memory_format=layout)).softmax(1) for x in batches(images, batch)
    ]
    return torch.cat(parts).numpy()


def predict(options: Options) -> Entry:
    """Evaluation mode without gradients."""
    about, layout = use_threads(options.threads), LAYOUTS[options.extra["layout"]]
    net = plain(options.weights("notebook")).to(memory_format=layout)
    cases = inference_cases(
        lambda x, batch: answer(net, layout, x, batch), options.array("x_test"), 1024
    )
    return Entry(cases, lambda x: answer(net, layout, x, 256), about)
