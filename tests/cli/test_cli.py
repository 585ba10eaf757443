"""The command as people type it: real processes, their output and exit codes."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from normlab.__main__ import run
from normlab.training.state import State
from normlab.training.tensorboard import TensorBoard

SAMPLE = ["--data", "sample", "--threads", "1"]
TINY = [*SAMPLE, "--epochs", "1", "--batch-size", "90"]


def normlab(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "normlab", *words],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    done = normlab("train", "notebook", *TINY, "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout, encoding="utf-8")
    return folder


def test_train_ends_with_lines_worth_reading_and_json(trained: Path) -> None:
    lines = (trained / "stdout").read_text(encoding="utf-8").splitlines()
    result = json.loads(lines[-1])
    folder = trained / "runs" / "0001-notebook"
    assert result == json.loads((folder / "result.json").read_text())
    epoch = r"4/4 - \d+s - loss: \d\.\d{4} - accuracy: 0\.\d{4} - val_loss: .* - val_accuracy: .*"
    assert any(re.fullmatch(epoch, line) for line in lines)
    assert "Epoch 1/1" in lines
    text = "\n".join(lines)
    for expected in ("Test accuracy:", "95 % interval", "Time: data", "Weakest class:", "Limit:"):
        assert expected in text
    assert str(Path("runs") / "0001-notebook" / "report.html") in text


def test_evaluate_takes_the_latest_run(trained: Path) -> None:
    done = normlab("evaluate", "--json", "--weights", "best", cwd=trained)
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout.splitlines()[-1])
    assert scores["test_images"] == 200
    assert sum(map(sum, scores["confusion"])) == 200
    folder = trained / "runs" / "0001-notebook" / "evaluation-best"
    assert {p.name for p in folder.iterdir()} == {
        "calibration.png",
        "confusion.png",
        "coverage.png",
        "evaluation.json",
        "mistakes.png",
        "report.html",
    }


def test_the_printed_commands_work(trained: Path) -> None:
    """Of the three commands to try next, the one that is quick; and the report's."""
    text = (trained / "stdout").read_text(encoding="utf-8")
    command = next(line for line in text.splitlines() if "--norm none" in line)
    words = command.split("#")[0].replace('"', "").split()[1:]
    done = normlab(*words, "--epochs", "1", "--batch-size", "90", cwd=trained)
    assert done.returncode == 0, done.stderr
    assert (trained / "runs" / "0002-notebook" / "result.json").exists()


