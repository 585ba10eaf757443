"""The callbacks in real Lightning trainers: bits, recording, findings, history."""

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import normlab
from normlab.inspection.recording import read_recording

if importlib.util.find_spec("torchvision"):  # it may be a build for another PyTorch
    from benchmarks.doctor_world import define_operators

    define_operators()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    lightning: Any = pytest.importorskip("pytorch_lightning", reason="needs Lightning")
    from normlab.callbacks.lightning import Checkup, History, Watch

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own, of workers and loggers


class Module(lightning.LightningModule):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.01), nn.ReLU(), nn.Dropout(0.2),
            nn.Flatten(), nn.Linear(4 * 36, 3),
        )  # fmt: skip

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        loss = cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        answers = self.net(batch[0])
        self.log("val_acc", (answers.argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05)


def fit(folder: Path, callbacks: list[Any], **options: Any) -> Module:
    lightning.seed_everything(0, verbose=False)
    module = Module()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(48, 3, 8, 8, generator=generator)
    loader = DataLoader(TensorDataset(images, torch.arange(48) % 3), batch_size=8)
    trainer = lightning.Trainer(
        max_epochs=2, callbacks=callbacks, default_root_dir=folder, accelerator="cpu",
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(module, loader, loader)
    return module


def test_a_lightning_training_is_watched_examined_and_noted(tmp_path: Path) -> None:
    lines: list[str] = []
    folder = tmp_path / "w"
    checkup = Checkup(report=lines.append)
    watched = fit(tmp_path, [Watch(folder, every=4), checkup, History(folder)])
    alone = fit(tmp_path, [])
    for name, value in alone.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name

    seen = read_recording(folder)
    assert seen.layers == ("net.0", "net.1", "net.5")
    assert list(seen.steps) == [1, 2, 4, 8, 12]
    assert np.isfinite(seen.arrays["loss"]).all()
    assert (seen.arrays["net.0/effective_rate"] > 0).all()
    assert any("stale at net.1: after 6 steps with m = 0.99" in line for line in lines)
    assert "stale" in {f.rule for f in checkup.findings}
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [(r["epoch"], r["steps"]) for r in rows] == [(1, 6), (2, 12)]
    assert all(0 <= r["val_accuracy"] <= 1 and r["loss"] > 0 for r in rows)
    normlab.inspect(folder).write(tmp_path / "drawn")
    assert (tmp_path / "drawn" / "figure-1.png").exists()


@pytest.mark.soak
def test_accumulated_gradients_are_one_step(tmp_path: Path) -> None:
    fit(tmp_path, [Watch(tmp_path / "w", every=2)], accumulate_grad_batches=3)
    assert list(read_recording(tmp_path / "w").steps) == [1, 2, 4]
