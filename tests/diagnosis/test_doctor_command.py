"""`normlab doctor` and `normlab recalibrate` as a person or a script meets them."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import normlab
from networks import ResNet
from normlab.__main__ import run as command


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The sample at half its size, which trains in a quarter of the time."""
    sample = normlab.load("sample")
    path = tmp_path_factory.mktemp("data") / "half.npz"
    np.savez(
        path,
        x_train=sample.x_train[:, ::2, ::2],
        y_train=sample.y_train,
        x_test=sample.x_test[:, ::2, ::2],
        y_test=sample.y_test,
    )
    return str(path)


@pytest.fixture(scope="module")
def run(data: str, tmp_path_factory: pytest.TempPathFactory) -> normlab.Run:
    """A run of the recipe `notebook`, 540 steps: its statistics have come to rest."""
    out = tmp_path_factory.mktemp("runs") / "run"
    return normlab.train("notebook", data=data, out=out, epochs=12, batch_size=8, threads=1)


def test_a_clean_run_has_nothing_serious(
    run: normlab.Run, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["doctor", str(run.path), "--data", data, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    rules = {f["rule"] for f in told["findings"]}
    assert {"score-gap", "far-from-data", "stale", "last-batch-of-one"} <= {*told["checked"]}
    assert "dropout-before-normalizer" in rules
    assert "small-batches" in rules
    assert not [f for f in told["findings"] if f["severity"] == "serious"]


def test_a_clean_run_needs_no_data(run: normlab.Run) -> None:
    """Its own are used where they are as they were; else it is said what was not checked."""
    diagnosis = normlab.doctor(run)
    assert not diagnosis.serious
    assert {"score-gap", "class-never-right"} <= {*diagnosis.checked}
    for task in (replace(run.task, data="nowhere.npz"), replace(run.task, data_sha256="0" * 64)):
        elsewhere = normlab.doctor(replace(run, task=task))
        assert "score-gap" in elsewhere.not_checked
        assert not elsewhere.serious


def test_a_clean_run_of_the_fast_recipe_has_nothing_serious(tmp_path: Path) -> None:
    run = normlab.train("fast79", data="sample", out=tmp_path / "run", threads=1, epochs=20)
    assert not normlab.doctor(run, "sample").serious


def test_recalibrate_and_evaluate(run: normlab.Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["recalibrate", str(run.path)]) == 0
    told = capsys.readouterr().out
    next_command = told.splitlines()[-1].split()
    assert next_command[:2] == ["normlab", "evaluate"]
    assert command([*next_command[1:], "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["weights"] == "recalibrated"
    assert command(["doctor", str(run.path), "--weights", "recalibrated"]) == 0


def test_serious_findings_make_exit_code_1(tmp_path: Path) -> None:
    torch.save(ResNet().state_dict(), tmp_path / "fresh.pt")
    done = subprocess.run(
        [sys.executable, "-m", "normlab", "doctor", "fresh.pt"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == ""
    assert "SERIOUS  never-updated" in done.stdout


@pytest.mark.parametrize("width", [30, 80])
def test_lines_fit_the_terminal(
    tmp_path: Path,
    width: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.chdir(tmp_path)
    torch.save(ResNet().state_dict(), "fresh.pt")
    assert command(["doctor", "fresh.pt"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    if width == 80:
        assert len(lines) < 25


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["doctor", "nowhere.pt"], "does not exist"),
        (["doctor", "."], "recipe.json does not exist"),
        (["recalibrate", "nowhere"], "is not a folder"),
        (["train", "notebook", "--data", "sample", "--three-way", "--validation", "0"], "--three"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(words) == 2
    told = capsys.readouterr().err
    assert message in told
    assert len(told.splitlines()) == 1
    assert list(in_tmp.iterdir()) == []
