"""joblib's Dask backend, for runs on the workers of a Dask scheduler."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from normlab.errors import UserError, install

TIMEOUT = "10s"


class WorkerDied(RuntimeError):
    """A worker of a cluster died under a run, more often than its scheduler puts up with."""


@contextmanager
def dask_backend(address: str) -> Iterator[Any]:
    """Connect to the scheduler at `address`, such as `tcp://10.0.0.1:8786`.

    When a worker dies Dask itself repeats its runs on another one, three times by default.

    Raises:
        UserError: Dask is not installed, nothing answers there, or it has no worker.
    """
    try:
        from distributed import Client
        from joblib._dask import DaskDistributedBackend
    except ImportError:
        raise UserError(f"--scheduler needs Dask: {install('cluster')}") from None

    class Backend(DaskDistributedBackend):  # type: ignore[misc]
        """Tells joblib of a task that Dask gave up; joblib 1.6's own would wait for it for ever."""

        def submit(self, func: Any, callback: Callable[[Any], Any] | None = None) -> Any:
            def tell(future: "Future[Any]") -> None:
                if callback is not None and future.exception() is not None:
                    callback(future)

            future = super().submit(func, callback)
            future.add_done_callback(tell)
            return future

        def retrieve_result_callback(self, out: Any) -> Any:
            if isinstance(out, Future):
                raise WorkerDied(str(out.exception()))
            return super().retrieve_result_callback(out)

    try:
        client: Any = Client(  # type: ignore[no-untyped-call]
            address, timeout=TIMEOUT, set_as_default=False
        )
    except (OSError, ValueError) as e:
        reason = " ".join(str(e).split())
        raise UserError(
            f"scheduler {address!r} does not answer ({reason}): start `dask scheduler` there"
        ) from None
    with client:
        if not client.ncores():
            raise UserError(f"scheduler {address!r} has no workers: start `dask worker {address}`")
        backend: Any = Backend
        yield backend(client=client)
