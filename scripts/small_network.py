"""The small network of the page on batch normalisation, and a study of three arms with it.

    python scripts/small_network.py train FOLDER    # one network, after 100 steps and at its end
    python scripts/small_network.py study FOLDER    # batch, shaken and none, six seeds each

It is the notebook's network with fewer channels: the same layers in the same order. `shaken` is
batch normalisation with noise behind it that is drawn anew for each step and unit, its mean not 0
and its scale not 1 (Santurkar et al. 2018, arXiv 1805.11604, section 2.2 and appendix): if batch
normalisation helped by keeping the layers' inputs where they are, this would take the help away.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, max_pool2d, relu

import normlab
from normlab.core.streams import stream
from normlab.layers import BatchNorm, Conv2d, Dense, Dropout

CHANNELS, HIDDEN = (16, 16, 32), 64
SIDE = 7  # of the map that is flattened
EARLY = 100  # steps: the running statistics still hold 0.99¹⁰⁰ = 37 % of where they began
BATCH, RATE, ADAM_EPSILON = 32, 1e-3, 1e-7
SHIFT, STRETCH, EACH = 0.5, 1.25, 0.1  # n_μ, n_σ and r of Santurkar et al.
STUDY_STEPS, SEEDS = 300, 6
QUICK = 0.9  # the study's momentum: after 300 steps 0.99 would still hold 5 % of the start


class Shaken(nn.Module):
    """Batch normalisation, then noise of the same kind for all pictures of a step."""

    def __init__(self, num_features: int, seed: int, name: str, momentum: float) -> None:
        super().__init__()
        self.norm, self.seed, self.name = BatchNorm(num_features, momentum=momentum), seed, name
        self.step = 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if not self.training:
            return y * ((1 + STRETCH) / 2)  # the noise's mean, as dropout does it
        rng = stream(self.seed, "shake", self.name, self.step)
        self.step += 1
        unit, one = (1, y.shape[1], *[1] * (y.ndim - 2)), (len(y), y.shape[1], *[1] * (y.ndim - 2))
        shift = rng.uniform(-SHIFT, SHIFT, unit) + rng.uniform(-EACH, EACH, one)
        stretch = rng.uniform(1, STRETCH, unit) + EACH * rng.standard_normal(one)
        return y * torch.from_numpy(stretch).float() + torch.from_numpy(shift).float()


class SmallNet(nn.Module):
    """Three convolutions, two dense layers, a normaliser before each of the five."""

    def __init__(self, norm: str = "batch", seed: int = 0, momentum: float = 0.99) -> None:
        super().__init__()
        one, two, three = CHANNELS

        def place(features: int, name: str) -> nn.Module:
            if norm == "none":
                return nn.Identity()
            if norm == "shaken":
                return Shaken(features, seed, name, momentum)
            return BatchNorm(features, momentum=momentum)

        def rng(name: str) -> np.random.Generator:
            return stream(seed, "init", name)

        self.norm0, self.conv1 = place(3, "0"), Conv2d(3, one, padding=0, rng=rng("conv1"))
        self.norm1, self.conv2 = place(one, "1"), Conv2d(one, two, padding=1, rng=rng("conv2"))
        self.norm2, self.conv3 = place(two, "2"), Conv2d(two, three, padding=1, rng=rng("conv3"))
        flat = three * SIDE * SIDE
        self.norm3, self.hidden = place(flat, "3"), Dense(flat, HIDDEN, rng=rng("hidden"))
        self.norm4, self.output = place(HIDDEN, "4"), Dense(HIDDEN, 10, rng=rng("output"))
        self.dropout = Dropout(0.2)

    def inputs(self, x: Tensor, rng: np.random.Generator | None = None) -> list[Tensor]:
        """What conv1, conv2, conv3, hidden and output are given, and the logits (N, 10)."""
        a = self.norm0(x)
        b = self.norm1(self.dropout(relu(self.conv1(a)), rng))  # (N, 16, 30, 30)
        c = self.norm2(relu(max_pool2d(self.conv2(b), 2)))  # (N, 16, 15, 15)
        d = relu(max_pool2d(self.conv3(c), 2)).flatten(1)  # (N, 1568)
        d = self.norm3(self.dropout(d, rng))
        e = self.norm4(self.dropout(relu(self.hidden(d)), rng))  # (N, 64)
        return [a, b, c, d, e, self.output(e)]

    def forward(self, x: Tensor, rng: np.random.Generator | None = None) -> Tensor:
        """Logits (N, 10) of pixels (N, 3, 32, 32) in [0, 1]."""
        return self.inputs(x, rng)[-1]


def pixels(images: np.ndarray) -> Tensor:
    """uint8 (N, 32, 32, 3) as float32 (N, 3, 32, 32) in [0, 1]."""
    return (
        torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        .float()
        .div(255)
        .contiguous(memory_format=torch.channels_last)
    )


def drift(before: list[Tensor], after: list[Tensor]) -> list[float]:
    """How far a step moved the mean input of each layer, in its σ; mean over channels."""
    found = []
    for old, new in zip(before[1:-1], after[1:-1], strict=True):  # not the pixels, not the answer
        dims = [0, *range(2, old.ndim)]
        moved = (new.mean(dims) - old.mean(dims)).abs()
        found.append(float((moved / (old.std(dims) + 1e-6)).mean()))
    return found


def train(
    norm: str, seed: int, epochs: int = 1, most: int | None = None, keep: Path | None = None
) -> dict[str, float]:
    """Train on CIFAR-10 for `epochs`, or for `most` steps of the only one.

    Returns test accuracy, mean loss of the last 100 steps and median drift of each layer.
    """
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    data = normlab.load()
    network = SmallNet(norm, seed, 0.99 if most is None else QUICK)
    adam = torch.optim.Adam(network.parameters(), lr=RATE, eps=ADAM_EPSILON)
    probe = pixels(data.x_train[:256])
    steps, losses, drifts = 0, [], []
    per_epoch = len(data.x_train) // BATCH
    for epoch in range(epochs):
        order = stream(seed, "order", epoch).permutation(len(data.x_train))[: per_epoch * BATCH]
        for chosen in np.split(order, per_epoch)[:most]:
            network.train()
            chosen = np.sort(chosen)
            labels = torch.from_numpy(data.y_train[chosen].astype(np.int64))
            loss = cross_entropy(
                network(pixels(data.x_train[chosen]), stream(seed, "drop", steps)), labels
            )
            adam.zero_grad()
            loss.backward()
            sampled = steps % 100 == 50
            before = _seen(network, probe) if sampled else None
            adam.step()
            steps += 1
            losses.append(loss.item())
            if before is not None:
                drifts.append(drift(before, _seen(network, probe)))
            if keep is not None and steps == EARLY:
                save_file(network.state_dict(), keep / "early.safetensors")
        if keep is not None:
            loss = np.mean(losses[-100:])
            print(f"epoch {epoch + 1}: {loss:.4f}, {accuracy(network, data):.4f}", flush=True)
            save_file(network.state_dict(), keep / "end.safetensors")
    layers = np.median(drifts, 0)
    return {
        "test_accuracy": accuracy(network, data),
        "training_loss": float(np.mean(losses[-100:])),
        **{
            f"drift_{n}": float(d)
            for n, d in zip(("conv2", "conv3", "hidden", "output"), layers, strict=True)
        },
    }


@torch.no_grad()
def _seen(network: SmallNet, probe: Tensor) -> list[Tensor]:
    """What the layers see of the probe in training mode, dropout aside; running statistics stay."""
    state = {k: v.clone() for k, v in network.state_dict().items()}
    network.train()
    network.dropout.eval()
    seen = network.inputs(probe)
    network.dropout.train()
    network.load_state_dict(state)
    return seen


@torch.no_grad()
def accuracy(network: SmallNet, data: normlab.ImageData) -> float:
    """Share of the test pictures that the network in evaluation mode names rightly."""
    network.eval()
    right = 0
    for first in range(0, len(data.x_test), 500):
        answers = network(pixels(data.x_test[first : first + 500])).argmax(1).numpy()
        right += int((answers == data.y_test[first : first + 500]).sum())
    return right / len(data.x_test)


def one_run(seed: int, norm: str) -> dict[str, float]:
    """One run of the study."""
    return train(norm, seed, most=STUDY_STEPS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("train", "study"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    options = parser.parse_args()
    if options.what == "train":
        options.folder.mkdir(parents=True, exist_ok=True)
        print(train("batch", 0, options.epochs, keep=options.folder))
        return
    arms = {name: {"norm": name} for name in ("batch", "shaken", "none")}
    study = normlab.compare(
        one_run,
        arms=arms,
        contrasts=[("shaken", "none")],  # the one question; six pairs can answer one
        seeds=options.seeds,
        metric="test_accuracy",
        out=options.folder,
    )
    for found in study.comparisons:
        print(found.sentence)


if __name__ == "__main__":
    main()