@pytest.mark.parametrize(
    ("words", "value", "remedy"),
    [
        (["train", "notebok"], "notebok", "notebook"),
        (["train", "--epoch", "3"], "--epoch", "--epochs"),
        (["train", "--epochs", "0", *SAMPLE], "epochs=0", "1 or more"),
        (["train", "--epochs", "x"], "x", "a whole number"),
        (["train", "--norm", "bach", *SAMPLE], "bach", "batch"),
        (["train", "--threads", "9999"], "9999", "cores"),
        (["train", "--device", "tpu", *SAMPLE], "tpu", "cpu"),
        (["train", "--data", "no/such.npz"], "no/such.npz", "exist"),
        (["train", "--out", "full", *SAMPLE], "full", "new one"),
        (["train", "--out", "file", *SAMPLE], "file", "--out"),
        (["train", "--validation", "1.5", *SAMPLE], "1.5", "[0, 1)"),
        (["train", "--resume", "nowhere"], "nowhere", "normlab train"),
        (["train", "notebook", "--resume", "x"], "recipe", "--resume"),
        (["train", "--allow-changes", *SAMPLE], "--allow-changes", "--resume"),
        (["evaluate"], "runs", "normlab train"),
        (["evaluate", "nowhere"], "nowhere", "normlab train"),
        (["evaluate", "0001-notebook"], "0001-notebook", "runs/0001-notebook"),
        (["summary", "notebok"], "notebok", "notebook"),
        (["frobnicate"], "frobnicate", "--help"),
    ],
)
def test_a_mistake_is_one_line_with_value_and_remedy(
    in_tmp: Path, capsys: pytest.CaptureFixture[str], words: list[str], value: str, remedy: str
) -> None:
    """In this process, through the function that the command is: seventeen starts take a minute."""
    (in_tmp / "full").mkdir()
    (in_tmp / "full" / "thesis.tex").touch()
    (in_tmp / "file").touch()
    (in_tmp / "runs" / "0001-notebook").mkdir(parents=True)
    before = sorted(in_tmp.rglob("*"))
    assert run(words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    assert value in shown.err
    assert remedy in shown.err
    assert sorted(in_tmp.rglob("*")) == before


def test_non_finite_loss_has_its_own_exit_code(in_tmp: Path) -> None:
    words = ["train", "notebook", "--norm", "none", "--learning-rate", "1e30", *TINY]
    done = normlab(*words, cwd=in_tmp)
    assert done.returncode == 3
    assert "--learning-rate" in done.stderr
    assert "Traceback" not in done.stderr


def launch(*words: str, cwd: Path) -> subprocess.Popen[str]:
    """Begin a training in a process of its own, its output to be read while it is at work."""
    return subprocess.Popen(
        [sys.executable, "-m", "normlab", "train", "notebook", *words],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def start(folder: Path) -> subprocess.Popen[str]:
    """Begin a long training and wait for its first epoch."""
    process = launch(*SAMPLE, "--epochs", "500", cwd=folder)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("12/12"):
            return process
    raise AssertionError(process.stderr.read() if process.stderr else "")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_cleanly_and_says_how_to_go_on(
    in_tmp: Path, signum: signal.Signals, code: int
) -> None:
    process = start(in_tmp)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code
    assert "normlab train --resume runs/0001-notebook" in errors
    assert "Traceback" not in errors
    names = {p.name for p in (in_tmp / "runs" / "0001-notebook").iterdir()}
    assert "checkpoint.safetensors" in names
    assert "result.json" not in names
    assert not [name for name in names if name.endswith(".tmp")]


def test_a_double_ctrl_c_ends_at_once(in_tmp: Path) -> None:
    process = start(in_tmp)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in errors


LOST = """
import signal, sys, time, weakref
import click
import normlab.__main__

class Picture:
    def __del__(self):
        if sys.argv[1] == "destructor":
            signal.raise_signal(getattr(signal, sys.argv[2]))

def leave(signum, _):
    raise SystemExit(128 + signum)

@click.command()
def slow():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    signal.signal(signal.SIGTERM, leave)
    picture = Picture()
    gone = weakref.ref(picture, lambda _: signal.raise_signal(getattr(signal, sys.argv[2])))
    if sys.argv[1] == "destructor":
        del gone
    del picture
    time.sleep(60)

normlab.__main__.cli = slow
normlab.__main__.main([])
"""


@pytest.mark.parametrize("place", ["destructor", "callback"])
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_falls_where_python_ignores_exceptions_is_not_lost(
    place: str, signum: signal.Signals, code: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOST, place, signum.name], capture_output=True, text=True, timeout=50
    )
    assert done.returncode == code, done.stderr
    assert done.stderr.strip() == ("normlab: interrupted" if code == 130 else "")


def test_a_training_whose_reader_has_gone_is_no_success_and_goes_on(in_tmp: Path) -> None:
    """As in `normlab train | head -1`."""
    with launch(*TINY, "--epochs", "6", cwd=in_tmp) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 1
    assert errors == ""
    folder = in_tmp / "runs" / "0001-notebook"
    assert not (folder / "result.json").exists()
    resumed = normlab("train", "--resume", str(folder), cwd=in_tmp)
    assert resumed.returncode == 0, resumed.stderr
    assert (folder / "result.json").exists()


def test_on_a_terminal_there_is_a_bar(in_tmp: Path) -> None:
    """Also on one of 20 columns, where lines may be cut but nothing may fail."""
    for columns in ("100", "20"):
        leader, follower = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "normlab", "train", "notebook", *TINY],
            cwd=in_tmp,
            env={**os.environ, "COLUMNS": columns, "TERM": "xterm"},
            stdout=follower,
            stderr=follower,
        )
        os.close(follower)
        shown = b""
        while True:
            try:
                chunk = os.read(leader, 65536)
            except OSError:
                break
            if not chunk:
                break
            shown += chunk
        os.close(leader)
        assert process.wait(timeout=200) == 0
        text = shown.decode()
        assert "epoch 1/1" in text
        assert ("images/s" in text.split("Test loss")[0]) == (columns == "100")
        assert "Test accuracy" in text


