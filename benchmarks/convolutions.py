"""What a convolution takes and how far it is from float64, by tiles and by what is multiplied.

    python -m benchmarks.convolutions --threads 2

Ways to compute take turns, `ROUNDS` times each; a time is the median of a way's rounds, and a ratio
is taken within each round. Errors are norms of the difference from float64, over the norm, on
values drawn from N(0, 1). Where there is AMX, bfloat16 is its products, and 16 → 64 channels stay
float32. Written to docs/results/convolutions.json; the table is printed, too.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from benchmarks.other_load import OtherLoad
from benchmarks.summary import table
from normlab import kernels
from normlab.core.environment import describe_machine, settings
from normlab.core.files import write_json
from normlab.kernels import Tiles

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "convolutions.json"
ROUNDS = 9
SHAPES = (  # images, channels in and out, height and width: of fast79, then of fast94
    (200, 16, 64, 16),
    (200, 64, 128, 8),
    (200, 128, 128, 4),
    (250, 64, 256, 16),
    (250, 256, 256, 8),
    (250, 256, 256, 4),
)
WAYS = {
    f"tiles of {side}, {'bfloat16' if half else 'float32'}": Tiles(side, half)
    for side in (2, 4)
    for half in (False, True)
}


def passes(x: Tensor, weight: Tensor, g: Tensor, tiles: Tiles) -> dict[str, Callable[[], Tensor]]:
    """Convolution, and its gradients together."""

    def gradients() -> Tensor:
        _, weight_grad, _ = kernels.conv3x3_gradients(x, weight, g, tiles=tiles, x_grad=True)
        return weight_grad

    return {"convolution": lambda: kernels.conv3x3(x, weight, None, tiles), "gradients": gradients}


def measure(shape: tuple[int, int, int, int]) -> list[dict[str, Any]]:
    """Each way's milliseconds and errors on one shape."""
    n, c_in, c_out, side = shape
    generator = torch.Generator().manual_seed(0)

    def drawn(*size: int) -> Tensor:
        values = torch.randn(size, generator=generator)
        return values.contiguous(memory_format=torch.channels_last)

    x, weight = drawn(n, c_in, side, side), drawn(c_out, c_in, 3, 3).contiguous()
    g = drawn(n, c_out, side, side)
    wide = weight.double().requires_grad_()
    y = conv2d(x.double(), wide, padding=1)
    (weight_grad,) = torch.autograd.grad(y, [wide], g.double())
    exact = {"convolution": y.detach(), "gradients": weight_grad}
    work = {way: passes(x, weight, g, tiles) for way, tiles in WAYS.items()}
    took: dict[tuple[str, str], list[float]] = {}
    errors: dict[tuple[str, str], float] = {}
    for done in range(ROUNDS + 1):  # the first is not counted
        for way in WAYS:
            for name, run in work[way].items():
                started = time.perf_counter()
                found = run()
                seconds = time.perf_counter() - started
                if done:
                    took.setdefault((way, name), []).append(seconds)
                else:
                    error = (found.double() - exact[name]).norm() / exact[name].norm()
                    errors[way, name] = float(error)
    rows = []
    for (way, name), seconds in took.items():
        usual = took[next(iter(WAYS)), name]
        ratios = [a / b for a, b in zip(seconds, usual, strict=True)]
        rows.append(
            {
                "images": n,
                "channels": [c_in, c_out],
                "side": side,
                "pass": name,
                "way": way,
                "milliseconds": 1e3 * statistics.median(seconds),
                "of_tiles_of_2": statistics.median(ratios),
                "error": errors[way, name],
            }
        )
    return rows


def table_of(rows: list[dict[str, Any]]) -> str:
    """A line a shape and pass; time, its share of that of tiles of 2 in float32, and error."""
    head = ["images, channels, pixels", "pass", *WAYS]
    lines: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        c_in, c_out = row["channels"]
        place = f"{row['images']}, {c_in} → {c_out}, {row['side']} × {row['side']}"
        lines.setdefault((place, row["pass"]), []).append(
            f"{row['milliseconds']:.2f} ms, {row['of_tiles_of_2']:.2f} ×, {row['error']:.0e}"
        )
    return table(head, [[place, name, *cells] for (place, name), cells in lines.items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    threads, device = parser.parse_args().threads, torch.device("cpu")
    if not kernels.has_bfloat16():
        parser.error("this processor, or the compiler here, has no products of bfloat16")
    others = OtherLoad()
    with settings(threads, device):
        rows = [row for shape in SHAPES for row in measure(shape)]
    machine = describe_machine(threads, device)
    write_json(RESULTS, {"rounds": ROUNDS, "rows": rows, "others": others.share(), **machine})
    print(table_of(rows))


if __name__ == "__main__":
    main()
