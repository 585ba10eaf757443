"""What several processes cost and bring: seconds a step, messages by kind, and a model for more.

    make bench-scale            # or python -m benchmarks.scale [--quick] [--out FILE]

Trains the notebook's network on CIFAR-10 (or the sample) for some steps in 1 process of 2 threads,
2 of 1 and 4 of 1, taking turns, and times the messages of gloo on loopback, also with 1 ms added to
each message. Steps that leave messages out, and learn something else, tell what these cost. The
model of more machines is computed from these figures and from what its constants say of networks.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.other_load import OtherLoad, is_quiet
from normlab.core.machine import describe_host

LIMIT = 300.0  # seconds for one measurement, or it is given up
CASES: tuple[tuple[Any, ...], ...] = (  # processes, threads each, messages left out
    *((1, 2), (2, 1), (4, 1)),
    *((2, 1, "statistics"), (2, 1, "gradients"), (2, 1, "statistics", "gradients")),
)
ROUNDS = 5
SIZES = (8, 1_000, 25_000, 400_000, 6_600_000)  # bytes of a message
WARM_UP = 3
DELAY = 1e-3  # seconds, added to each message of statistics

# One way, seconds, and bytes a second, of TCP between two machines of a data centre: assumed. The
# bandwidths are nine tenths and six tenths of the line, which one connection of gloo does not fill.
NETWORKS = {"10 Gb/s": (25e-6, 1.1e9), "100 Gb/s": (15e-6, 7.5e9)}
MACHINES = (2, 4, 8, 16, 32, 64, 128, 256)


def _rank(
    rank: int, size: int, threads: int, store: str, work: str, options: Any, pipe: Any
) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    from datetime import timedelta

    import torch
    from torch import distributed

    from normlab.core.environment import settings

    distributed.init_process_group(
        "gloo",
        store=distributed.FileStore(store, size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    with settings(threads, torch.device("cpu")):
        pipe.send(WORK[work](rank, size, threads, options))
    os._exit(0)


def together(size: int, threads: int, work: str, options: Any) -> list[Any]:
    """What each of `size` processes measures."""
    context, processes, pipes = multiprocessing.get_context("spawn"), [], []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(size):
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(
                    target=_rank,
                    args=(rank, size, threads, f"{folder}/store", work, options, theirs),
                )
                process.start()
                processes.append(process)
                pipes.append(ours)
            found = []
            for pipe in pipes:
                if not pipe.poll(LIMIT):
                    raise SystemExit(f"{work} in {size} processes gave no answer in {LIMIT:g} s")
                found.append(pipe.recv())
            return found
        finally:
            for process in processes:
                process.join(5)
                if process.is_alive():
                    process.kill()
                    process.join()


def measure_steps(rank: int, size: int, threads: int, options: dict[str, Any]) -> dict[str, Any]:
    """Medians over the steps: seconds, processor seconds, seconds in messages and bytes by kind."""
    import torch
    from torch import distributed

    import normlab
    from normlab import recipes
    from normlab.core.groups import Group
    from normlab.core.ranks import Ranks
    from normlab.core.streams import stream
    from normlab.runs import Task
    from normlab.training.parallel import ParallelStep, share_statistics
    from normlab.training.preparation import make_plan, new_state
    from normlab.training.step import train_step

    images = normlab.load(options["data"])
    recipe = recipes.get("notebook").override(batch_size=options["batch"])
    task = Task(
        recipe=recipe,
        seed=0,
        data=images.name,
        data_sha256=images.sha256,
        class_names=images.class_names,
        image_size=32,
    )
    spent: dict[str, float] = defaultdict(float)
    sent: dict[str, float] = defaultdict(float)
    without = options.get("without", ())

    class Timed(Group):
        """Counts its messages, and the time that this process waits for them."""

        kind = "statistics"

        def _timed(self, call: Any, values: Any, times: int) -> Any:
            started = time.perf_counter()
            time.sleep(options.get("delay", 0.0))
            result = call(values)
            spent[self.kind] += time.perf_counter() - started
            sent[self.kind] += times * values.numel() * values.element_size()
            return result

        def gather(self, values: Any) -> Any:
            return self._timed(super().gather, values, size - 1)

        def sum(self, values: Any) -> Any:
            return self._timed(super().sum, values, 1)

        def begin_sum(self, values: Any) -> Any:
            if "gradients" in without:
                return None
            sent[self.kind] += values.numel() * values.element_size()
            return super().begin_sum(values)

        def finish(self, work: Any) -> None:
            if work is None:
                return
            started = time.perf_counter()
            super().finish(work)  # a delay of these is hidden behind the backward pass
            spent[self.kind] += time.perf_counter() - started

    class Numbers(Timed):
        kind = "gradients"

    ranks = Ranks()
    if size > 1:
        ranks = Ranks(rank, size, statistics=Timed(distributed.new_group()), numbers=Numbers())
    plan = make_plan(task, images, threads, ranks=ranks)
    state = new_state(task, images, torch.device("cpu"))
    batches = plan.batches()
    step_of: Any = ParallelStep(state.model, batches) if size > 1 else train_step
    if "statistics" in without:
        share_statistics(state.model, None)
    state.model.train()
    seconds, cpu = [], []
    for step in range(WARM_UP + options["steps"]):
        if step == WARM_UP:
            spent.clear()
            sent.clear()
        began, began_cpu = time.perf_counter(), time.process_time()
        x, labels = batches(step)
        step_of(state.model, state.optimizer, x, labels, stream(0, "dropout", step))
        seconds.append(time.perf_counter() - began)
        cpu.append(time.process_time() - began_cpu)
    n = options["steps"]
    return {
        "seconds": seconds[WARM_UP:],
        "cpu_seconds": cpu[WARM_UP:],
        "waited": {kind: value / n for kind, value in spent.items()},
        "bytes": {kind: value / n for kind, value in sent.items()},
    }


def measure_messages(rank: int, size: int, threads: int, options: dict[str, Any]) -> Any:
    """Median seconds of a sum over all, by bytes; and of a gathering."""
    import torch

    from normlab.core.groups import Group

    group, found = Group(), {}
    for size_ in SIZES:
        values = torch.zeros(size_ // 8, dtype=torch.float64)
        repeats = max(5, min(options["repeats"], 40_000_000 // size_))
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            group.sum(values)
            times.append(time.perf_counter() - started)
        gathers = []
        for _ in range(repeats if size_ < 1_000_000 else 0):
            started = time.perf_counter()
            group.gather(values)
            gathers.append(time.perf_counter() - started)
        found[size_] = {
            "sum": statistics.median(times),
            "sum_least": min(times),
            "gather": statistics.median(gathers) if gathers else None,
        }
    return found


WORK = {"steps": measure_steps, "messages": measure_messages}


# ---- the model ----

CHANNELS = (
    3,
    32,
    32,
    3136,
    512,
)  # of the notebook's batch normalisations; the first sends no gradient
GRADIENT_BYTES = 4 * 1_647_344
BUCKETS = 4
BACKWARD = 0.6  # the share of a step in which gradients can be on their way


def step_seconds(
    machines: int, compute: float, latency: float, bandwidth: float
) -> dict[str, float]:
    """Seconds of a step of so many `machines`, each with `compute` s of work.

    Rings: a gathering takes P − 1 turns, a sum 2(P − 1) turns of a P-th of the bytes each; a turn
    costs the latency, and its bytes over the bandwidth. Messages of statistics are waited for;
    gradients are, as far as they are not hidden behind the backward pass.
    """
    turns = machines - 1
    statistics_ = 0.0
    for i, channels in enumerate(CHANNELS):
        statistics_ += turns * (latency + 8 * (2 * channels + 1) / bandwidth)
        if i:
            statistics_ += 2 * turns * (latency + 8 * 2 * channels / machines / bandwidth)
    gradients = 2 * turns * (BUCKETS * latency + GRADIENT_BYTES / machines / bandwidth)
    shown = max(0.0, gradients - BACKWARD * compute)
    return {
        "step": compute + statistics_ + shown,
        "statistics": statistics_,
        "gradients": gradients,
        "gradients_waited_for": shown,
    }


def model(compute: float) -> dict[str, Any]:
    """By network and machines: a step, and the throughput over that many times one machine's."""
    return {
        name: {
            str(p): (s := step_seconds(p, compute, latency, bandwidth))
            | {"efficiency": compute / s["step"]}
            for p in MACHINES
        }
        for name, (latency, bandwidth) in NETWORKS.items()
    }


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the ranks of a case: the slowest one's median step, and means of the rest."""
    return {
        "step": max(statistics.median(f["seconds"]) for f in found),
        "least": max(min(f["seconds"]) for f in found),
        "cpu": sum(statistics.median(f["cpu_seconds"]) for f in found),
        "waited": {
            k: statistics.mean(f["waited"].get(k, 0.0) for f in found)
            for k in ("statistics", "gradients")
        },
        "bytes": {k: found[0]["bytes"].get(k, 0.0) for k in ("statistics", "gradients")},
        "steps": len(found[0]["seconds"]),
    }


