"""ONNX Runtime Web is fetched once, by npm, and every file of it is checked."""

import hashlib
import io
import os
import tarfile
from pathlib import Path

import pytest

from normlab.data.cache import cache_folder
from normlab.data.cifar10.sources import NpmPackage
from normlab.errors import DataError, UserError
from normlab.interchange import web_runtime
from normlab.interchange.web_runtime import FILES, runtime

CONTENT = {name: f"this is {name}".encode() for name in FILES}


def tarball(contents: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, content in {"../../escaped": b"x", **contents}.items():
            info = tarfile.TarInfo(name if name.startswith("..") else f"package/dist/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


TARBALL = tarball(CONTENT)


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An npm that hands out a small package of these names, and counts how often."""
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()}
    sha256 = hashlib.sha256(TARBALL).hexdigest()
    monkeypatch.setattr(web_runtime, "FILES", hashes)
    monkeypatch.setattr(web_runtime, "PACKAGE", NpmPackage("tiny", "1.0.0", sha256, len(TARBALL)))
    monkeypatch.setenv("NORMLAB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tiny.tgz").write_bytes(TARBALL)
    program = tmp_path / "bin" / "npm"
    program.parent.mkdir()
    program.write_text(
        f"#!/bin/sh\necho >> {tmp_path}/calls; cp {tmp_path}/tiny.tgz tiny-1.0.0.tgz\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return program


def calls(npm: Path) -> int:
    return len((npm.parents[1] / "calls").read_text().splitlines())


def test_it_is_fetched_once_and_again_where_the_cache_is_damaged(npm: Path) -> None:
    assert runtime() == CONTENT
    assert runtime() == CONTENT
    assert calls(npm) == 1
    (damaged,) = cache_folder().rglob("*.wasm")
    damaged.write_bytes(b"other")
    assert runtime() == CONTENT
    assert calls(npm) == 2
    names = {p.name for p in cache_folder().rglob("*") if p.is_file()}
    assert names == set(CONTENT)


def test_a_tarball_needs_no_npm(npm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert runtime(npm.parents[1] / "tiny.tgz") == CONTENT


def test_what_cannot_be_had_is_one_line_with_a_remedy(
    npm: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    npm.write_text("#!/bin/sh\necho npm error code ENOTFOUND >&2; exit 1\n")
    with pytest.raises(UserError, match=r"cannot be had \(npm failed: code ENOTFOUND\): `npm pack"):
        runtime()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"there is no npm client .*give it with --runtime"):
        runtime()
    assert not list(cache_folder().glob("*"))


@pytest.mark.parametrize("kind", ["other", "fewer", "cut", "none", "nowhere"])
def test_a_wrong_tarball_is_refused(npm: Path, kind: str, tmp_path: Path) -> None:
    contents = {
        "other": tarball({**CONTENT, web_runtime.WASM: b"other"}),
        "fewer": tarball({web_runtime.WASM: CONTENT[web_runtime.WASM]}),
        "cut": TARBALL[: len(TARBALL) // 2],
        "none": b"words",
    }
    path = tmp_path / "given.tgz"
    if kind in contents:
        path.write_bytes(contents[kind])
    with pytest.raises(DataError, match=r"onnx|tiny|no tarball"):
        runtime(path)
    assert not (tmp_path.parent / "escaped").exists()
