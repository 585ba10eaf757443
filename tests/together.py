"""A function run by several real processes on loopback, connected by gloo; no wait is endless."""

import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from typing import Any

from torture import server

WAIT = 60.0  # seconds for all of it, on a busy machine


def _rank(
    function: Callable[..., Any], rank: int, size: int, store: str, pipe: Any, arguments: Any
) -> None:
    from torch import distributed

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        distributed.init_process_group(
            "gloo",
            store=distributed.FileStore(store, size),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=WAIT / 2),
        )
        pipe.send((True, function(rank, *arguments)))
        distributed.destroy_process_group()
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    sys.stderr.flush()
    os._exit(0)


def together(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(rank, *arguments)` returns in each of `size` processes, as plain data.

    The function stands at the top of its module. Its processes are gone when this returns.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes, pipes = [], []
        try:
            for rank in range(size):
                ours, theirs = multiprocessing.Pipe(duplex=False)
                process = server().Process(
                    target=_rank,
                    args=(function, rank, size, f"{folder}/store", theirs, arguments),
                )
                process.start()
                theirs.close()
                processes.append(process)
                pipes.append(ours)
            results: list[Any] = []
            for rank, pipe in enumerate(pipes):
                assert connection.wait([pipe], WAIT), f"rank {rank} of {size} does not answer"
                good, value = pipe.recv()
                assert good, f"rank {rank} of {size}: {value}"
                results.append(value)
            return results
        finally:
            for process in processes:
                process.join(5)
                if process.exitcode is None:
                    process.kill()
                    process.join()
