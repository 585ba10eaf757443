"""The benchmark: peers compute the same function, take turns in processes, and are reported."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks import groups, report, summary
from benchmarks.entry import Options
from benchmarks.other_load import OtherLoad
from benchmarks.peers import onnx_runtime
from benchmarks.peers.plain_pytorch import plain
from benchmarks.peers.stock_layers import stock
from benchmarks.pictures import draw_accuracy_time, draw_speeds, save
from benchmarks.prepare import prepare, settle
from benchmarks.recipe_table import timed
from benchmarks.rounds import BenchError, Entry, Group, measure
from normlab.data import load
from normlab.models import FastNet, NotebookNet

ROOT = Path(__file__).parents[2]


def pixels(n: int) -> Tensor:
    images = np.array(load("sample").x_test[:n])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def notebook() -> NotebookNet:
    model = NotebookNet()
    settle(model, load("sample").x_train[:100])
    return model


def fast() -> FastNet:
    model = FastNet()
    images = load("sample").x_train
    model.fit_to(images)
    settle(model, images[:100])
    return model


def test_plain_pytorch_is_the_notebooks_network() -> None:
    ours = notebook()
    theirs = plain({k: v.numpy() for k, v in ours.state_dict().items()})
    # Training mode compares the batch's own statistics; dropout draws differ, so it is off.
    for module in theirs.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for dropout in (ours.dropout, ours.dropout_1, ours.dropout_2):
        dropout.threshold = 0
    same_function(theirs, ours)


def test_stock_layers_train_the_same_network() -> None:
    ours = fast()
    for block in ours.blocks:
        block.norm.momentum = 0.6
    theirs = stock(ours)
    assert {nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d} <= {type(m) for m in theirs.modules()}
    assert not any(m.__module__.startswith("normlab.layers") for m in theirs.modules())
    same_function(theirs, ours)
    gradients = [
        torch.autograd.grad(net(pixels(8).double()).square().sum(), list(net.parameters()))
        for net in (theirs, ours)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(theirs.blocks, ours.blocks, strict=True):
        torch.testing.assert_close(a.norm.running_mean, b.norm.running_mean)


def same_function(theirs: nn.Module, ours: nn.Module) -> None:
    """Equal outputs for equal pixels, in both modes, up to float64's rounding."""
    x = pixels(16).double()
    theirs.double(), ours.double()
    with torch.no_grad():
        for training in (False, True):
            torch.testing.assert_close(theirs.train(training)(x), ours.train(training)(x))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    described = prepare(folder, "sample", threads=1)
    assert described["data"] == "sample"
    return folder


@pytest.mark.parametrize("network", ["notebook", "fast79"])
def test_a_graph_with_batch_normalization_nodes_says_the_same(prepared: Path, network: str) -> None:
    answers = {}
    for folded in (False, True):
        options = Options(prepared, 1, {"network": network, "folded": folded})
        kinds = [node.op_type for node in onnx_runtime.graph(options, folded=folded).graph.node]
        assert kinds.count("BatchNormalization") == (0 if folded else 5)
        entry = onnx_runtime.predict(options)
        assert entry.answer is not None
        answers[folded] = entry.answer(np.array(options.array("x_test")[:64]))
    expected = np.load(prepared / f"{network}-answers.npy")
    for answer in answers.values():
        assert np.abs(answer - expected).max() < 1e-5


def test_entries_take_turns_in_processes_of_their_own(prepared: Path) -> None:
    entries = [
        Entry("PyTorch", "plain_pytorch:predict", {"layout": "channels-last"}),
        Entry("normlab", "ours:predict", {"network": "notebook", "layers": "normlab"}),
    ]
    result = measure(Group("inference", entries, seconds=0.01, rounds=3), Options(prepared, 1, {}))
    assert list(result["entries"]) == ["PyTorch", "normlab"]
    for name, entry in result["entries"].items():
        assert entry["difference"] < 1e-4
        assert 50 < entry["peak_mib"] < 4000
        assert entry["flushes_denormals"] or "x86" not in torch.__config__.show()
        for case in ("256", "1"):
            samples = result["samples"][case][name]
            assert len(samples) == 3
            assert all(s["seconds"] > 0 for s in samples)


