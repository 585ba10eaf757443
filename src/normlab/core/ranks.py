"""One training in several processes: who they are, what they agree on, how one's end is learnt.

`torchrun` starts the processes ("ranks") and tells each by its environment who it is; a scheduler
may do the same with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. What is small and rare
(settings, hashes, failures) goes through the store of `torch.distributed`, as JSON, and every wait
has an end. Numbers go by collectives, where a rank that has ended breaks the connection of the
others at once.
"""

import contextlib
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cached_property
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, TCPStore

from normlab.core.groups import Group
from normlab.core.launcher import GOES_ON, world
from normlab.errors import Interrupted, NonFiniteError, NormlabError, RankError, UserError
from normlab.text import listed

T = TypeVar("T")

WAIT = 120.0  # seconds for the others to come, and for any message
READY = 1_800.0  # seconds for the data of all, which may have to be fetched
FAREWELL = 3.0  # seconds for the survivors to say that they are
BEAT, DEAD = 2.0, 15.0  # seconds between signs of life, and without one until a rank counts as dead
RUN = "run"  # the key that holds the run's folder, for processes that are started again


class Together(NormlabError):
    """What ended all ranks, told once; `exit_code` is that of the rank where it happened."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Ranks:
    """The processes of a training, seen from one of them; `ALONE` is the only one.

    Attributes:
        rank: of this process, from 0; rank 0 writes the run's folder.
        size: how many there are.
        local: rank and number of those on this machine.
        wait: seconds for any message.
        store: what they tell each other by; None where there is one process.
        piece: so many images of a batch stay together in one rank.
        statistics: for the messages of batch normalisations.
        numbers: for all others.
    """

    rank: int = 0
    size: int = 1
    local: tuple[int, int] = (0, 1)
    wait: float = WAIT
    piece: int = 1
    store: Any = field(default=None, repr=False)
    lasting: Any = field(default=None, repr=False)
    statistics: Group = field(default_factory=Group, repr=False)
    numbers: Group = field(default_factory=Group, repr=False)

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def name(self) -> str:
        return f"rank {self.rank} of {self.size}"

    def share(self, n: int) -> tuple[int, int]:
        """Where this rank's part of n images begins and ends; parts differ by one piece at most."""
        begin, end, pieces = self.pieces(n)
        return self.piece * begin, n if end == pieces else self.piece * end

    def pieces(self, n: int) -> tuple[int, int, int]:
        """The first piece of this rank's part of n images, the one after its last, and how many
        there are in all.
        """
        pieces = -(-n // self.piece)
        if pieces > 1 and n % self.piece == 1:
            pieces -= 1  # a single image has no variance: it joins the piece before it
        return pieces * self.rank // self.size, pieces * (self.rank + 1) // self.size, pieces

    def mine(self, items: list[Any]) -> list[Any]:
        """This rank's items: every size-th, from its own number on."""
        return items[self.rank :: self.size]

    def sum(self, values: Tensor) -> Tensor:
        """The sum of all ranks' `values`; alone, `values`."""
        return self.numbers.sum(values) if self.size > 1 else values

    def broadcast(self, tensors: Mapping[str, Tensor]) -> None:
        """Give every rank the values that rank 0's tensors have."""
        for tensor in tensors.values():
            with self.numbers.explained():
                torch.distributed.broadcast(tensor, 0)

    def exchange(self, name: str, value: Any, wait: float | None = None) -> list[Any]:
        """What every rank has under `name`, which is used once, in the order of the ranks.

        Raises:
            Together: another rank has failed.
            RankError: one did not answer in time; it is named.
        """
        if self.size == 1:
            return [value]
        wait = self.wait if wait is None else wait

        def ask() -> tuple[list[int], list[Any]]:
            self._tell(f"{name}/{self.rank}", value)
            missing = self._await(name, wait)
            told = [] if missing else [self.store.get(f"{name}/{r}") for r in range(self.size)]
            return missing, [json.loads(text) for text in told]

        with self.numbers.explained():
            missing, everyone = bounded(ask, wait + FAREWELL)
        if missing:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise RankError(
                f"{_ranks(missing)} of {self.size} did not come within {wait:g} s: see whether it "
                f"was started, and whether its machine reaches {where}"
            )
        return everyone

    def refuse(self, *, record: bool | Any = False, minutes: bool = False) -> None:
        """Refuse what works in one process only.

        Raises:
            UserError: what it is, and what to do.
        """
        if self.size == 1:
            return
        if record:
            raise UserError(
                f"--record with {self.size} processes would see only the part of one: record a run "
                "of one process"
            )
        if minutes:
            raise UserError(
                f"--minutes with {self.size} processes is not planned: their paces differ; choose "
                "--epochs"
            )

    @contextlib.contextmanager
    def agreeing(self, name: str) -> Iterator[None]:
        """What raises inside for one rank ends all of them, with one line that names it."""
        problem: BaseException | None = None
        try:
            yield
        except (NormlabError, OSError) as e:
            if self.size == 1:
                raise
            problem = e
        code = getattr(problem, "exit_code", 2)
        outcomes = self.exchange(name, problem and [str(problem), code], READY)
        failed = [r for r, outcome in enumerate(outcomes) if outcome]
        if not failed:
            return
        text, code = outcomes[failed[0]]
        whose = "" if len(failed) == self.size else f"{_ranks(failed)} of {self.size}: "
        raise Together(whose + text, code)

    def same(self, name: str, facts: Mapping[str, Any]) -> None:
        """Refuse to go on with ranks that differ in one of the `facts`.

        Raises:
            Together: the first difference, with the rank that has it.
        """
        everyone = self.exchange(name, facts)
        for key, value in everyone[0].items():
            for r, others in enumerate(everyone):
                if others[key] != value:
                    raise Together(
                        f"rank {r} of {self.size} has other {key}: {_short(others[key])} there, "
                        f"{_short(value)} on rank 0; give all ranks the same",
                        2,
                    )

    def remember(self, value: str) -> None:
        """Keep the run's folder for processes that take the place of these."""
        if self.lasting is not None and self.first:
            self.lasting.set(RUN, value)

    @cached_property
    def remembered(self) -> str | None:
        """The run's folder, where these processes take the place of others that failed."""
        if self.lasting is None or not self.lasting.check([RUN]):
            return None
        return str(self.lasting.get(RUN).decode())

    def explain(self, error: BaseException) -> str:
        """Why a message failed: the rank that failed, or those that do not answer any more."""

        def ask() -> str:
            if not self.store.check(["failed"]):
                self._tell(f"farewell/{self.rank}", None)
                missing = self._await("farewell", FAREWELL, heed=False)
                if missing:
                    return f"{_ranks(missing)} ended or cannot be reached any more"
            if self.store.check(["failed"]):
                return str(self.store.get("failed").decode())
            return str(error)

        with contextlib.suppress(RuntimeError, TimeoutError):
            return bounded(ask, 2 * FAREWELL)
        return "rank 0, or torchrun on its machine, ended or cannot be reached any more"

    def leave(self) -> None:
        """Go; rank 0 goes last where the store is its own, so that the others can read in it."""

        def ask() -> None:
            self._tell(f"left/{self.rank}", None)
            if self.first and not hosted():
                self._await("left", FAREWELL, heed=False)

        with contextlib.suppress(RuntimeError, TimeoutError):
            bounded(ask, 2 * FAREWELL)

    def live(self) -> None:
        """Give signs of life until the store ends, or this process."""

        def beat() -> None:
            with contextlib.suppress(RuntimeError):
                for number in itertools.count():
                    self.store.set(f"alive/{self.rank}", str(number))
                    time.sleep(BEAT)

        threading.Thread(target=beat, daemon=True).start()

    def _tell(self, key: str, value: Any) -> None:
        self.store.set(key, json.dumps(value))

    def _await(self, name: str, wait: float, *, heed: bool = True) -> list[int]:
        """Which ranks have not told their `name` after so many seconds."""
        end, pause = time.monotonic() + wait, 0.01
        waiting = list(range(self.size))
        seen: dict[int, tuple[bytes, float]] = {}  # the last sign of life, and when it was new
        while True:
            waiting = [r for r in waiting if not self.store.check([f"{name}/{r}"])]
            now = time.monotonic()
            if not waiting or now > end:
                return waiting
            if heed and self.store.check(["failed"]):
                raise RankError("another rank has failed")
            for r in waiting if heed else []:
                if self.store.check([f"alive/{r}"]):  # else it has not come yet
                    sign = self.store.get(f"alive/{r}")
                    if seen.get(r, (b"", 0.0))[0] != sign:
                        seen[r] = sign, now
                    elif now - seen[r][1] > DEAD:
                        raise RankError(f"rank {r} gives no sign of life")
            time.sleep(pause)
            pause = min(2 * pause, 0.2)


ALONE = Ranks()


def bounded(call: Callable[[], T], seconds: float) -> T:
    """What `call` returns, or the error it raises; a store whose machine hangs has no end itself.

    Raises:
        TimeoutError: it did not return in time.
    """
    results: list[tuple[T | None, BaseException | None]] = []

    def run() -> None:
        try:
            results.append((call(), None))
        except BaseException as e:
            results.append((None, e))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not results:
        raise TimeoutError(f"no answer within {seconds:g} s")
    value, error = results[0]
    if error is not None:
        raise error
    return cast(T, value)


@contextlib.contextmanager
def joined(wait: float = WAIT) -> Iterator[Ranks]:
    """Meet the other processes for the duration of the `with` block.

    What fails inside is told once: by the rank where it happened, or by rank 0 where all know it.
    The survivors of a rank that was killed say so and end.

    Raises:
        RankError: this rank lost the others; the message names those that are missing.
    """
    rank, size = world()
    if size == 1:
        again = "TORCHELASTIC_RUN_ID" in os.environ  # torchrun may start another in its place
        yield Ranks(lasting=_open_store(0, 1, wait)) if again else ALONE
        return
    ranks = _meet(rank, size, wait)
    try:
        with _told_once(ranks):
            yield ranks
    finally:
        ranks.leave()


@contextlib.contextmanager
def _told_once(ranks: Ranks) -> Iterator[None]:
    """Let what ends the ranks be told once; see `joined`."""
    try:
        yield
    except (Together, NonFiniteError, Interrupted) as e:  # known to all of them
        _end(ranks, e)
    except RankError as e:
        raise RankError(f"{ranks.name} ended: {ranks.explain(e)}{GOES_ON}") from None
    except BaseException as e:
        text = f"{ranks.name}: {e if isinstance(e, NormlabError | OSError) else repr(e)}"
        with contextlib.suppress(RuntimeError, TimeoutError):
            ranks.store.set("failed", text)
        if isinstance(e, NormlabError):
            raise Together(text, e.exit_code) from None
        raise
    else:
        torch.distributed.destroy_process_group()


def _end(ranks: Ranks, error: BaseException) -> None:
    """All ranks end by the same error; the first one says so."""
    if ranks.first:
        raise error
    raise SystemExit(getattr(error, "exit_code", 1)) from None


def _meet(rank: int, size: int, wait: float) -> Ranks:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        raise UserError("this PyTorch has no torch.distributed with gloo: install one that has")
    end_with_parent()
    lasting = _open_store(rank, size, wait)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(attempt, lasting)
    local = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    ranks = Ranks(rank, size, local, wait, store=store, lasting=lasting)
    seconds = timedelta(seconds=wait)
    ranks.live()
    try:
        ranks.exchange("come", None)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=seconds
        )
        handle = torch.distributed.new_group(timeout=seconds)
    except RankError as e:
        raise RankError(f"{ranks.name}: {e}") from None
    except RuntimeError as e:
        raise RankError(f"{ranks.name} ended: {ranks.explain(e)}") from None
    return replace(ranks, statistics=Group(handle))


