"""From the samples of a result to rates, times and ratios, all by round."""

import statistics
from dataclasses import dataclass
from typing import Any

from benchmarks import groups

Result = dict[str, Any]
EPOCHS = 25  # of the notebook
REACHED = 9  # the epoch at which the notebook's own validation accuracy first reaches 79 %


@dataclass(frozen=True)
class Spread:
    """A median and what lies around it."""

    median: float
    q1: float
    q3: float
    low: float
    high: float
    n: int


def spread(values: list[float]) -> Spread:
    """Median, quartiles and extremes of at least one value.

    >>> spread([3.0, 1.0, 2.0])
    Spread(median=2.0, q1=1.5, q3=2.5, low=1.0, high=3.0, n=3)
    """
    ends = (min(values), max(values), len(values))
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], *ends)
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, q1, q3, *ends)


def processor(machine: dict[str, Any]) -> str:
    """Its name without the signs and words that all names have, its generation, and AMX if any.

    >>> processor({"cpu": "Intel(R) Xeon(R) Processor"})
    'Intel Xeon'
    >>> processor({"cpu": "AMD EPYC", "cpu_model": "family 26, model 2"})
    'AMD EPYC (family 26, model 2)'
    >>> processor({"cpu": "Intel(R) Xeon(R) Processor", "amx": True})
    'Intel Xeon (AMX)'
    """
    name = " ".join(machine["cpu"].replace("(R)", "").replace("Processor", "").split())
    # Older results lack both.
    known = ", ".join(filter(None, (machine.get("cpu_model"), machine.get("amx") and "AMX")))
    return f"{name} ({known})" if known else name


def names(result: Result, group: str) -> list[str]:
    """The entries of a group."""
    return list(result["groups"][group]["entries"])


def seconds(result: Result, group: str, name: str, case: str = "") -> list[float]:
    """Of one repeat, by round."""
    return [s["seconds"] for s in result["groups"][group]["samples"][case][name]]


def images(result: Result, group: str, name: str, case: str = "") -> int:
    """In one repeat."""
    count: int = result["groups"][group]["entries"][name]["cases"][case]["images"]
    return count


def rates(result: Result, group: str, name: str, case: str = "") -> list[float]:
    """Images a second, by round."""
    count = images(result, group, name, case)
    return [count / s for s in seconds(result, group, name, case)]


def ratios(result: Result, group: str, name: str, reference: str, case: str = "") -> list[float]:
    """How many times the images a second of `reference` are those of `name`, by round."""
    pairs = zip(
        rates(result, group, name, case), rates(result, group, reference, case), strict=True
    )
    return [a / b for a, b in pairs]


def over(a: list[float], b: list[float]) -> list[float]:
    """a/b, by round."""
    return [x / y for x, y in zip(a, b, strict=True)]


def fast79(result: Result, layers: str) -> list[float]:
    """Seconds of a training of `fast79` on those layers, by round."""
    return seconds(result, "accuracy", groups.FAST + layers)


def accuracies(result: Result, layers: str) -> list[float]:
    """Test accuracies of those trainings; empty where they were cut short."""
    samples = result["groups"]["accuracy"]["samples"][""][groups.FAST + layers]
    return [s["test_accuracy"] for s in samples if "test_accuracy" in s]


def notebook_peers(result: Result) -> list[str]:
    """Who trained the notebook's network in the group `accuracy`."""
    ends = groups.TRAIN
    return [n.removesuffix(ends) for n in names(result, "accuracy") if n.endswith(ends)]


def notebook(result: Result, peer: str, epochs: int) -> list[float]:
    """Seconds of so many epochs of the notebook, by round: training steps, and validation.

    They follow from the images a second of the same round.
    """
    total = images(result, "accuracy", groups.FAST + groups.OURS)
    train, validate = peer + groups.TRAIN, peer + groups.VALIDATE
    held_out = images(result, "accuracy", validate)
    parts = zip(rates(result, "accuracy", train), rates(result, "accuracy", validate), strict=True)
    return [epochs * ((total - held_out) / r + held_out / v) for r, v in parts]


def factors(result: Result) -> dict[str, list[float]]:
    """What makes `fast79` faster than the notebook's 25 epochs on Keras; their product is that."""
    keras, plain, _ = (notebook(result, peer, EPOCHS) for peer in notebook_peers(result))
    stock, pure, ours = (
        fast79(result, layers) for layers in (groups.STOCK, groups.PURE, groups.OURS)
    )
    return {
        "PyTorch in place of Keras": over(keras, plain),
        "the recipe, on PyTorch's own layers": over(plain, stock),
        "normlab's layers in place of those": over(stock, pure),
        "their compiled kernels": over(pure, ours),
    }


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, all but the first column to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *rows])
