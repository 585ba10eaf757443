"""Every write of exports, caches, reports and studies fails once: the last good state stays."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import normlab
from cifar_files import ARRAYS, TINY, python_version, write_folder
from faults import Faults
from normlab.__main__ import run as command
from normlab.data.cifar10.cache import read_cache
from normlab.data.cifar10.fetching import fetch
from normlab.data.cifar10.sources import LocalCopy
from normlab.data.pictures import decoding
from normlab.errors import DataError
from normlab.interchange import writing
from normlab.interchange.certificate import Certificate, certify
from normlab.models import SigmoidNet
from normlab.reports import study_figures as figures
from normlab.reports.study_report import write_report
from normlab.study import outcomes
from recorded import write_run
from studies import make_design, make_outcome, make_study
from torture import stray

ERRORS = (errno.ENOSPC, errno.EIO)


def every_fault(folder: Path, action: Callable[[], object], check: Callable[[], None]) -> int:
    """Let each event of `action` fail in turn; `check` what is there after each. Their number."""
    with Faults(folder) as faults:
        action()
    for fault in ERRORS:
        for n in range(1, len(faults.events) + 1):
            failing = Faults(folder, n, fault, lasting=fault == errno.ENOSPC)
            with failing, pytest.raises((OSError, DataError)) as error:
                action()
            assert os.strerror(fault) in str(error.value)
            assert "\n" not in str(error.value)
            assert not stray(folder)
            check()
    action()
    return len(faults.events)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NORMLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_cache_of_cifar10(tmp_path: Path, cache: Path) -> None:
    source = LocalCopy(write_folder(tmp_path / "data", python_version(ARRAYS)))

    def again() -> None:
        if (cache / "cifar10" / "y_test.npy").exists():
            (cache / "cifar10" / "y_test.npy").unlink()  # so that it is written anew
        fetch(sources=[source], reference=TINY, report=[].append)

    def check() -> None:
        """The old folder, the new one, or none; never a part, or a stray one."""
        assert {p.name for p in cache.iterdir()} <= {"cifar10", "cifar10.lock"}
        if (cache / "cifar10" / "y_test.npy").exists():
            assert read_cache(TINY) is not None

    assert every_fault(cache, again, check) >= 11
    assert read_cache(TINY) is not None


def test_the_cache_of_pictures(tmp_path: Path, cache: Path) -> None:
    content = []
    for i in range(3):
        Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / "x.png")
        content.append((tmp_path / "x.png").read_bytes())
    keys = iter(range(1000))

    def decode() -> None:
        found = decoding.decode(tmp_path, f"{next(keys)}", content, 8)  # a key that is not there
        assert found.pixels[:, 0, 0, 0].tolist() == [0, 1, 2]

    def check() -> None:
        assert not [p.name for p in cache.iterdir() if "partial" in p.name]

    assert every_fault(cache, decode, check) >= 9


def test_a_cache_of_pictures_from_an_older_version(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "x.png")
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "_VERSION", 0)
        decoding.decode(tmp_path, "k", [tmp_path / "x.png"], 8)
    calls: list[object] = []
    real = decoding._decode_all
    monkeypatch.setattr(decoding, "_decode_all", lambda *a: (calls.append(a), real(*a))[1])
    for _ in range(2):
        found = decoding.decode(tmp_path, "k", [tmp_path / "x.png"], 8)
        assert (np.asarray(found.pixels) == 9).all()
    assert len(calls) == 1


def test_a_study_and_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make_study(tmp_path / "s", {"batch": [0.6, 0.7], "none": [0.5, 0.6]})
    drawings = figures.draw_all(study)
    drawn = figures.render(drawings["pairs"])  # once, for it takes a second
    monkeypatch.setattr(figures, "draw_all", lambda _: drawings)
    monkeypatch.setattr(figures, "render", lambda _: drawn)
    design = make_design()
    outcome = make_outcome(design, "batch", 0, 0.6)
    before = {p.name: p.read_bytes() for p in (tmp_path / "s" / "runs").iterdir()}

    def check() -> None:
        assert {p.name: p.read_bytes() for p in (tmp_path / "s" / "runs").iterdir()} == before

    written = every_fault(
        tmp_path / "s", lambda: outcomes.save(tmp_path / "s" / "runs", outcome), check
    )
    assert written == 4
    assert every_fault(tmp_path / "s", lambda: write_report(study), check) >= 16
    assert normlab.open_study(tmp_path / "s").outcomes


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of the notebook on a few images of 16 × 16."""
    folder = tmp_path_factory.mktemp("project")
    sample = normlab.load("sample")
    arrays = {"x_train": sample.x_train[:50, ::2, ::2], "y_train": sample.y_train[:50]}
    arrays |= {"x_test": sample.x_test[:20, ::2, ::2], "y_test": sample.y_test[:20]}
    np.savez(folder / "d.npz", **arrays, class_names=np.array(sample.class_names))
    torch.set_num_threads(1)
    normlab.train("notebook", data=folder / "d.npz", out=folder / "run", epochs=1, threads=1)
    return folder