def test_a_peer_that_computes_something_else_ends_the_benchmark(
    prepared: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(prepared, tmp_path / "copy")
    weights = dict(np.load(folder / "notebook.npz"))
    weights["batch_normalization_1.running_mean"] += 0.5
    np.savez(folder / "notebook.npz", **weights)
    entry = Entry("PyTorch", "plain_pytorch:predict", {"layout": "channels-last"})
    with pytest.raises(BenchError, match=r"PyTorch: with the same weights .* nothing was measured"):
        measure(Group("inference", [entry], 0.01, 1), Options(folder, 1, {}))


def test_a_peer_that_fails_is_named(prepared: Path) -> None:
    entry = Entry("PyTorch", "plain_pytorch:predict", {"layout": "diagonal"})
    with pytest.raises(BenchError, match=r"(?s)PyTorch failed:.*KeyError: 'diagonal'"):
        measure(Group("inference", [entry], 0.01, 1), Options(prepared, 1, {}))


@pytest.fixture
def result() -> dict[str, Any]:
    """Samples made up for this test: every peer, two rounds."""
    text = (Path(__file__).parent / "bench.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def test_ratios_are_taken_within_a_round(result: dict[str, Any]) -> None:
    group = result["groups"]["training-32"]
    group["samples"][""][groups.OURS] = [{"seconds": 1.0}, {"seconds": 4.0}]
    group["samples"][""][groups.KERAS] = [{"seconds": 3.0}, {"seconds": 8.0}]
    assert summary.ratios(result, "training-32", groups.OURS, groups.KERAS) == [3.0, 2.0]


def test_the_notebooks_time_is_its_steps_and_its_validation(result: dict[str, Any]) -> None:
    samples = result["groups"]["accuracy"]["samples"][""]
    samples["Keras (training)"] = [{"seconds": 0.05}, {"seconds": 0.04}]  # 32 images
    samples["Keras (validation)"] = [{"seconds": 2.0}, {"seconds": 1.0}]  # all 5,000
    whole = summary.notebook(result, groups.KERAS, 25)
    assert whole == pytest.approx([25 * (45_000 / 640 + 2), 25 * (45_000 / 800 + 1)])
    ratio = summary.over(whole, summary.fast79(result, groups.OURS))
    factors = np.prod(list(summary.factors(result).values()), axis=0)
    assert factors == pytest.approx(ratio)


def test_the_report_goes_between_the_marks(result: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs" / "results", tmp_path / "docs" / "results")
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copy(ROOT / "docs" / "benchmarks.md", tmp_path / "docs")
    before = (tmp_path / "README.md").read_text(encoding="utf-8")
    for _ in range(2):  # a second run replaces the first
        report.keep(result, None, tmp_path)
    readme = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert readme.count("first nine") == 1
    begin, end = (mark.format("bench") for mark in report.MARKS)
    assert readme.split(begin)[0] == before.split(begin)[0]
    assert readme.split(end)[1] == before.split(end)[1]
    docs = (tmp_path / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for entry in {n for g in result["groups"].values() for n in g["entries"]}:
        assert entry.removeprefix(groups.FAST).split(" (")[0] in docs
    assert "| `fast79` | 10 | 0.79" in docs
    assert "nan" not in docs
    kept = json.loads((tmp_path / "docs" / "results" / "bench.json").read_text(encoding="utf-8"))
    assert kept == result
    assert (tmp_path / "docs" / "accuracy-time.png").stat().st_size > 10_000
    assert (tmp_path / "docs" / "benchmarks.svg").stat().st_size > 10_000


def test_only_a_quiet_run_with_every_core_is_timed() -> None:
    run = {"train_seconds": 10.0, "quiet": True, "environment": {"threads": 2, "cores": 2}}
    busy = {**run, "train_seconds": 90.0, "quiet": False}
    half = {**run, "train_seconds": 20.0, "environment": {"threads": 1, "cores": 2}}
    assert timed([run, busy, half]) == [10.0]


def test_a_quick_run_leaves_the_docs_alone(
    result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report.keep({**result, "quick": True}, None, tmp_path)
    assert [p.name for p in (tmp_path / "docs").rglob("*.*")] == ["bench-quick.json"]
    assert "### Time to accuracy" in capsys.readouterr().out


def drawn_ticks(axis: Any) -> list[Any]:
    """The labels of ticks inside of the picture; one further out is kept, but not drawn."""
    low, high = sorted(axis.get_view_interval())
    return [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]


def test_no_words_overlap_in_the_pictures(result: dict[str, Any], tmp_path: Path) -> None:
    for fig in (draw_accuracy_time(result, ROOT / "docs" / "results"), draw_speeds(result)):
        save(fig, tmp_path / "picture")
        boxes = [
            text.get_window_extent()
            for ax in fig.axes
            for text in [*ax.texts, *drawn_ticks(ax.xaxis), *drawn_ticks(ax.yaxis), ax.title]
            if text.get_text() and text.get_visible()
        ]
        for i, a in enumerate(boxes):
            assert not any(a.overlaps(b) for b in boxes[i + 1 :])


def test_help_needs_no_framework() -> None:
    code = "import sys, benchmarks.run; sys.exit('torch' in sys.modules or 'keras' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_time_of_children_is_ones_own() -> None:
    before, program = OtherLoad()._now(), "import time\nwhile time.process_time() < 0.5: pass"
    subprocess.run([sys.executable, "-c", program], check=True)
    after = OtherLoad()._now()
    if before is not None and after is not None:  # where there is /proc/stat
        assert after[2] - before[2] >= 0.5


@pytest.mark.parametrize(("busy", "share"), [(1.0, 0.0), (1.2, 0.05), (3.0, 0.5), (0.5, 0.0)])
def test_what_others_took_is_what_is_not_ones_own(
    busy: float, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([(10.0, 100.0, 5.0), (12.0, 100.0 + busy, 6.0)])  # the clock, all, own
    monkeypatch.setattr(OtherLoad, "_now", staticmethod(lambda: next(times)))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert OtherLoad().share() == pytest.approx(share)
