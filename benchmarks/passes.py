"""Where a training step's time goes, pass by pass, beside what the processor could do.

    python -m benchmarks.passes fast79 fast94 notebook --threads 2

Arithmetic counts what a pass computes (Winograd's products, not those of the direct sum), memory
the least that it must read and write. Each is divided by what this machine reaches in the same
minute: a product of 2,048 × 2,048 matrices by oneDNN, and a copy of 256 MB. The larger share is
the bound. Written to docs/results/passes.json; docs/benchmarks.md has the tables.
"""

import argparse
import json
import struct
import time
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.other_load import OtherLoad, is_quiet
from benchmarks.summary import table
from normlab import kernels, recipes
from normlab.core.environment import describe_machine, settings
from normlab.core.files import write_json
from normlab.core.streams import stream
from normlab.data import load
from normlab.kernels import convolutions, products
from normlab.runs.task import Task
from normlab.training.preparation import make_plan, new_state
from normlab.training.step import train_step

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "passes.json"
WARM_UP, STEPS = 5, 30
FLOAT = 4  # bytes


def convolution(side: int, n: int, h: int, w: int, i: int, o: int, pooled: bool) -> tuple[int, int]:
    tiles = n * -(-h // side) * -(-w // side)
    values = n * h * w * (i + (o // 4 if pooled else o)) + 9 * i * o
    return 2 * (side + 2) ** 2 * i * o * tiles, FLOAT * values


def cost(name: str, arguments: tuple[Any, ...]) -> tuple[str, int, int]:
    """What a kernel works on in words, how many floating-point operations, how many bytes."""
    if name == "conv3x3_pooled_gradients":  # at most: where a gradient is zero, nothing is done
        n, h, w, i, o = arguments[4:9]
        maxima = n * (h // 2) * (w // 2) * o
        words = f"both gradients, pooled, directly: {i}→{o}, {h}×{w}"
        passes = 1 + (arguments[9] is not None)
        return words, 2 * 9 * i * maxima * passes, FLOAT * (n * h * w * i * passes + 2 * maxima)
    if name.startswith("conv3x3"):
        shape, side = arguments[3:8], int(name[len("conv3x3_by")])
        turned = not name.endswith("gradient") and arguments[8]
        which = arguments[2] if name.endswith("gradient") else arguments[10]
        n, h, w, i, o = shape
        kind = "kernel's gradient" if name.endswith("gradient") else ""
        kind = "input's gradient" if turned else kind or "convolution"
        words = f"{kind}{', pooled' if which is not None else ''}, tiles of {side}"
        ways = {"bfloat16": ", bfloat16", "amx": ", AMX"}
        words += f"{next((w for way, w in ways.items() if way in name), '')}: {i}→{o}, {h}×{w}"
        return words, *convolution(side, n, h, w, i, o, which is not None)
    if name.startswith("conv_pixels"):
        n, h, w, o = arguments[5:9]
        products = n * (h - 2) * (w - 2) * o
        words = "of pixels: " + ("convolution" if name == "conv_pixels" else "kernel's gradient")
        return f"{words}, 3→{o}, {h}×{w}", 2 * 27 * products, FLOAT * (n * h * w * 3 + products)
    if name == "adam":
        values = sum(struct.unpack(f"@{6 * arguments[1]}q", arguments[0])[5::6])
        return f"Adam, {values:,} weights", 12 * values, 7 * FLOAT * values
    if name.removeprefix("small_").startswith("dense"):
        n, i, o = arguments[3:6]
        products, parts = (2, ", both gradients") if name.endswith("gradients") else (1, "")
        moved = FLOAT * (n * i + i * o + n * o)
        return f"dense, {n}×{i} by {i}×{o}{parts}", 2 * products * n * i * o, products * moved
    if name == "product":
        (n, i), (o, _) = (a.shape for a in arguments[:2])
        return f"dense product, {n}×{i} by {i}×{o}", 2 * n * i * o, FLOAT * (n * i + i * o + n * o)
    if name.startswith("pool"):
        n, h, w, c = arguments[1:5] if name == "pool" else arguments[2:6]
        return f"{name.replace('_', ' ')}, {c}, {h}×{w}", 0, n * h * w * c * (FLOAT + 1) * 5 // 4
    if name == "read":
        n, h, w = arguments[4:7]
        return f"read pixels, {h}×{w}", n * h * w * 3, n * h * w * 3 * (1 + FLOAT)
    tensor = arguments[0]
    passes = {"forward": 2 + 2 * (arguments[1] is not None), "normalize": 2, "relu_dropout": 2}
    words = {"forward": "normalisation", "gradient": "normalisation's gradient"}
    shape = "×".join(map(str, tensor.shape[1:]))
    bytes_ = FLOAT * tensor.numel() * passes.get(name, 3)
    return f"{words.get(name, name.replace('_', ' '))}, {shape}", 8 * tensor.numel(), bytes_


def peaks() -> tuple[float, float]:
    """Floating-point operations and bytes a second that this machine reaches."""
    a, b = torch.rand(2048, 2048), torch.rand(2048, 2048)
    source, target = torch.rand(1 << 26), torch.empty(1 << 26)

    def fastest(work: Callable[[], object]) -> float:
        times = []
        for _ in range(7):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
        return min(times)

    return 2 * 2048**3 / fastest(lambda: kernels.product(a, b)), 2 * FLOAT * (1 << 26) / fastest(
        lambda: target.copy_(source)
    )


def passes_of(name: str, threads: int) -> dict[str, Any]:
    """Every pass of a step of the recipe `name` with its share of the time."""
    recipe, data = recipes.get(name), load()
    ours: dict[str, Counter[str]] = {}
    plain, multiply = kernels.call, kernels.product

    def use(call: Callable[..., None], product: Callable[..., torch.Tensor]) -> None:
        kernels.call = products.call = convolutions.call = call
        products.product = product

    def timed(words: str, operations: int, bytes_: int, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = work()
        took = time.perf_counter() - started
        counts = {"seconds": took, "calls": 1, "operations": operations, "bytes": bytes_}
        ours.setdefault(words, Counter()).update(counts)
        return result

    def watched(kernel: str, *arguments: Any) -> None:
        timed(*cost(kernel, arguments), lambda: plain(kernel, *arguments))

    def watched_product(*arguments: Any) -> torch.Tensor:
        return timed(*cost("product", arguments), lambda: multiply(*arguments))

    def named(kernel: str, *arguments: Any) -> None:
        with record_function(cost(kernel, arguments)[0]):
            plain(kernel, *arguments)

    device = torch.device("cpu")
    with settings(threads, device):
        task = Task(
            recipe=recipe,
            seed=0,
            data=data.name,
            data_sha256=data.sha256,
            class_names=data.class_names,
            image_size=32,
        )
        state, plan = new_state(task, data, device), make_plan(task, data, threads)
        model, optimizer = state.model, state.optimizer
        batches, first = plan.batches(device), int(recipe.half_size * plan.steps) + 1
        model.train()

        def step(number: int) -> None:
            with record_function("batch"):
                x, labels = batches(number)
            train_step(model, optimizer, x, labels, stream(0, "dropout", number))

        numbers = iter(range(first, first + WARM_UP + 2 * STEPS))
        for number in islice(numbers, WARM_UP):
            step(number)
        try:
            use(watched, watched_product)
            started = time.perf_counter()
            for number in islice(numbers, STEPS):
                step(number)
            seconds = (time.perf_counter() - started) / STEPS
            # What the profiler keeps splits the memory that steps give back, so that large tensors
            # lie in new pages each time: our passes were timed without it.
            use(named, multiply)
            with profile(activities=[ProfilerActivity.CPU], with_flops=True) as seen:
                for number in numbers:
                    step(number)
        finally:
            use(plain, multiply)
    totals = [{"pass": words, **counts} for words, counts in ours.items()]
    totals += [
        {
            "pass": event.key,
            "calls": event.count,
            "seconds": event.self_cpu_time_total / 1e6,
            "operations": event.flops or 0,
            "bytes": 0,
        }
        for event in seen.key_averages()
        if event.key not in {*ours, "mkldnn::_linear_pointwise"}
    ]
    rows: list[dict[str, Any]] = [
        {"pass": total.pop("pass"), **{key: value / STEPS for key, value in total.items()}}
        for total in totals
    ]
    rows.sort(key=lambda row: -row["seconds"])
    return {"seconds": seconds, "batch_size": recipe.batch_size, "passes": rows}


def table_of(found: dict[str, Any], peak: float, bandwidth: float, least: float = 0.01) -> str:
    """The passes that take at least the share `least` of a step."""
    total = sum(row["seconds"] for row in found["passes"])
    rows = []
    for row in found["passes"]:
        share = row["seconds"] / total
        if share < least:
            continue
        arithmetic = row["operations"] / row["seconds"] / peak
        memory = row["bytes"] / row["seconds"] / bandwidth
        counted = row["operations"] or row["bytes"]
        bound = "arithmetic" if arithmetic >= memory else "memory"
        rows.append(
            [
                row["pass"],
                f"{row['calls']:g}",
                f"{share:.1%}",
                f"{row['seconds'] * 1e3:.2f}",
                f"{arithmetic:.0%}" if row["operations"] else "–",
                f"{memory:.0%}" if row["bytes"] else "–",
                bound if counted else "–",
            ]
        )
    head = ["pass", "calls", "of the step", "ms", "of the arithmetic peak", "of the copy", "bound"]
    return table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", default=["fast79", "fast94", "notebook"])
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    load_of_others = OtherLoad()
    torch.set_num_threads(arguments.threads)
    peak, bandwidth = peaks()
    found = {name: passes_of(name, arguments.threads) for name in arguments.recipes}
    others = load_of_others.share()
    result = {
        "peak_operations_per_second": peak,
        "copy_bytes_per_second": bandwidth,
        "others_share": others,
        "quiet": is_quiet(others),
        "environment": describe_machine(arguments.threads, torch.device("cpu")),
        "recipes": found,
    }
    write_json(RESULTS, result)
    print(json.dumps({key: value for key, value in result.items() if key != "recipes"}, indent=1))
    for name, passes in found.items():
        milliseconds = passes["seconds"] * 1e3
        print(f"\n`{name}`, batches of {passes['batch_size']}: {milliseconds:.1f} ms a step\n")
        print(table_of(passes, peak, bandwidth))


if __name__ == "__main__":
    main()
