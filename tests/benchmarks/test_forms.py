"""The command that times all forms of a model: each form is timed, on the run's own pictures."""

import json
from pathlib import Path

import pytest

import normlab
from benchmarks import forms
from normlab.interchange import export_run


def test_every_form_has_its_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = normlab.train("fast79", out=tmp_path / "run", data="sample", epochs=1, threads=1)
    file = export_run(run, tmp_path / "out" / "model.onnx").path
    kept = tmp_path / "forms.json"
    forms.main([str(run.path), str(file), "--rounds", "3", "--out", str(kept)])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in printed[2:]] == ["| the run", "| out/model.onnx"]
    record = json.loads(kept.read_text(encoding="utf-8"))
    assert record["machine"]["threads"] == 1
    assert len(record["forms"]) == 4
    for row in record["forms"]:
        low, median, high = row["milliseconds"]
        assert 0 < low <= median <= high
    times = {(row["form"], row["batch"]): row["milliseconds"][1] for row in record["forms"]}
    assert times["out/model.onnx", 256] > times["out/model.onnx", 1]
