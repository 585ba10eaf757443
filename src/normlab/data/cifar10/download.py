"""Fetch one known file over HTTP in bounded time, or say in one line why not."""

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from normlab.core.bars import transient_bar
from normlab.errors import DataError

if TYPE_CHECKING:
    import requests

_RETRIES = 2
_CHUNK = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long a source may take, in seconds. A source that would take too long is left early."""

    connect: float = 8.0
    read: float = 20.0  # without a single byte
    total: float = 900.0
    grace: float = 30.0  # of a try; after that, one too slow to end within `total` is left


class _Interrupted(Exception):
    """The transfer was cut off: worth another try."""


def download(url: str, folder: Path, *, sha256: str, size: int, limits: Limits) -> Path:
    """Download `url` into `folder`; returns the file, whose size and SHA-256 are as stated.

    A cut connection, a stall or a server's error (5xx) is tried again twice; a host that cannot be
    reached, any other answer and wrong content are not. Redirects from https to http are refused.

    Raises:
        DataError: the file could not be had; the message says why.
    """
    import pooch

    # Pooch would log every attempt; our lines say the same.
    pooch.get_logger().setLevel("ERROR")
    transfer = _Transfer(size, limits)

    def run() -> None:
        try:
            pooch.retrieve(url, f"sha256:{sha256}", "archive", folder, downloader=transfer.stream)
        except Exception as error:  # handed to the waiting thread
            transfer.error = error

    # A thread of its own, because no timeout of a socket bounds a server that sends a byte now
    # and then. Being a daemon it holds nobody up; `stop` ends it at its next byte.
    thread = threading.Thread(target=run, daemon=True, name=f"download {url}")
    with transfer_bar(size) as show:
        thread.start()
        try:
            while thread.is_alive():
                thread.join(0.1)
                show(transfer.received)
                transfer.check_pace()
        finally:
            transfer.stop.set()
            thread.join(1.0)
    if transfer.error is not None:
        raise DataError(_reason(transfer.error)) from transfer.error
    return folder / "archive"


class _Transfer:
    """One download: what the waiting thread and the receiving thread share."""

    def __init__(self, size: int, limits: Limits) -> None:
        self.size = size
        self.limits = limits
        self.started = self.paced = time.monotonic()  # its pace is measured from there on
        self.received = 0
        self.stop = threading.Event()
        self.error: Exception | None = None

    def check_pace(self) -> None:
        now = time.monotonic()
        elapsed, minutes = now - self.paced, self.limits.total / 60
        if now - self.started > self.limits.total:
            raise DataError(f"not finished after {minutes:.3g} minutes")
        if elapsed > self.limits.grace and self.received < self.size * elapsed / self.limits.total:
            rate = self.received / elapsed
            raise DataError(f"{rate / 1000:.0f} kB/s is too slow to end within {minutes:.3g} min")

    def stream(self, url: str, output_file: str, pooch: object) -> None:
        """Pooch's downloader protocol."""
        import requests

        for attempt in range(_RETRIES + 1):
            try:
                with _session(secure=urlsplit(url).scheme == "https") as session:
                    self._receive(session, url, output_file)
                return
            except (requests.ConnectTimeout, requests.exceptions.SSLError):
                raise
            except (_Interrupted, requests.Timeout):
                if attempt == _RETRIES or self.stop.wait(0.5 * (attempt + 1)):
                    raise
                if self.received:  # the next try begins anew; a host that sent nothing gets no more
                    self.paced = time.monotonic()

    def _receive(self, session: "requests.Session", url: str, output_file: str) -> None:
        import requests
        from requests.exceptions import ChunkedEncodingError

        self.received = 0
        timeouts = (self.limits.connect, self.limits.read)
        plain = {"Accept-Encoding": "identity"}  # the archive's own gzip is not to be undone
        with session.get(url, stream=True, timeout=timeouts, headers=plain) as response:
            if response.status_code >= 500:
                raise _Interrupted(f"the server answered {response.status_code}")
            if response.status_code != 200:
                raise DataError(f"the server answered {response.status_code} {response.reason}")
            try:
                with open(output_file, "wb") as file:
                    for chunk in response.iter_content(_CHUNK):
                        file.write(self._checked(chunk))
            except (requests.ConnectionError, ChunkedEncodingError) as error:
                raise _Interrupted(self._progress("was cut off")) from error
        if self.received < self.size:
            raise _Interrupted(self._progress("ended early"))

    def _checked(self, chunk: bytes) -> bytes:
        if self.stop.is_set():
            raise DataError("stopped")
        if self.received == 0 and not chunk.startswith(b"\x1f\x8b"):
            raise DataError("the server sent something else than a gzipped archive")
        self.received += len(chunk)
        if self.received > self.size:
            raise DataError(f"the server sent more than the {self.size:,} bytes of the archive")
        return chunk

    def _progress(self, what: str) -> str:
        return f"the download {what} after {self.received:,} of {self.size:,} bytes"


def _session(*, secure: bool) -> "requests.Session":
    import requests

    class Session(requests.Session):
        def get_redirect_target(self, resp: requests.Response) -> str | None:
            target: str | None = super().get_redirect_target(resp)
            if target and secure and urlsplit(target).scheme == "http":
                resp.close()
                raise DataError("the server redirects from https to plain http; refused")
            return target

    return Session()


def _reason(error: Exception) -> str:
    """One plain line for whatever ended a download."""
    import requests

    if isinstance(error, DataError | _Interrupted):
        return str(error)
    if isinstance(error, requests.ConnectTimeout):
        return "the host does not answer"
    if isinstance(error, requests.exceptions.SSLError):
        return "no secure connection to the host"
    if isinstance(error, requests.Timeout):
        return "the host sends nothing"
    if isinstance(error, requests.ConnectionError):
        return "the host cannot be reached"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, ValueError) and "hash" in str(error):
        return "the archive has the wrong SHA-256"
    return f"{type(error).__name__}: {error}".splitlines()[0]


def transfer_bar(size: int) -> AbstractContextManager[Callable[[int], None]]:
    """A bar of the bytes received; see `transient_bar`."""
    from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    return transient_bar(*columns, total=size)
