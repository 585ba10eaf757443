"""Start one training in several processes of this machine, with the launcher of `torchrun`."""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

from normlab.core.cores import cores
from normlab.errors import RankError, UserError

GOES_ON = "; an unfinished run goes on with `normlab train --resume RUN`"
GRACE = 20  # seconds from one process's end until the others are killed


def world() -> tuple[int, int]:
    """Rank and number of processes, as the environment has them.

    Raises:
        UserError: what it has is not that.
    """
    words = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    try:
        rank, size = map(int, words)
        if 0 <= rank < size:
            return rank, size
    except ValueError:
        pass
    raise UserError(
        f"RANK={words[0]!r} and WORLD_SIZE={words[1]!r} in the environment: let torchrun set them, "
        "or give a rank from 0 and how many there are"
    )


def launch(words: Sequence[str], processes: int, *, restarts: int = 0) -> int:
    """Run `normlab` with these words in so many processes; the exit code is the first failure's.

    Ports are free ones of loopback. A signal to this process goes to all of them, and none of them
    outlives it.

    Raises:
        UserError: more processes than cores.
        RankError: a process was killed; it is named.
    """
    if not 1 <= processes <= cores():
        raise UserError(
            f"processes={processes}: choose from 1 to {cores()}, this machine's cores; torchrun "
            "starts more, or on several machines"
        )
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // processes)))
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(GRACE))
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.ERROR)  # the processes' own lines say it better
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=restarts,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "normlab", *words)
    except ChildFailedError as e:
        rank, failure = e.get_first_failure()
        if failure.exitcode >= 0:
            return int(failure.exitcode)
        killer = signal.Signals(-failure.exitcode).name
        raise RankError(f"rank {rank} of {processes} was killed by {killer}{GOES_ON}") from None
    except SignalException as e:
        return 128 + int(e.sigval)
    return 0