def test_odd_surroundings(in_tmp: Path) -> None:
    """Spaces and other alphabets in paths, an ASCII locale."""
    folder = in_tmp / "mein Ordner 模型"
    folder.mkdir()
    done = normlab(
        "train", "notebook", *TINY, "--out", "ein Lauf é", cwd=folder, LANG="C", LC_ALL="C"
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "ein Lauf é" / "result.json").exists()


def test_tensorboard_events_go_on_when_a_run_is_resumed(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    after_step = TensorBoard.after_step

    def interrupted(self: TensorBoard, state: State, *place: int) -> None:
        after_step(self, state, *place)
        if state.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as m:
        m.setattr(TensorBoard, "after_step", interrupted)
        train = [*SAMPLE, "--epochs", "2", "--batch-size", "90"]
        assert run(["train", "notebook", *train, "--tensorboard"]) == 130
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "tensorboard", None)
        assert run(["train", "--resume", "runs/0001-notebook"]) == 2
    assert "remove that folder" in capsys.readouterr().err
    assert run(["train", "--resume", "runs/0001-notebook"]) == 0
    folder = in_tmp / "runs" / "0001-notebook"
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    for name in ("loss", "val_accuracy"):
        assert scalars(folder, name) == {row["epoch"]: pytest.approx(row[name]) for row in rows}


def scalars(folder: Path, name: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def test_help_is_instant_and_the_front_door_light(tmp_path: Path) -> None:
    def seconds() -> float:
        """Processor time, which other processes on the machine cannot lengthen much."""
        before = os.times()
        assert normlab("--help", cwd=tmp_path).returncode == 0
        after = os.times()
        return (
            after.children_user
            - before.children_user
            + after.children_system
            - (before.children_system)
        )

    assert min(seconds() for _ in range(5)) < 0.3
    code = "import normlab, sys; print(sorted({'torch','numpy','scipy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.stdout.strip() == "[]"


def test_two_runs_at_once_get_folders_of_their_own(in_tmp: Path) -> None:
    command = [sys.executable, "-m", "normlab", "train", "notebook", *TINY]
    processes = [subprocess.Popen(command, cwd=in_tmp, stdout=subprocess.DEVNULL) for _ in range(3)]
    assert [p.wait(timeout=120) for p in processes] == [0, 0, 0]
    names = sorted(p.name for p in (in_tmp / "runs").iterdir())
    assert names == ["0001-notebook", "0002-notebook", "0003-notebook"]
    hashes = {
        json.loads((in_tmp / "runs" / name / "result.json").read_text())["weights_sha256"]
        for name in names
    }
    assert len(hashes) == 1


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ("4", "'4': give 8 to 512 pixels, or auto"),
        ("huge", "'huge': give 8 to"),
        ("auto", "nowhere"),
    ],
)
def test_a_size_of_pictures_is_a_number_or_auto(
    size: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", "--data", "nowhere", "--image-size", size]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--data"],
        ["compare", "fast79", "--out", "out", "--data"],
        ["curve", "--out", "out", "--data"],
        ["data", "check", "--out", "out"],
        ["import", "model.keras", "--out", "out", "--data"],
    ],
)
def test_no_command_passes_over_a_size_that_the_images_do_not_have(
    in_tmp: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert run([*words, "sample", "--image-size", "16"]) == 2
    said = "image_size=16: sample has images of 32 × 32 pixels; only pictures from a folder or"
    assert said in capsys.readouterr().err
    assert not list(in_tmp.iterdir())


@pytest.mark.parametrize("size", ["1", "3"])
def test_processes_are_not_started_by_one_that_was_started_as_a_rank(
    in_tmp: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    size: str,
) -> None:
    """A shell or a scheduler may have set it for something else: it trained alone."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", size)
    assert run(["train", "notebook", *TINY, "--processes", "2"]) == 2
    said = capsys.readouterr().err
    assert "--processes 2 starts processes, and RANK=0 in the environment says" in said
    assert f"one of {size}: unset RANK and WORLD_SIZE" in said
    assert not list(in_tmp.iterdir())