def _open_store(rank: int, size: int, wait: float) -> Any:
    """Where the processes meet: rank 0's, or torchrun's, which outlives the processes."""
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdecimal():
        raise UserError(
            f"WORLD_SIZE={size} and no MASTER_ADDR and MASTER_PORT in the environment: start with "
            "torchrun, or name the machine of rank 0 and a free port there"
        )
    try:
        store = bounded(
            lambda: TCPStore(
                host,
                int(port),
                is_master=rank == 0 and not hosted(),
                timeout=timedelta(seconds=wait),
                wait_for_workers=False,
            ),
            wait + FAREWELL,
        )
    except (RuntimeError, TimeoutError) as e:
        used = "EADDRINUSE" in str(e) or "address already in use" in str(e).lower()
        raise RankError(
            f"rank {rank} of {size}: "
            + (
                f"port {port} of this machine is in use: choose another MASTER_PORT"
                if used
                else f"rank 0 does not answer at {host}:{port} within {wait:g} s: see whether it "
                "was started, and whether this machine reaches that one"
            )
        ) from None
    return PrefixStore("normlab", store)


def hosted() -> bool:
    """Whether torchrun keeps the store, not rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def end_with_parent() -> None:
    """Let Linux end this process when the one that started it, torchrun, has been killed."""
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() == 1:  # it was killed before
        raise SystemExit(128 + signal.SIGTERM)


def _ranks(numbers: list[int]) -> str:
    return ("rank " if len(numbers) == 1 else "ranks ") + listed([str(n) for n in numbers])


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"