def middle(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of a case's rounds the one with the median step, and every round's step."""
    ordered = sorted(rounds, key=lambda s: s["step"])
    return ordered[(len(ordered) - 1) // 2] | {"rounds": [s["step"] for s in rounds]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--out", type=Path, default=Path("docs/results/scale.json"))
    options = parser.parse_args()
    settings = {
        "data": options.data,
        "batch": options.batch,
        "steps": 8 if options.quick else options.steps,
        "repeats": 100 if options.quick else 500,
    }
    others = OtherLoad()
    turns = [
        [
            summary(together(p, t, "steps", {**settings, "without": without}))
            for p, t, *without in CASES
        ]
        for _ in range(2 if options.quick else ROUNDS)
    ]
    cases = {
        f"{p} × {t}" + "".join(f", no {kind}" for kind in without): middle(of_case)
        for (p, t, *without), of_case in zip(CASES, zip(*turns, strict=True), strict=True)
    }
    messages = together(2, 1, "messages", settings)[0]
    delayed = summary(together(2, 1, "steps", {**settings, "delay": DELAY}))
    half = {**settings, "batch": options.batch // 2}
    alone = summary(together(1, 1, "steps", half))
    share = others.share()
    small = messages[SIZES[0]]["sum"] / 2
    large = SIZES[-1] / messages[SIZES[-1]]["sum"]
    near = step_seconds(2, alone["step"], small, large)
    later = DELAY * (2 * len(CHANNELS) - 1)
    predicted = {"loopback": near, "delayed": {**near, "step": near["step"] + later}}
    result = {
        "environment": describe_host(),
        "others_share": share,
        "quiet": is_quiet(share),
        "settings": settings,
        "cases": cases,
        "half_batch_one_thread": alone,
        "messages": messages,
        "delayed": delayed,
        "predicted_two_ranks": predicted,
        "model_compute_seconds": alone["cpu"],
        "model": model(alone["cpu"]),
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    for line in table(result):
        print(line)


def table(result: dict[str, Any]) -> list[str]:
    """The tables of docs/scale.md."""
    lines = [
        f"others took {result['others_share'] or 0:.0%} of the machine meanwhile"
        + ("" if result["quiet"] else ": not quotable as times"),
        "| processes × threads | s a step | rounds | least | processor s | waited: statistics | "
        "gradients | bytes sent: statistics | gradients |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, c in result["cases"].items():
        lines.append(
            f"| {name} | {c['step']:.3f} | {min(c['rounds']):.3f} to {max(c['rounds']):.3f} | "
            f"{c['least']:.3f} | {c['cpu']:.3f} | "
            f"{c['waited']['statistics'] / c['step']:.0%} | "
            f"{c['waited']['gradients'] / c['step']:.0%} | {c['bytes']['statistics']:,.0f} | "
            f"{c['bytes']['gradients']:,.0f} |"
        )
    nets = result["model"]
    lines += ["", "| machines | " + " | ".join(nets) + " |", "|---" * (1 + len(nets)) + "|"]
    for p in MACHINES:
        left = [m[str(p)]["efficiency"] for m in nets.values()]
        lines.append(f"| {p} | " + " | ".join(f"{v:.0%}" for v in left) + " |")
    for name, case in result["predicted_two_ranks"].items():
        lines.append(f"predicted for two ranks, {name}: {case['step']:.3f} s")
    measured = {"loopback": result["cases"]["2 × 1"], "delayed": result["delayed"]}
    for name, case in measured.items():
        lines.append(
            f"measured for two ranks, {name}: {case['step']:.3f} s; waited for statistics "
            f"{case['waited']['statistics']:.4f} s"
        )
    return lines


if __name__ == "__main__":
    main()
