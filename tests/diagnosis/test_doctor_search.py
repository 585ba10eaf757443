"""Weights are found wherever a training script puts them, and "nothing found" means looked at."""

import argparse
import json
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import normlab
from networks import pictures, settle
from normlab.__main__ import run as command
from normlab.diagnosis import Finding


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)),
    )


@pytest.fixture(scope="module")
def healthy() -> nn.Module:
    torch.manual_seed(0)
    return settle(small(), steps=150, batch=4, size=12)


@pytest.fixture(scope="module")
def ill(healthy: nn.Module) -> nn.Module:
    """Its second normaliser has a negative variance."""
    model = small()
    model.load_state_dict(healthy.state_dict())
    model[3][1].running_var[2] = -0.25
    return model.eval()


def seen(diagnosis: normlab.Diagnosis, rule: str) -> list[Finding]:
    return [f for f in diagnosis.findings if f.rule == rule]


@dataclass
class Options:
    rate: float = 0.1


def beside(state: Any, model: nn.Module) -> dict[str, Callable[[], Any]]:
    """Files as training scripts write them, with the place of the weights for a name."""
    adam = torch.optim.Adam(model.parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    adam.step()
    options: dict[str, Any] = {
        "options": Options(),
        "namespace": argparse.Namespace(lr=0.1, device=torch.device("cpu")),
        "simple": SimpleNamespace(a=[1, {2, 3}]),
        "path": Path("/data"),
        "numpy": np.float64(0.5),
        "rng": np.random.default_rng(0),
        "counts": Counter([1, 2, 2]),
        "defaults": defaultdict(list, a=[1]),
        "dtype": torch.float16,
        "size": torch.Size([1, 2]),
        "optimizer": adam.state_dict(),
        "best": torch.tensor(0.7),
        "scores": torch.arange(3.0),
    }
    return {
        "model": lambda: {**options, "model": state},
        "anything_at_all": lambda: {"anything_at_all": state, "epoch": 3},
        "nets.0": lambda: {"nets": [state], **options},
        "trainer.ema.shadow": lambda: {"trainer": {"ema": {"shadow": dict(state)}}, **options},
        "ordered": lambda: OrderedDict(a=1, ordered=state),
        "whole": lambda: {"whole": model, "optimizer": adam},
        "held": lambda: {"held": SimpleNamespace(net=state)},
    }


@pytest.mark.parametrize("legacy", [False, True])
def test_weights_are_found_under_any_key(ill: nn.Module, tmp_path: Path, legacy: bool) -> None:
    for place, content in beside(ill.state_dict(), ill).items():
        path = tmp_path / f"{place}.pth.tar"
        torch.save(content(), path, _use_new_zipfile_serialization=not legacy)
        diagnosis = normlab.doctor(path)
        assert diagnosis.normalizers == 2, place
        assert [f.where for f in seen(diagnosis, "variance-not-positive")] == ["3.1"]
        assert all(part.startswith(place) for part in diagnosis.parts)
        assert len(diagnosis.parts) == 1
        assert not seen(diagnosis, "no-normalizer")


def test_every_state_dict_is_examined_and_named(
    healthy: nn.Module, ill: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "both.pt"
    head = nn.Linear(3, 2).state_dict()
    head["bias"][0] = torch.nan
    torch.save({"model": healthy.state_dict(), "ema": ill.state_dict(), "head": head}, path)
    diagnosis = normlab.doctor(path)
    assert diagnosis.parts == {"model": 2, "ema": 2, "head": 0}
    assert {(f.rule, f.where) for f in diagnosis.findings if f.severity == "serious"} == {
        ("variance-not-positive", "ema: 3.1"),
        ("not-finite", "head: bias"),
    }
    assert command(["doctor", str(path)]) == 1
    told = " ".join(capsys.readouterr().out.split())
    assert "4 batch normalisations in 3 state dicts: model (2), ema (2), head (0)" in told


@pytest.mark.parametrize("legacy", [False, True])
def test_a_whole_module_says_its_settings(tmp_path: Path, legacy: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=2.0, momentum=0.7))
    settle(model, steps=30, batch=4, size=8)
    path = tmp_path / "whole.pt"
    torch.save(nn.DataParallel(model), path, _use_new_zipfile_serialization=not legacy)
    diagnosis = normlab.doctor(path)
    assert diagnosis.normalizers == 1
    assert diagnosis.assumes == ""
    assert [f.where for f in seen(diagnosis, "eps-matters")] == ["module.1"]
    assert "0.3 of the old" in seen(diagnosis, "momentum-turned-round")[0].evidence


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchscript(ill: nn.Module, tmp_path: Path, how: str) -> None:
    path = tmp_path / "model.ts"
    one = pictures(1, size=12)
    made = torch.jit.script(ill) if how == "script" else torch.jit.trace(ill, one)
    made.save(str(path))
    diagnosis = normlab.doctor(path)
    assert diagnosis.normalizers == 2
    assert [f.where for f in seen(diagnosis, "variance-not-positive")] == ["3.1"]
    assert "momentum 0.1 and eps 1e-5" in diagnosis.assumes


@pytest.mark.parametrize(
    "names", ["bn.running_var", "running_var", "bn1running_var", "bn/moving_var"]
)
def test_other_ways_of_naming(tmp_path: Path, names: str) -> None:
    mean = names.replace("running_var", "running_mean").replace("moving_var", "moving_mean")
    torch.save({names: torch.tensor([1.0, -1.0]), mean: torch.zeros(2)}, tmp_path / "x.pt")
    diagnosis = normlab.doctor(tmp_path / "x.pt")
    assert len(seen(diagnosis, "variance-not-positive")) == 1


def test_a_file_without_normalisers_is_never_called_healthy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "linear.pt"
    torch.save(nn.Linear(3, 2).state_dict(), path)
    assert command(["doctor", str(path)]) == 1
    told = " ".join(capsys.readouterr().out.split())
    assert "SERIOUS no-normalizer" in told
    assert "2 tensors were examined, and none is a running variance" in told
    assert "Nothing found" not in told


def test_what_is_meant_to_have_no_normaliser_is_not_accused(tmp_path: Path) -> None:
    run = normlab.train(
        "fast79", data="sample", out=tmp_path / "run", threads=1, epochs=1, norm="none"
    )
    (finding,) = seen(normlab.doctor(run), "no-normalizer")
    assert finding.severity == "note"
    assert "norm=none" in finding.evidence


def test_what_could_not_be_read_is_counted(
    healthy: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = dict(healthy.state_dict())
    state["3.1.running_var"] = state["3.1.running_var"].to_sparse()
    state["extra.weight"] = torch.zeros(3, device="meta")
    path = tmp_path / "odd.pt"
    torch.save(state, path)
    assert command(["doctor", str(path), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    found = {f["where"]: f for f in told["findings"] if f["rule"] == "not-read"}
    assert told["normalizers"] == 1
    assert "1 of 2 batch normalisations could not be read" in found["3.1"]["evidence"]
    assert found["3.1"]["severity"] == "serious"
    assert found["extra.weight"]["severity"] == "note"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"running_var": torch.ones(4, dtype=torch.complex64)}, "numbers of type complex64"),
        ({"running_var": torch.ones(3)}, "its vectors have 3, 4, 4 channels"),
        ({"weight": torch.ones(5)}, "its vectors have 4, 4, 5 channels"),
        ({"running_mean": None}, "it has no running_mean"),
        ({"running_var": None}, "it has no running_var"),
        (
            dict.fromkeys(("running_var", "running_mean", "weight", "bias"), torch.ones(0)),
            "no chan",
        ),
    ],
)
def test_vectors_that_do_not_fit_are_not_read(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    state = {**nn.BatchNorm2d(4).state_dict(), **changes}
    path = tmp_path / "x.pt"
    torch.save({f"bn.{k}": v for k, v in state.items() if v is not None}, path)
    (finding,) = seen(normlab.doctor(path), "not-read")
    assert finding.where == "bn"
    assert reason in finding.evidence


@pytest.mark.parametrize(
    "counter", [torch.tensor(float("nan")), torch.tensor(-3), torch.ones(2), torch.tensor(1j)]
)
def test_a_counter_that_counts_nothing_is_no_counter(tmp_path: Path, counter: Any) -> None:
    state = nn.BatchNorm2d(4).state_dict()
    state["num_batches_tracked"] = counter
    torch.save(state, tmp_path / "x.pt")
    assert "stale" in normlab.doctor(tmp_path / "x.pt").not_checked


def test_names_from_a_file_cannot_command_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.pt"
    state = {f"\x1b[31m.{k}": v for k, v in nn.BatchNorm2d(3).state_dict().items()}
    objects = {"\x1b]52;c;eA==\x07": Options()}
    torch.save({"\x1b]0;x\x07": state, "\x9b2J": nn.Linear(2, 2).state_dict(), **objects}, path)
    assert command(["doctor", str(path)]) == 1
    told = capsys.readouterr().out
    assert "never-updated" in told
    assert all(line.isprintable() for line in told.splitlines())
