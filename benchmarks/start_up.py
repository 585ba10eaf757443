"""From the cache to the end of the first step of `fast79`, each time in a new process."""

import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any


class _FirstStep(Exception):
    pass


def first_step(data: str, threads: int) -> dict[str, float]:
    """Seconds of the imports, and from there to the end of the first step."""
    started = time.perf_counter()
    import normlab.api.train
    from normlab.training.state import Plan, State

    imported = time.perf_counter()

    class Stop:
        def before_training(self, plan: Plan) -> None:
            pass

        def after_step(self, state: State, epoch: int, batch: int, batches: int) -> None:
            raise _FirstStep

    with tempfile.TemporaryDirectory() as scratch:
        try:
            normlab.api.train.train(
                "fast79",
                data=data,
                out=Path(scratch) / "run",
                threads=threads,
                device="cpu",
                observers=(Stop(),),
            )
        except _FirstStep:
            return {"imports": imported - started, "seconds": time.perf_counter() - imported}
    raise RuntimeError("the training ended before its first step")


def measure_start_up(data: str, threads: int, rounds: int) -> list[dict[str, Any]]:
    """`first_step` in so many processes, one after the other."""
    samples = []
    for _ in range(rounds):
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            samples.append(pool.submit(first_step, data, threads).result())
    return samples
