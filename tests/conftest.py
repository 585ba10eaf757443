"""What all tests share: a thread each, a cache that goes away, folders of their own."""

import atexit
import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import platformdirs
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # programs with two threads beside another test
os.environ.setdefault("KERAS_BACKEND", "torch")

# What tests write into the cache goes with them; downloads, if they are there, are the user's.
if "NORMLAB_CACHE" not in os.environ:
    _theirs = Path(platformdirs.user_cache_dir("normlab"))
    _cache = Path(tempfile.mkdtemp(prefix="normlab-tests-"))
    for _folder in (_theirs / "cifar10", *_theirs.glob("onnxruntime-web-*")):
        if _folder.exists():
            (_cache / _folder.name).symlink_to(_folder)
    os.environ["NORMLAB_CACHE"] = str(_cache)
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)

import torch

from normlab.api.train import _draw as DRAW

gc.set_threshold(10_000, 10, 10)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tests run side by side, so each takes one thread; what a test sets is put back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)  # a training that was cut off in this process left it on
    yield
    torch.set_num_threads(before)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings in this process leave an empty page: to draw it takes a second each time."""

    def leave_page(run: Any, *_: Any) -> None:
        (run.path / "report.html").touch()

    monkeypatch.setattr("normlab.api.train._draw", leave_page)


@pytest.fixture
def drawn(undrawn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """They draw it, in a module of undrawn ones."""
    monkeypatch.setattr("normlab.api.train._draw", DRAW)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium; tests that ask for it are skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium here: apt-get install chromium")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
