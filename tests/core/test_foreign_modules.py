"""No command imports a module that lies in the current folder or beside the data."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from normlab.core.children import child_environment, module_path, safe_children
from servers import start

# What every process of ours imports, and what Python looks for at its start.
NAMES = ("numpy", "torch", "json", "sitecustomize", "usercustomize", "joblib", "PIL")
# These `python -m` itself imports before this program has a say; the script `normlab` does not.
EARLY = (
    "normlab",
    "runpy",
    "typing",
    "contextlib",
    "pickle",
    "random",
    "struct",
    "multiprocessing",
)
SCRIPT = Path(sys.executable).with_name("normlab")


def plant(folder: Path, names: tuple[str, ...]) -> None:
    """Write modules that leave a trace when they are imported."""
    for name in names:
        trace = f"open({str(folder / 'imported')!r}, 'a').write({name!r} + '\\n')\n"
        (folder / f"{name}.py").write_text(trace)


def traces(folder: Path) -> str:
    return "".join(p.read_text() for p in folder.rglob("imported"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with pictures below it, and planted modules in both."""
    folder = tmp_path_factory.mktemp("planted")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for label in ("cat", "dog"):
            place = folder / "pictures" / split / label
            place.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (40, 40, 3), np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.png")
    plant(folder, NAMES)
    plant(folder / "pictures", NAMES)
    return folder


def call(folder: Path, words: str, program: tuple[str, ...] | None = None) -> None:
    program = program or (sys.executable, "-m", "normlab")
    done = subprocess.run(
        [*program, *words.split()], cwd=folder, capture_output=True, text=True, timeout=200
    )
    assert done.returncode in (0, 1), done.stderr
    assert "Traceback" not in done.stderr
    assert traces(folder) == ""


@pytest.fixture(scope="module")
def run(folder: Path) -> str:
    call(
        folder,
        "train fast79 --data pictures --skip-bad --record --batch-size 8 --out run --threads 1",
    )
    return "run"


@pytest.mark.parametrize(
    "words",
    [
        "evaluate run",
        "predict run pictures/test",
        "doctor run",
        "recalibrate run",
        "inspect run",
        "export run --out model.onnx",
        "compare fast79 --data sample --arms batch,none --seeds 2 --jobs 2 --out study",
        "data info",
        "recipes",
    ],
)
def test_commands(folder: Path, run: str, words: str) -> None:
    call(folder, words)


def test_pictures_in_the_current_folder(folder: Path) -> None:
    call(folder / "pictures", "train fast79 --data . --skip-bad --batch-size 8 --threads 1")


def test_the_server_and_its_decoders(
    folder: Path, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = next((folder / "pictures" / "test" / "cat").iterdir()).read_bytes()
    monkeypatch.setenv("PYTHONSAFEPATH", "1")  # of the test's own launcher, which is `python -c`
    monkeypatch.chdir(folder)
    server = start(run)
    monkeypatch.delenv("PYTHONSAFEPATH")
    try:
        assert server.post(picture).status_code == 200
    finally:
        code, _ = server.stop()
    assert code == 143
    assert traces(folder) == ""


@pytest.mark.skipif(not SCRIPT.exists(), reason="normlab is not installed as a script")
def test_the_script_imports_nothing_of_the_folder_at_all(folder: Path, tmp_path: Path) -> None:
    plant(tmp_path, NAMES + EARLY)
    words = "compare fast79 --data sample --arms batch,none --seeds 2 --jobs 2 --out study"
    call(tmp_path, words, program=(str(SCRIPT),))


def test_a_path_with_an_empty_part_is_mended_for_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(tmp_path, NAMES)
    monkeypatch.chdir(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", str(elsewhere), ".", str(tmp_path), "a"]))
    monkeypatch.setattr(sys, "path", ["", *sys.path, str(tmp_path)])
    expected = os.pathsep.join([str(elsewhere), str(tmp_path / "a")])
    assert child_environment(A="b")["PYTHONPATH"] == expected
    assert child_environment(A="b")["A"] == "b"
    assert not {"", str(tmp_path)} & set(module_path())
    before = dict(os.environ)
    with safe_children(A="b"):
        subprocess.run([sys.executable, "-c", "import json"], check=True, timeout=100)
        assert os.environ["A"] == "b"
    assert dict(os.environ) == before
    assert traces(tmp_path) == ""
