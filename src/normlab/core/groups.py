"""A group of processes that exchange messages, by `torch.distributed`.

Every message is one that all members send: a call that one of them leaves out makes the others
wait, until the time is over that was given to `init_process_group`, or the connection breaks.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normlab.errors import NormlabError, RankError, UserError


@dataclass(frozen=True, eq=False)
class Group:
    """Some of the processes of a training, or all of them; copies of a network share it.

    Attributes:
        handle: a `torch.distributed.ProcessGroup`; None for all processes.
    """

    handle: Any = None

    def __deepcopy__(self, memo: object) -> "Group":
        return self  # what a process group is connected to cannot be copied

    def __reduce__(self) -> Any:
        if self.handle is not None:
            raise UserError("a layer of a group of its own cannot be written: set layer.group=None")
        return Group, ()

    @property
    def size(self) -> int:
        """How many processes it has.

        Raises:
            UserError: there are none yet.
        """
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            raise UserError(
                "a synchronised layer in training has no processes to share statistics with: call "
                "torch.distributed.init_process_group first, or use .eval()"
            )
        return torch.distributed.get_world_size(self.handle)

    @property
    def rank(self) -> int:
        """This process's number in it, from 0."""
        return torch.distributed.get_rank(self.handle)

    def gather(self, values: Tensor) -> Tensor:
        """Every member's `values` (K,), in the order of their ranks: (size, K)."""
        everyone = values.new_empty((self.size, len(values)))
        with self.explained():
            torch.distributed.all_gather(list(everyone), values, group=self.handle)
        return everyone

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the members, the same bits for each, in place of `values`."""
        with self.explained():
            torch.distributed.all_reduce(values, group=self.handle)
        return values

    def begin_sum(self, values: Tensor) -> Any:
        """Begin `sum`, and give back what `finish` waits for; `values` are not to be touched."""
        with self.explained():
            return torch.distributed.all_reduce(values, group=self.handle, async_op=True)

    def finish(self, work: Any) -> None:
        """Wait for what `begin_sum` began."""
        with self.explained():
            work.wait()

    def explained(self) -> AbstractContextManager[None]:
        """What a backend raises in the `with` block is a `RankError`."""
        return _Explained()


class _Explained(AbstractContextManager[None]):
    """Turns what a backend raises into a `RankError`."""

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if isinstance(error, RuntimeError | TimeoutError) and not isinstance(error, NormlabError):
            raise RankError(f"no message from another process ({error})") from None
