"""Fill the cache with CIFAR-10 from the first source whose data are right."""

import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from normlab.data.cache import Report, write_cache, writing
from normlab.data.cifar10 import layouts as cifar10
from normlab.data.cifar10.cache import FOLDER, is_good, location
from normlab.data.cifar10.download import Limits
from normlab.data.cifar10.layouts import CIFAR10, Arrays, Reference
from normlab.data.cifar10.sources import LocalCopy, Source, default_sources, own_copies
from normlab.errors import DataError
from normlab.text import printable


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """What `fetch` did. `source` is None if the data were in the cache already."""

    folder: Path
    source: str | None
    seconds: float

    def __str__(self) -> str:
        how = "was already there" if self.source is None else f"came from {self.source}"
        return f"CIFAR-10 {how}; checked bit for bit; in {self.folder} ({self.seconds:.1f} s)"


def fetch(
    path: str | Path | None = None,
    *,
    sources: Sequence[Source] | None = None,
    reference: Reference = CIFAR10,
    limits: Limits | None = None,
    report: Report | None = None,
) -> Fetched:
    """Put CIFAR-10 into the cache, from the first source whose data are right bit for bit.

    path: an archive or folder to take it from, and no other.
    sources: what to try instead of `default_sources()`.
    report: takes one line for each source tried; by default they go to standard error.

    Safe with many processes at once: one works, the others wait for it.

    Raises:
        DataError: no source had the data, or the cache cannot be written. The cache is then as
            it was before.
    """
    started = time.monotonic()
    report = report or _to_stderr
    limits = limits or Limits()
    folder = location()
    source = None
    if path is not None:
        sources = [LocalCopy(Path(path).expanduser())]
    if path is not None or not is_good(reference):
        with writing(report, FOLDER) as work:
            # Another process may have done it while this one waited.
            if path is not None or not is_good(reference, report):
                if sources is None:
                    sources = default_sources()
                    _report_own_copies(sources, report)
                source, arrays = _obtain(sources, work, reference, limits, report)
                write_cache(arrays, work, folder)
    return Fetched(folder=folder, source=source, seconds=time.monotonic() - started)


def _report_own_copies(sources: Sequence[Source], report: Report) -> None:
    if not any(isinstance(source, LocalCopy) for source in sources):
        places = ", ".join(dict.fromkeys(str(path.parent) for path in own_copies()))
        report(f"no copy of your own in {places}")


def _obtain(
    sources: Sequence[Source], work: Path, reference: Reference, limits: Limits, report: Report
) -> tuple[str, Arrays]:
    """The title of the first source that works, and its data."""
    reasons = []
    for number, source in enumerate(sources):
        report(f"trying {source.title}")
        try:
            folder = work / str(number)
            folder.mkdir()
            return source.title, cifar10.read(source.obtain(folder, limits), reference)
        except DataError as error:
            reasons.append(str(error))
            report(f"  failed: {error}")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    if len(reasons) == 1:
        raise DataError(reasons[0])
    raise DataError(
        f"none of {len(sources)} sources had CIFAR-10 ({'; '.join(reasons)}); "
        "get cifar-10-python.tar.gz yourself and give it with --data, or try --data sample"
    )


def _to_stderr(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)
