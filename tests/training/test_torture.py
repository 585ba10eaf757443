"""Kill, fill the disk, damage files: every run ends with the same bits, and nothing stray stays."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import normlab
from faults import Faults
from normlab.core.files import locked
from normlab.core.tensors import read_tensors
from normlab.errors import DataError, Interrupted
from normlab.runs import latest
from normlab.training.checkpoint import CHECKPOINT, PREVIOUS, restore
from normlab.training.preparation import new_state
from normlab.training.state import Plan, State
from torture import StudyTorture, Torture, begin, check_one_line, check_same, long_form, stray

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def torture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Torture]:
    place = tmp_path_factory.mktemp("torture")
    yield Torture(place, random.Random(0), epochs=1, batch_size=16)
    assert not stray(place)


def test_sigkill_sigterm_and_double_ctrl_c_at_random_instants(torture: Torture) -> None:
    for _ in range(2):
        torture.kill_run(kills=3)
    torture.signal_run(signal.SIGTERM)
    torture.signal_run(signal.SIGINT, twice=True)
    assert torture.counts["SIGKILL of a run"] >= 2


def test_sigkill_in_the_writing_of_a_checkpoint(torture: Torture) -> None:
    """Of the second one: half its bytes are written, and the first has been put aside."""
    events = torture.events
    writes = [
        i
        for i, (kind, name) in enumerate(events, 1)
        if kind == "write" and name.startswith(".checkpoint")
    ]
    n = writes[1]
    out = torture.new()
    assert begin(torture.command(out), out, n).wait() == -signal.SIGKILL
    assert [p.name for p in out.glob(".checkpoint*.tmp")]
    assert not (out / CHECKPOINT).exists()
    assert (out / PREVIOUS).exists()
    torture.finish(out)


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EIO])
def test_writes_that_fail_at_a_few_of_all_places(torture: Torture, fault: int) -> None:
    """The soak test takes all of them."""
    count = len(torture.events)
    for n in (1, 7, count // 2, count):
        torture.fail_write(n, fault)


@pytest.mark.soak
def test_the_long_form(tmp_path: Path) -> None:
    """`make torture` does the same with more than three times as many kills."""
    counts = long_form(tmp_path, random.Random(1), kills=60, studies=6, say=print)
    assert counts["SIGKILL of a run, inside the writing of a checkpoint"] >= 3


@pytest.mark.soak
def test_the_same_seed_gives_the_same_bits_twenty_times(torture: Torture) -> None:
    for _ in range(20):
        out = torture.new()
        session = begin(torture.command(out), out)
        assert session.wait() == 0, session.lines
        check_same(torture.whole, out)


@pytest.mark.soak
def test_a_study_on_a_disk_that_fails(torture: Torture) -> None:
    study = StudyTorture(torture, seeds=1)
    written = [i for i, (kind, name) in enumerate(study.events, 1) if name.startswith(".batch-s")]
    study.fail_write(written[0], errno.ENOSPC)


@pytest.fixture
def cut(torture: Torture, tmp_path: Path) -> Path:
    """A run killed when it had two checkpoints."""
    out = tmp_path / "cut"
    second = [i for i, (_, name) in enumerate(torture.events, 1) if name == CHECKPOINT][1]
    assert begin(torture.command(out), out, second + 2).wait() == -signal.SIGKILL
    assert (out / CHECKPOINT).exists()
    assert (out / PREVIOUS).exists()
    return out


def test_no_truncated_or_altered_checkpoint_is_taken_for_a_good_one(cut: Path) -> None:
    path = cut / CHECKPOINT
    whole, rng = path.read_bytes(), random.Random(0)
    read_tensors(path)
    for size in range(0, len(whole), 4096):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError):
            read_tensors(path)
    for _ in range(40):
        content = bytearray(whole)
        place = rng.choice((rng.randrange(2000), rng.randrange(len(whole))))
        content[place] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        with pytest.raises(DataError):
            read_tensors(path)


@pytest.mark.parametrize("damage", ["truncated", "missing", "another run's"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    torture: Torture, cut: Path, damage: str
) -> None:
    content = (cut / CHECKPOINT).read_bytes()
    good = (cut / PREVIOUS).read_bytes()
    if damage == "missing":
        (cut / CHECKPOINT).unlink()
    elif damage == "truncated":
        (cut / CHECKPOINT).write_bytes(content[: 4096 * (len(content) // 8192)])
    else:  # whole, but of another network
        (cut / CHECKPOINT).write_bytes((torture.whole / "last.safetensors").read_bytes())
    run = normlab.open_run(cut)
    images = run.task.load()
    state = new_state(run.task, images, torch.device("cpu"))
    problem = restore(cut, state)
    assert (problem is None) == (damage == "missing")
    assert state.step > 0
    if problem:  # so that no later save can move the damaged one over the good one
        assert (cut / CHECKPOINT).read_bytes() == good
    torture.finish(cut)


def test_a_clock_set_back_a_year_changes_nothing(
    torture: Torture, cut: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    year, now = 365 * 86400, time.time()
    for path in (*cut.iterdir(), cut):
        os.utime(path, (now + year, now + year))
    monkeypatch.setattr(time, "time", lambda: now - year)
    normlab.resume(cut)
    assert read_end(cut) == read_end(torture.whole)
    for number, age in (("0001", 0), ("0002", year), ("0010", 2 * year)):  # the newest is oldest
        (in_tmp / "runs" / f"{number}-x").mkdir(parents=True)
        (in_tmp / "runs" / f"{number}-x" / "recipe.json").touch()
        os.utime(in_tmp / "runs" / f"{number}-x", (now - age, now - age))
    assert latest(in_tmp / "runs").name == "0010-x"


def read_end(run: Path) -> str:
    return str(json.loads((run / "result.json").read_text())["weights_sha256"])


LIMITED = """
import resource, sys
import normlab.reports.run_report, normlab.api.train
from normlab.__main__ import main
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (int(sys.argv[1]) << 20), -1))
main(sys.argv[2:])
"""


class Stop:
    """Sends Ctrl-C after the first step."""

    def before_training(self, plan: Plan) -> None: ...

    def after_step(self, state: State, epoch: int, batch: int, batches: int) -> None:
        if state.step == 1:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_out_of_memory_is_one_line_and_leaves_the_state(tmp_path: Path) -> None:
    """Batches of 540 pictures, in processes that may take so many MiB more than they begin with.

    They meet their end at different places: in loading, in a forward and in a backward pass.
    """
    options: dict[str, Any] = {"data": "sample", "batch_size": 540, "epochs": 2, "threads": 1}
    whole = normlab.train("notebook", out=tmp_path / "whole", **options)
    cut = tmp_path / "cut"
    with pytest.raises(Interrupted):
        normlab.train("notebook", out=cut, observers=(Stop(),), **options)
    before = {p.name: p.read_bytes() for p in cut.glob("*.safetensors")}
    assert CHECKPOINT in before
    for room in (20, 90, 200):
        done = subprocess.run(
            [sys.executable, "-c", LIMITED, str(room), "train", "--resume", str(cut)],
            capture_output=True,
            text=True,
            timeout=240,
        )
        lines = done.stderr.splitlines()
        assert done.returncode == 2, (room, lines)
        check_one_line(lines)
        assert "out of memory" in lines[-1], room
        assert {p.name: p.read_bytes() for p in cut.glob("*.safetensors")} == before
        assert not [p for p in stray(cut) if not p.endswith(".lock")]
    normlab.resume(cut)
    assert read_end(cut) == read_end(whole.path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB, which takes root to make."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)]
    if sys.platform != "linux" or os.geteuid() or subprocess.run(command, check=False).returncode:
        pytest.skip("mounting a file system takes root on Linux")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_disk_that_is_really_full(torture: Torture, small_disk: Path) -> None:
    out = small_disk / "run"
    session = begin(torture.command(out), out)
    assert session.wait() == 2, session.lines
    assert "disk is full" in session.lines[-1]
    check_one_line(session.lines)
    assert not stray(out)
    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    torture.finish(out)


def test_two_processes_given_the_same_run(torture: Torture, cut: Path) -> None:
    """The second one is refused while the first is at work, and changes nothing."""
    with locked(cut):
        session = begin(["train", "--resume", str(cut)], cut)
        assert session.wait() == 2
        assert "another normlab is at work" in session.lines[-1]
    torture.finish(cut)


def test_a_seam_that_counts_nothing_proves_nothing(tmp_path: Path) -> None:
    from normlab.core.files import write_json

    with Faults(tmp_path) as faults:
        write_json(tmp_path / "x.json", {})
    assert [kind for kind, _ in faults.events] == ["write", "flush", "rename", "flush"]
    with Faults(tmp_path, 1, errno.EIO), pytest.raises(OSError, match=r"x\.json"):
        write_json(tmp_path / "x.json", {"a": 1})
    assert json.loads((tmp_path / "x.json").read_text()) == {}
