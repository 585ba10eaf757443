"""What `normlab inspect` writes, and what it refuses."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torch import nn

import normlab
from normlab.__main__ import run as command
from normlab.errors import UserError
from normlab.inspection.inspected import inspected, running_gap, shared_layers
from normlab.inspection.recording import read_recording
from normlab.reports.inspection_plots import draw_drift, draw_figure_1, draw_percentiles
from normlab.reports.inspection_report import save_figure
from normlab.runs import Run
from recorded import STEPS, write_run


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    folder = tmp_path_factory.mktemp("pair")
    runs = [write_run(folder / norm, norm) for norm in ("batch", "none")]
    normlab.inspect(*runs).write(runs[0].path / "inspect")
    return runs


def test_the_page_fetches_nothing_and_holds_the_recordings(pair: list[Run]) -> None:
    page = (pair[0].path / "inspect" / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert "@import" not in page
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)
    assert found
    data = json.loads(found[1])
    assert data["steps"] == list(STEPS)
    for run, shown in zip(pair, data["runs"], strict=True):
        recording = read_recording(run.path)
        assert shown["loss"] == pytest.approx(recording.arrays["loss"].tolist(), rel=1e-3)
        layer = shown["layers"]["dense3"]
        expected = recording.arrays["dense3/in/percentiles"]
        assert np.array(layer["in"]["percentiles"]) == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert layer["out"]["histogram"] == recording.arrays["dense3/out/histogram"].tolist()
        assert ("gap" in shown["layers"]["norm3"]) == (run is pair[0])


def test_each_picture_is_there_as_png_and_svg(pair: list[Run]) -> None:
    folder = pair[0].path / "inspect"
    names = ["drift", "figure-1", "gamma-beta", "gradients", "percentiles", "rates", "ridges"]
    assert sorted(p.stem for p in folder.glob("*.png")) == names
    assert sorted(p.stem for p in folder.glob("*.svg")) == names
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in folder.glob("*.png"))
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/svg+xml;base64,") == len(names)


def test_two_runs_are_drawn_on_the_same_scales(pair: list[Run]) -> None:
    runs = [inspected(run) for run in pair]
    assert shared_layers(runs, "place") == ["norm1", "norm2", "norm3"]
    assert shared_layers(runs, "weight") == ["dense1", "dense2", "dense3", "output"]
    axes = draw_percentiles(runs).axes
    assert len(axes) == 6
    for left, right in zip(axes[::2], axes[1::2], strict=True):
        assert left.get_ylim() == right.get_ylim()
    left, right = draw_drift(runs).axes
    assert left.get_ylim() == right.get_ylim()


def test_the_same_in_python(pair: list[Run]) -> None:
    seen = normlab.inspect(pair[0], pair[1].path)
    assert str(seen).count("samples; one step moves the mean input") == 2
    assert set(seen.figures) == {p.stem for p in (pair[0].path / "inspect").glob("*.png")}
    values = [
        seen.runs[1].recording.arrays[f"{layer}/in/drift"]
        for layer in ("dense2", "dense3", "output")
    ]
    assert seen.runs[1].drift == pytest.approx(float(np.nanmedian(values)))
    with pytest.raises(UserError, match="record=True"):
        normlab.inspect()


def test_a_figure_shows_itself_in_a_notebook_cell(pair: list[Run]) -> None:
    assert normlab.inspect(*pair).figures["drift"]._repr_png_().startswith(b"\x89PNG")


def test_no_accuracy_is_drawn_where_no_images_were_held_out(pair: list[Run]) -> None:
    for accuracy, titles in ((0.5, ["(a)", "(b)", "(c)"]), (None, ["(b)", "(c)"])):
        history = [{"steps": 3, "val_accuracy": accuracy}]
        runs = [replace(inspected(run), history=history) for run in pair]
        assert [ax.get_title()[:3] for ax in draw_figure_1(runs).axes] == titles


def test_the_same_figure_is_the_same_file(pair: list[Run], tmp_path: Path) -> None:
    runs = [inspected(run) for run in pair]
    first, second = (save_figure(draw_drift(runs), tmp_path / name) for name in "ab")
    assert first == second == (tmp_path / "a.svg").read_bytes()


def test_the_gap_of_the_running_statistics(pair: list[Run]) -> None:
    recording = read_recording(pair[0].path)
    mean, var = (recording.arrays[f"norm1/in/{key}"] for key in ("mean", "var"))
    gap = running_gap(recording, "norm1")  # nothing has ever updated them from 0
    assert gap == pytest.approx((np.abs(mean) / np.sqrt(var)).mean(1), rel=1e-4)
    assert running_gap(recording, "dense1") is None


def test_a_single_run_will_do(pair: list[Run], capfd: pytest.CaptureFixture[str]) -> None:
    assert command(["inspect", str(pair[1].path)]) == 0
    out = capfd.readouterr().out
    assert "5 samples; one step moves the mean input" in out
    assert "recording took 5.0% of the training time" in out
    assert (pair[1].path / "inspect" / "report.html").exists()
    assert not (pair[1].path / "inspect" / "gamma-beta.png").exists()  # it has none


def test_a_users_mistakes_are_one_line(
    pair: list[Run], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.only = nn.Linear(3 * 32 * 32, 10)

        def forward(self, x, rng=None):  # type: ignore[no-untyped-def]
            return self.only(x.flatten(1))

    bare = write_run(tmp_path / "bare", "none")
    (bare.path / "recording.npz").unlink()
    other = write_run(tmp_path / "other", "none", Other())
    mistakes = {
        (str(bare.path),): "train it with --record",
        (str(pair[0].path), str(other.path)): "no layer in common",
        (str(pair[0].path), str(pair[1].path), "--landscape"): "takes one run",
        ("nowhere",): "not a folder",
        **{
            (str(pair[0].path), f"--{name}", "3"): f"--{name}: only --landscape has that"
            for name in ("seeds", "points", "steps", "images", "threads", "data")
        },
    }
    for words, message in mistakes.items():
        assert command(["inspect", *words]) == 2
        error = capfd.readouterr().err
        assert message in error
        assert error.count("\n") == 1
