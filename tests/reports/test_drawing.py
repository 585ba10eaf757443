"""What cannot be drawn costs the drawing, and nothing that stands in a name or folder draws."""

import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest

import normlab
from normlab.data.images import ImageData
from normlab.evaluation.evaluation import Evaluation, assess
from normlab.reports import plots, run_report

NAMES = (r"$\frac$", "a\ud800b", "猫", "\x1b[2J\n\0", "<b>", "$x", "n" * 400)


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    rng = np.random.default_rng(0)
    return assess(
        rng.normal(size=(70, len(NAMES))),
        np.arange(70) % len(NAMES),
        run="a run",
        weights="last",
        data="data \x1b<i>",
        class_names=NAMES,
        limits=(),
    )


@pytest.fixture(scope="module")
def images() -> ImageData:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (70, 8, 8, 3), np.uint8), np.arange(70) % len(NAMES)
    return ImageData(name="d", x_train=x, y_train=y, x_test=x, y_test=y, class_names=NAMES)


def test_names_of_any_kind_are_drawn_and_written(
    evaluation: Evaluation, images: ImageData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_report.write_evaluation(evaluation, images, tmp_path / "e")
    names = {p.name for p in (tmp_path / "e").iterdir()}
    assert names == {"calibration.png", "confusion.png", "coverage.png", "evaluation.json",
                     "mistakes.png", "report.html"}  # fmt: skip
    page = (tmp_path / "e" / "report.html").read_text(encoding="utf-8")
    assert "<b>" not in page
    assert "\x1b" not in page
    assert r"a\ud800b" in page
    assert capsys.readouterr() == ("", "")


def test_a_mistake_is_named_by_its_file_and_without_one_by_its_number(
    evaluation: Evaluation,
) -> None:
    assert plots._caption(evaluation, 45).endswith("\n#45")
    files = tuple(f"cat/{'long ' * 9}{i}.png" for i in range(70))
    last = plots._caption(replace(evaluation, files=files), 45).splitlines()[-1]
    assert last.startswith("…")
    assert last.endswith("long 45.png")
    assert len(last) == plots.LONGEST_TICK


def test_a_name_is_no_formula_in_anybodys_axes(evaluation: Evaluation) -> None:
    fig = plots.figure()
    ax = plots.plot_confusion(fig.subplots(), evaluation)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of glyphs: these axes are not ours
        fig.canvas.draw()
    labels = [label.get_text() for label in ax.get_xticklabels()]
    assert labels[0] == r"\$\frac\$"  # Matplotlib's way of writing the letter $
    assert max(map(len, labels)) <= plots.LONGEST_TICK


def test_settings_of_the_user_change_nothing_and_stay(evaluation: Evaluation) -> None:
    def draw() -> bytes:
        fig = plots.figure()
        with plots.style():
            plots.plot_confusion(fig.subplots(), evaluation)
        return plots.png(fig)

    plain = draw()
    with mpl.rc_context({"font.size": 30, "axes.grid": True, "savefig.dpi": 10}):
        assert draw() == plain
        assert mpl.rcParams["font.size"] == 30


@pytest.mark.parametrize("error", [ValueError("a\n\x1bb"), MemoryError(), OSError("no font")])
def test_a_drawing_that_fails_is_one_line(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> bytes:
        raise error

    assert plots.safely("the moon", fail) is None
    line = capsys.readouterr().err
    assert line.startswith("normlab: the moon could not be drawn (")
    assert line.count("\n") == 1
    assert "\x1b" not in line


def test_no_drawing_is_still_a_page(
    evaluation: Evaluation,
    images: ImageData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> bytes:
        raise RuntimeError("no fonts")

    monkeypatch.setattr(plots, "png", fail)
    run_report.write_evaluation(evaluation, images, tmp_path / "e")
    assert {p.name for p in (tmp_path / "e").iterdir()} == {"evaluation.json", "report.html"}
    assert "Surest mistakes" in (tmp_path / "e" / "report.html").read_text(encoding="utf-8")
    assert capsys.readouterr().err.count("could not be drawn") == 7
    assert run_report.evaluation_summary_html(evaluation).startswith("<p>")


@pytest.mark.parametrize("content", [b"text.usetex: True\n", b"\xff\xfe", None])
@pytest.mark.parametrize("whose", ["the folder's", "the user's"])
def test_the_command_reads_no_matplotlibrc(
    content: bytes | None, whose: str, tmp_path: Path
) -> None:
    place = tmp_path / ("matplotlibrc" if whose == "the folder's" else "mine")
    if content is None:
        os.mkfifo(place)
    else:
        place.write_bytes(content)
    code = (
        "from normlab.core.children import leave_out_current_folder as leave; leave();"
        "import normlab.reports, matplotlib; print(matplotlib.rcParams['text.usetex'])"
    )
    path = os.pathsep.join(p for p in sys.path if p)
    mine = {} if whose == "the folder's" else {"MATPLOTLIBRC": str(place)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, **mine},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.stdout, done.stderr) == ("False\n", "")


@pytest.mark.parametrize("half_size", [0.0, 0.5])
def test_a_page_says_why_its_curves_jump(tmp_path: Path, half_size: float) -> None:
    run = normlab.train(
        "fast79", data="sample", out=tmp_path / "run", threads=1, epochs=2, half_size=half_size
    )
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert ("pictures of half the size" in page) == (half_size > 0)
