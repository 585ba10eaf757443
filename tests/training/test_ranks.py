"""Real processes that train together: what they agree on, refuse, survive and go on with."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import normlab
import ranks
from normlab.core.tensors import read_tensors
from ranks import Trainings, begin, end
from torture import check_same

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    return Trainings(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def whole(trainings: Trainings) -> Path:
    return trainings.run(2, trainings.place / "whole")


def weights(run: Path) -> dict[str, np.ndarray]:
    return {k: v.numpy() for k, v in read_tensors(run / "last.safetensors")[0].items()}


def test_a_rank_is_killed_and_the_run_goes_on_to_the_same_bits(
    trainings: Trainings, whole: Path
) -> None:
    """The soak test kills more often, and `make ranks` thirty times."""
    out = trainings.place / "cut"
    for which, seconds in ((1, 1.0), (0, 1.5)):
        if not (out / "result.json").exists():  # on a fast machine it may have ended
            trainings.kill_one(2, out, seconds, which)
    if not (out / "result.json").exists():
        trainings.run(2, out)
    else:  # killed behind its result, it left a lock that nobody holds, and perhaps no page
        (out / ".lock").unlink(missing_ok=True)
        if not (out / "report.html").exists():
            normlab.resume(out)
    check_same(whole, out)


@pytest.mark.soak
def test_more_kills(tmp_path: Path) -> None:
    counts = ranks.kill_many(tmp_path, 6, random.Random(0))
    assert counts["SIGKILL of a rank"] == 6


def test_another_number_of_ranks_needs_allow_changes_and_ends_within_rounding(
    trainings: Trainings, whole: Path
) -> None:
    """Two, then one, then three."""
    out = trainings.place / "sizes"
    began = begin(2, trainings.words(out), trainings.place)
    try:
        interrupt_after_a_checkpoint(began, out)
        assert [rank.wait() for rank in began.values()] == [143, 143]
        assert [len(rank.lines) for rank in began.values()] == [1, 0]
        assert "nothing is lost" in began[0].lines[0]
    finally:
        end(began)
    refused = begin(1, trainings.words(out), trainings.place)
    assert refused[0].wait() == 2
    assert "processes (2 then, 1 now)" in refused[0].lines[0]
    alone = begin(1, trainings.words(out, "--allow-changes"), trainings.place)
    interrupt_after_a_checkpoint(alone, out)
    assert alone[0].wait() in (0, 143)
    if not (out / "result.json").exists():
        trainings.run(3, out, "--allow-changes")
    for name, value in weights(whole).items():
        scale = max(1.0, float(np.abs(value).max()))
        np.testing.assert_allclose(weights(out)[name], value, rtol=0, atol=1e-3 * scale)


def interrupt_after_a_checkpoint(began: dict[int, ranks.Rank], out: Path) -> None:
    before = (out / "checkpoint.safetensors").stat().st_mtime_ns if out.exists() else 0
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and began[0].process.exitcode is None:
        path = out / "checkpoint.safetensors"
        if path.exists() and path.stat().st_mtime_ns != before:
            break
        time.sleep(0.01)
    began[len(began) - 1].kill(signal.SIGTERM)  # one is told, and all end after the same step


def _raises() -> None:
    from normlab.training import parallel

    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "the network card burns")

    parallel.ParallelStep.__call__ = fail  # type: ignore[method-assign,assignment]


def _another_version() -> None:
    import torch

    torch.__version__ = "1.0.0"  # type: ignore[misc,assignment]


def _other_data() -> None:
    from normlab.data import loading

    read = loading.read_npz

    def changed(path: Path) -> object:
        images = read(path)
        return replace(images, x_train=images.x_train ^ 1)

    loading.read_npz = changed  # type: ignore[attr-defined,assignment]


def _dies_while_it_reads_its_data() -> None:
    from normlab.data import loading

    loading.read_npz = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[attr-defined]


def _waits_less() -> None:
    from normlab.core import ranks

    ranks.DEAD = 3.0


def test_a_rank_that_is_killed_before_the_first_message_is_missed(trainings: Trainings) -> None:
    """It gives no more signs of life; in a training that is waited for 20 seconds, here for 3."""
    changes = {0: _waits_less, 1: _dies_while_it_reads_its_data}
    out = trainings.place / "early"
    began = begin(2, trainings.words(out), trainings.place, changes=changes)
    try:
        assert began[1].wait() == -signal.SIGKILL
        assert began[0].wait(ranks.END) == 1
        (line,) = began[0].lines
        assert "rank 0 of 2 ended: rank 1 ended or cannot be reached any more" in line
    finally:
        end(began)
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "said", "code"),
    [
        (_raises, "rank 1 of 2: [Errno 5] the network card burns", 1),
        (_another_version, "rank 1 of 2 has other version of torch: 1.0.0 there", 2),
        (_other_data, "rank 1 of 2 has other data (by SHA-256)", 2),
    ],
)
def test_a_rank_that_is_different_or_fails_is_named(
    trainings: Trainings, change: object, said: str, code: int
) -> None:
    out = trainings.place / "different"
    began = begin(2, trainings.words(out), trainings.place, changes={1: change})  # type: ignore[dict-item]
    try:
        codes = {number: rank.wait(ranks.END) for number, rank in began.items()}
        lines = [line for rank in began.values() for line in rank.lines]
        assert codes[0] == code, lines
        assert codes[1] in (code, 2), lines
        assert any(said in line for line in lines), lines
        assert not any("Traceback" in line for line in lines)
        assert max(len(rank.lines) for rank in began.values()) == 1
    finally:
        end(began)


def test_a_rank_that_never_comes_and_a_port_in_use(trainings: Trainings) -> None:
    out = trainings.place / "never"
    words = [*trainings.words(out), "--wait", "2"]
    for missing, said in (
        (1, "rank 1 of 2 did not come within 2 s"),
        (0, "rank 0 does not answer"),
    ):
        began = begin(2, words, trainings.place, leave_out=missing)
        (rank,) = began.values()
        assert rank.wait(ranks.END) == 1
        assert len(rank.lines) == 1
        assert said in rank.lines[0]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        began = begin(2, words, trainings.place, port=taken.getsockname()[1])
        try:
            assert began[0].wait(ranks.END) == 1
            assert "is in use: choose another MASTER_PORT" in began[0].lines[0]
            assert began[1].wait(ranks.END) == 1
            assert len(began[1].lines) == 1
        finally:
            end(began)
    assert not out.exists()


def test_what_does_not_work_in_several_processes_is_refused_before_any_work(
    trainings: Trainings,
) -> None:
    out = trainings.place / "refused"
    for words, said in (
        ([*trainings.words(out), "--record"], "record a run of one process"),
        ([*trainings.words(out), "--minutes", "1"], "choose --epochs"),
        (["compare", "--arms", "batch,none"], "is work for one process and was started in 2"),
        ([*trainings.words(out), "--norm", "nothing"], "unknown norm"),
    ):
        began = begin(2, words, trainings.place)
        try:
            assert [rank.wait() for rank in began.values()] == [2, 2]
            assert [len(rank.lines) for rank in began.values()] == [1, 0]
            assert said in began[0].lines[0]
        finally:
            end(began)
    assert not out.exists()


def test_three_way_scores_in_two_ranks(trainings: Trainings) -> None:
    out = trainings.run(2, trainings.place / "three", "--three-way")
    row = json.loads((out / "history.jsonl").read_text().splitlines()[-1])
    assert {"val_loss", "val_loss_batch", "val_loss_population"} <= row.keys()


def command(*words: str) -> tuple[list[str], dict[str, str]]:
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    return [sys.executable, "-m", "normlab", *words], environment


def children(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def start_processes(trainings: Trainings, out: Path, *more: str) -> subprocess.Popen[str]:
    words, environment = command(*trainings.words(out, "--processes", "2", *more))
    words += ["--epochs", "400"]
    return subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)


def await_steps(process: subprocess.Popen[str], out: Path) -> list[int]:
    """The ranks, once an epoch is done."""
    deadline = time.monotonic() + 90
    while not (out / "history.jsonl").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return children(process.pid)


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_processes_starts_them_and_leaves_none_behind(trainings: Trainings) -> None:
    """One is killed: the command says which. The command is killed: they end."""
    out = trainings.place / "processes"
    process = start_processes(trainings, out)
    pids = await_steps(process, out)
    assert len(pids) == 2
    os.kill(pids[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=ranks.END)
    assert process.returncode == 1
    lines = [line for line in errors.splitlines() if line.startswith("normlab:")]
    assert "rank 1 of 2 was killed by SIGKILL" in lines[-1]
    assert "Traceback" not in errors
    gone(pids)
    second = trainings.place / "orphans"
    process = start_processes(trainings, second)
    pids = await_steps(process, second)
    process.kill()
    process.communicate()
    gone(pids)


def gone(pids: list[int]) -> None:
    deadline = time.monotonic() + ranks.END
    while any(Path(f"/proc/{pid}/status").exists() for pid in pids):
        if time.monotonic() > deadline:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"{pids} are still there")
        time.sleep(0.1)


@pytest.mark.soak
def test_a_restart_goes_on_from_the_last_checkpoint_by_itself(trainings: Trainings) -> None:
    """By torchrun's --max-restarts and by --processes'; to the bits of an untouched run."""
    whole = trainings.run(2, trainings.place / "long", "--epochs", "60")
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2"]
    for name, launcher in (("torchrun", torchrun), ("own", [])):
        out = trainings.place / f"restarted by {name}"
        words, environment = command(*trainings.words(out, "--epochs", "60"))
        words[1:1] = launcher
        words += [] if launcher else ["--processes", "2", "--max-restarts", "2"]
        process = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)
        os.kill(await_steps(process, out)[0], signal.SIGKILL)
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
        check_same(whole, out)


def test_the_files_for_clusters_have_no_mistake_of_syntax() -> None:
    folder = Path(__file__).parents[2] / "examples" / "scale"
    subprocess.run(["bash", "-n", str(folder / "slurm.sh")], check=True)
    yaml = pytest.importorskip("yaml")
    service, job = yaml.safe_load_all((folder / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert job["spec"]["template"]["metadata"]["labels"] == service["spec"]["selector"]
    arguments = pod["containers"][0]["args"]
    assert f"--nnodes={job['spec']['completions']}" in arguments
    assert any(pod["subdomain"] in a for a in arguments if a.startswith("--rdzv-endpoint="))
