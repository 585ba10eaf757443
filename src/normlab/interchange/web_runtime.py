"""ONNX Runtime Web, from its npm package: fetched once, checked by hash, kept in the cache."""

import hashlib
import tarfile
import zlib
from pathlib import Path

from normlab.core.files import write_atomic
from normlab.data.cache import cache_folder
from normlab.data.cifar10.download import Limits
from normlab.data.cifar10.sources import NpmPackage
from normlab.errors import DataError, UserError
from normlab.text import shown

PACKAGE = NpmPackage(
    "onnxruntime-web",
    "1.30.0",
    sha256="d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71",
    size=33_106_585,
)
# What the page needs of it, and the SHA-256 of each.
SCRIPT, GLUE, WASM = (
    "ort.wasm.min.js",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
)
FILES = {
    SCRIPT: "faece07e84faa9001f5104bbe4e5c70861d06cb2376a0dea1fa0ad33a67adc81",
    GLUE: "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b",
    WASM: "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
_LARGEST = 64 << 20  # bytes of a file of it
_GET = f"`npm pack {PACKAGE.name}@{PACKAGE.version}` writes it; give it with --runtime"


def runtime(tarball: Path | None = None) -> dict[str, bytes]:
    """The runtime's files by name: of the package's `tarball`, of the cache, or fetched by npm.

    Raises:
        UserError: it cannot be had; the message says how else.
        DataError: a file is not what it should be.
    """
    if tarball is not None:
        return _of_tarball(tarball)
    folder = cache_folder() / f"{PACKAGE.name}-{PACKAGE.version}"
    try:
        return _checked({name: (folder / name).read_bytes() for name in FILES}, folder)
    except (OSError, DataError):  # not there yet, or damaged
        pass
    work = folder.with_name(f".partial-{folder.name}")
    try:
        work.mkdir(parents=True, exist_ok=True)
        files = _of_tarball(PACKAGE.obtain(work, Limits()))
        folder.mkdir(exist_ok=True)
        for name, content in files.items():
            write_atomic(folder / name, content)
    except DataError as error:
        raise UserError(f"{PACKAGE.title} cannot be had ({error}): {_GET}") from None
    finally:
        _remove(work)
    return files


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def _of_tarball(path: Path) -> dict[str, bytes]:
    """The files in a tarball of the package; no other member of it is looked at."""
    wanted = {f"package/dist/{name}": name for name in FILES}
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz") as tar:
            for member in tar:
                if member.name in wanted and member.isreg() and member.size <= _LARGEST:
                    file = tar.extractfile(member)
                    assert file is not None
                    found[wanted[member.name]] = file.read()
                if len(found) == len(FILES):
                    break
    except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError(f"{shown(path)} is no tarball of the package ({error}): {_GET}") from None
    return _checked(found, path)


def _checked(files: dict[str, bytes], place: Path) -> dict[str, bytes]:
    for name, sha256 in FILES.items():
        if hashlib.sha256(files.get(name, b"")).hexdigest() != sha256:
            raise DataError(
                f"{shown(place)} does not hold {name} of {PACKAGE.name} {PACKAGE.version}: {_GET}"
            )
    return {name: files[name] for name in FILES}
