"""The command that trains on people's folders keeps what is done and tells it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import folders


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(folders, "RESULTS", tmp_path / "pictures.jsonl")
    return tmp_path / "pictures.jsonl"


def test_what_is_done_is_not_done_again(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, int]] = []

    def one(folder: str, way: str, seed: int, done: dict[str, Any]) -> dict[str, Any]:
        asked.append((folder, way, seed))
        if way == "cnn":
            assert done["default"]["cpu_seconds"] == 3.0
        return {"test_accuracy": 0.5 + seed / 10, "cpu_seconds": 3.0}

    monkeypatch.setattr(folders, "one", one)
    everything = ["default", "cnn", "boosting", "regression"]
    first = list(folders.work(["a", "b/c"], 2, everything))
    assert len(first) == len(asked) == 16
    assert [row["set"] for row in folders.read()][:8] == ["a"] * 4 + ["c"] * 4
    assert list(folders.work(["a", "b/c"], 2, everything)) == []
    monkeypatch.setattr(folders, "settings_of_default", lambda: "another")
    again = [row["way"] for row in folders.work(["a"], 1, everything)]
    assert again == ["default", "cnn"]  # the others do not hang on our default
    lines: list[str] = []
    folders.table(lines.append)
    assert lines[1] == "| a | 0.500 | 0.500 | 0.550 ± 0.071 | 0.550 ± 0.071 | 1 |"


def test_lines_of_another_kind_are_left_alone(results: Path) -> None:
    results.write_text(json.dumps({"way": "default", "set": "a", "seed": 0}) + "\n")
    assert folders.read() == []


def test_features_are_means_of_areas() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    means = pixels.reshape(2, 8, 2, 8, 2, 3).mean((2, 4)).reshape(2, -1) / 255
    assert (
        np.abs(folders.features(pixels, 8) - means).max() <= 1 / 255 + 1e-9
    )  # rounded across, then down