def certificate_of(run: normlab.Run) -> Certificate:
    """What an export of `run` that answers as it does would be certified by."""
    evaluation = run.evaluate()
    return certify(
        evaluation.probabilities, evaluation.probabilities, evaluation.labels, data="x",
        data_sha256="0", weights_sha256="0", checked_with="itself",
    )  # fmt: skip


# Keras asks a PyTorch tensor for a copy in a way that NumPy 2 has deprecated.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_an_export(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, run = tmp_path / "model.keras", normlab.open_run(project / "run")
    writing.export_run(run, out, file_format="keras")
    content, exported = out.read_bytes(), writing.FORMATS["keras"]
    built = writing.Built({out.name: content}, certificate_of(run))
    monkeypatch.setitem(writing.FORMATS, "keras", replace(exported, build=lambda job: built))

    def unchanged() -> None:
        assert out.read_bytes() == content
        assert {p.name for p in tmp_path.iterdir()} <= {"model.keras", "README.md"}

    written = every_fault(
        tmp_path, lambda: writing.export_run(run, out, file_format="keras"), unchanged
    )
    assert written == 8


def test_what_a_killed_writer_left_is_swept_by_the_next(tmp_path: Path) -> None:
    from normlab.core.files import write_json

    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    dead, alive = tmp_path / f".x.json.{done.pid}.tmp", tmp_path / f".x.json.{os.getppid()}.tmp"
    others = tmp_path / ".y.json.1.tmp"
    for path in (dead, alive, others):
        path.write_text("half")
    write_json(tmp_path / "x.json", {})
    assert {p.name for p in tmp_path.iterdir()} == {"x.json", alive.name, others.name}


AS_NOBODY = """
import json, os, pwd, sys
from normlab.__main__ import run
commands = json.loads(sys.argv[1])
run([*commands[0][:-1], "warm"])  # Python's own files may not be open to everybody
os.chdir("shared")
if os.geteuid() == 0:
    nobody = pwd.getpwnam("nobody")
    os.setgid(nobody.pw_gid)
    os.setuid(nobody.pw_uid)
for words in commands:
    print("CODE", run(words), file=sys.stderr)
"""


def as_nobody(commands: list[list[str]], cwd: Path) -> list[str]:
    """Run commands without root's rights, which no permission stops; a line and a code each."""
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, json.dumps(commands)],
        cwd=cwd,
        env={**os.environ, "HOME": str(cwd), "MPLCONFIGDIR": str(cwd)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    return done.stderr.splitlines()


@pytest.fixture
def open_folder(tmp_path: Path) -> Iterator[Path]:
    """A working folder that others may enter, for which pytest's own must be, too."""
    changed = []
    for folder in (tmp_path, *tmp_path.parents):
        mode = folder.stat().st_mode
        if not mode & 0o001:
            changed.append((folder, mode))
            folder.chmod(mode | 0o055)
    yield tmp_path
    for folder, mode in reversed(changed):
        folder.chmod(mode)


def test_folders_that_cannot_be_read_or_written(project: Path, open_folder: Path) -> None:
    data, place = (project / "d.npz").read_bytes(), open_folder / "shared"
    for folder in (open_folder, place):
        folder.mkdir(exist_ok=True)
        (folder / "d.npz").write_bytes(data)
        (folder / "d.npz").chmod(0o644)
    place.chmod(0o755)
    (place / "closed").mkdir(mode=0o555)
    (place / "secret.npz").write_bytes(data)
    (place / "secret.npz").chmod(0o000)
    train = ["train", "notebook", "--epochs", "1", "--threads", "1", "--data"]
    lines = as_nobody(
        [
            [*train, "d.npz", "--out", "closed/run"],
            [*train, "d.npz", "--out", "closed"],
            [*train, "secret.npz", "--out", "x"],
        ],
        cwd=open_folder,
    )
    assert lines[1::2] == ["CODE 2"] * 3, lines
    for line, value in zip(lines[::2], ("closed/run", "closed", "secret.npz"), strict=True):
        assert value in line
        assert "ermission denied" in line
    assert not list((place / "closed").iterdir())


def test_temporary_files_on_another_file_system(project: Path, tmp_path: Path) -> None:
    """A rename does not cross file systems; nothing of ours is renamed from TMPDIR."""
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("no second file system at hand")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "normlab", "export", str(project / "run")),
            *("--format", "keras", "--out", "m.keras"),
        ],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": "/dev/shm", "LANG": "C", "COLUMNS": "20"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "m.keras"]


def test_an_evaluation_that_cannot_be_written_leaves_the_run(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    with Faults(project, 1, errno.EIO):
        assert command(["evaluate", "run"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "the disk failed" in lines[-1]
    assert "evaluation.json" in lines[-1]
    assert command(["evaluate", "run"]) == 0
    assert not stray(project)


def test_a_recorded_run_is_not_harmed_by_a_failed_inspection(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "batch", SigmoidNet(image_size=32, norm="batch"))
    before = (run.path / "recording.npz").read_bytes()
    with Faults(tmp_path, 1, errno.ENOSPC, lasting=True):
        assert command(["inspect", str(run.path)]) == 2
    assert (run.path / "recording.npz").read_bytes() == before
    assert not stray(tmp_path)
