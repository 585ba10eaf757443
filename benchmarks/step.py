"""Training steps of the notebook's network, and BatchNorm alone, beside plain PyTorch.

    python benchmarks/step.py --threads 2 --out step.json

Every contestant has a process of its own, with PyTorch's defaults but for flushed denormals; ours
also keeps freed memory, as `normlab train` does. They take turns, in rounds; a ratio is the median
over rounds of the ratio within the round. Times are of the wall clock; `--clock cpu` takes the
process's processor time instead, which other programs on the machine disturb less and which means
little beyond one thread.
"""

import argparse
import json
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu

from normlab import kernels
from normlab.kernels.memory import keep_freed_memory
from normlab.layers import BatchNorm
from normlab.models import NotebookNet
from normlab.optim import Adam

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Step = Callable[[], object]


class PlainNet(nn.Module):
    """The notebook's network as most people would write it in PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        keras = {"eps": 1e-3, "momentum": 0.01}
        self.bn0, self.conv1 = nn.BatchNorm2d(3, **keras), nn.Conv2d(3, 32, 3)
        self.bn1, self.conv2 = nn.BatchNorm2d(32, **keras), nn.Conv2d(32, 32, 3, padding=1)
        self.bn2, self.conv3 = nn.BatchNorm2d(32, **keras), nn.Conv2d(32, 64, 3, padding=1)
        self.bn3, self.hidden = nn.BatchNorm1d(3136, **keras), nn.Linear(3136, 512)
        self.bn4, self.output = nn.BatchNorm1d(512, **keras), nn.Linear(512, 10)
        self.pool, self.dropout = nn.MaxPool2d(2), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(relu(self.conv1(self.bn0(x))))
        x = self.pool(relu(self.conv2(self.bn1(x))))
        x = self.pool(relu(self.conv3(self.bn2(x))))
        x = self.dropout(x.flatten(1))
        x = self.dropout(relu(self.hidden(self.bn3(x))))
        return self.output(self.bn4(x))


def plain_step(x: Tensor, labels: Tensor, memory_format: torch.memory_format) -> Step:
    net = PlainNet().to(memory_format=memory_format)
    optimizer = torch.optim.Adam(net.parameters(), eps=1e-7, fused=True)
    x = x.contiguous(memory_format=memory_format)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(net(x), labels).backward()
        optimizer.step()

    return step


def normlab_step(x: Tensor, labels: Tensor) -> Step:
    net = NotebookNet().to(memory_format=torch.channels_last)
    optimizer = Adam(list(net.parameters()))
    rng = np.random.Generator(np.random.SFC64(0))
    x = x.contiguous(memory_format=torch.channels_last)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(net(x, rng), labels).backward()
        optimizer.step()

    return step


def layer_step(norm: nn.Module, x: Tensor, g: Tensor) -> Step:
    x = x.detach().requires_grad_()
    inputs = [x, *norm.parameters()]
    return lambda: torch.autograd.grad(norm(x), inputs, g)


def network_step(name: str, batch: int) -> Step:
    """The step of one of NETWORKS."""
    x, labels = torch.rand(batch, 3, 32, 32), torch.randint(10, (batch,))
    if name == "pytorch":
        return plain_step(x, labels, torch.contiguous_format)
    if name == "pytorch channels-last":
        return plain_step(x, labels, torch.channels_last)
    keep_freed_memory()
    return normlab_step(x, labels)


NETWORKS = ["pytorch", "pytorch channels-last", "normlab without kernels", "normlab"]


def serve(pipe: Connection, name: str, batch: int, threads: int, clock: str) -> None:
    """Run as many steps as asked for and answer with the seconds they took."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    now = CLOCKS[clock]
    with kernels.disabled() if name == "normlab without kernels" else nullcontext():
        step = network_step(name, batch)
        while repeats := pipe.recv():
            start = now()
            for _ in range(repeats):
                step()
            pipe.send(now() - start)


def race(batch: int, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds a step of each network, and round."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for name in NETWORKS:
        pipes[name], end = context.Pipe()
        context.Process(
            target=serve, args=(end, name, batch, args.threads, args.clock), daemon=True
        ).start()
    repeats = max(2, round(args.seconds * 400 / batch))
    times: dict[str, list[float]] = {name: [] for name in NETWORKS}
    for warm in [True] * 2 + [False] * args.rounds:
        for name, pipe in pipes.items():
            pipe.send(repeats)
            seconds = pipe.recv()
            if not warm:
                times[name].append(seconds / repeats)
    for pipe in pipes.values():
        pipe.send(0)
    return times


def interleave(
    steps: dict[str, Step], rounds: int, seconds: float, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds a step, per contestant and round; a round gives each about `seconds`."""
    repeats = {}
    for name, step in steps.items():
        step()
        start = time.perf_counter()
        step()
        repeats[name] = max(1, round(seconds / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = clock()
            for _ in range(repeats[name]):
                step()
            times[name].append((clock() - start) / repeats[name])
    return times


def quartiles(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": low, "q3": high}


def measure_steps(batch: int, args: argparse.Namespace) -> dict[str, object]:
    """Images/s of each contestant, and ours over the faster plain PyTorch."""
    times = race(batch, args)
    plain = min(NETWORKS[:2], key=lambda name: statistics.median(times[name]))
    return {
        "batch": batch,
        "images_per_second": {n: quartiles([batch / t for t in ts]) for n, ts in times.items()},
        "reference": plain,
        "ratio": {
            n: quartiles([a / b for a, b in zip(times[plain], ts, strict=True)])
            for n, ts in times.items()
        },
    }


def measure_layers(args: argparse.Namespace) -> list[dict[str, object]]:
    """torch.nn's time over ours, forward and backward, on the notebook's shapes."""
    rows: list[dict[str, object]] = []
    for n in args.batches:
        for shape in [(n, 3, 32, 32), (n, 32, 30, 30), (n, 32, 15, 15), (n, 3136), (n, 512)]:
            for layout in (torch.channels_last, torch.contiguous_format):
                if len(shape) == 2 and layout is torch.channels_last:
                    continue
                x, g = torch.randn(shape), torch.randn(shape)
                if len(shape) == 4:
                    x, g = (t.contiguous(memory_format=layout) for t in (x, g))
                theirs = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(shape[1])
                steps = {
                    "torch": layer_step(theirs, x, g),
                    "normlab": layer_step(BatchNorm(shape[1]), x, g),
                }
                times = interleave(steps, args.rounds, args.seconds / 4, CLOCKS[args.clock])
                ratios = [a / b for a, b in zip(times["torch"], times["normlab"], strict=True)]
                rows.append(
                    {
                        "shape": shape,
                        "layout": str(layout).removeprefix("torch."),
                        "milliseconds": {
                            k: quartiles([1e3 * t for t in v]) for k, v in times.items()
                        },
                        "ratio": quartiles(ratios),
                    }
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.5, help="a contestant's part of a round")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--only", choices=["steps", "layers"])
    parser.add_argument("--out", type=Path, help="write JSON here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    keep_freed_memory()  # for both layers alike
    result: dict[str, object] = {
        "machine": platform.machine(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": args.threads,
        "clock": args.clock,
        "kernels": kernels.available(),
    }
    if args.only != "layers":
        steps = [measure_steps(batch, args) for batch in args.batches]
        result["steps"] = steps
        for row in steps:
            for name, rate in row["images_per_second"].items():  # type: ignore[attr-defined]
                ratio = row["ratio"][name]  # type: ignore[index]
                print(
                    f"batch {row['batch']:>3}  {name:<24} {rate['median']:7.0f} images/s  "
                    f"× {ratio['median']:.2f} ({ratio['q1']:.2f}–{ratio['q3']:.2f})"
                )
    if args.only != "steps":
        layers = measure_layers(args)
        result["layers"] = layers
        for row in layers:
            ms, ratio = row["milliseconds"], row["ratio"]
            print(
                f"{row['shape']!s:<18} {row['layout']:<18} torch {ms['torch']['median']:7.3f} ms  "  # type: ignore[index]
                f"normlab {ms['normlab']['median']:7.3f} ms  × {ratio['median']:.2f} "  # type: ignore[index]
                f"({ratio['q1']:.2f}–{ratio['q3']:.2f})"  # type: ignore[index]
            )
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
