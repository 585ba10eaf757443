"""Callbacks for Lightning (`pytorch_lightning`, or `lightning`): record, examine, note.

from normlab.callbacks.lightning import Checkup, History, Watch

trainer = Trainer(callbacks=[Watch("watched"), Checkup(), History("watched")])
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normlab import diagnosis
from normlab.callbacks.rows import Rows
from normlab.diagnosis import checkup
from normlab.errors import UserError
from normlab.inspection import watching


def _bases() -> tuple[Any, ...]:
    """`Callback` of either package, of which each wants its callbacks to be."""
    found = []
    for package in ("lightning.pytorch", "pytorch_lightning"):
        with suppress(ImportError):
            found.append(import_module(package).Callback)
    return tuple(found)


_BASES = _bases()
if not _BASES:
    raise UserError("these callbacks need Lightning: pip install lightning")
_Base: Any = type("_Base", _BASES, {})


class Watch(_Base):  # type: ignore[misc]
    """Record what each layer sees, as `normlab.watch` does; on rank 0.

    Args:
        folder: new; gets `recording.npz`.
        **options: as `normlab.watch` takes them.
    """

    def __init__(self, folder: str | Path, **options: Any) -> None:
        self.folder, self.options = folder, options
        self.watch: watching.Watch | None = None
        self.seen = 0
        self.loss: Tensor | None = None

    def on_train_start(self, trainer: Any, module: Any) -> None:
        options = self.options
        if "optimizer" not in options and len(trainer.optimizers) == 1:
            options = {**options, "optimizer": trainer.optimizers[0]}
        self.watch = watching.Watch(module, self.folder, **options)
        self.seen = trainer.global_step

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if trainer.global_step > self.seen and self.watch is not None:  # else it accumulates
            self.seen = trainer.global_step
            self.watch.step(loss if isinstance(loss, Tensor) else None)

    def on_fit_end(self, trainer: Any, module: Any) -> None:
        self._close()

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self.watch is not None:
            self.watch.close()
            self.watch = None


class Checkup(_Base):  # type: ignore[misc]
    """The doctor at the end of epochs, as `normlab.Checkup`.

    Args:
        every: come after each so many epochs.
        report: told each new finding in a line.

    Attributes:
        findings: all so far.
    """

    def __init__(self, every: int = 1, report: Callable[[str], None] | None = print) -> None:
        self.every, self.report = every, report
        self.checkup: checkup.Checkup | None = None

    @property
    def findings(self) -> list[diagnosis.Finding]:
        return [] if self.checkup is None else self.checkup.findings

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.checkup = checkup.Checkup(
            module,
            every=self.every,
            accumulation=trainer.accumulate_grad_batches,
            report=self.report if trainer.is_global_zero else None,
        )

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        if self.checkup is not None:
            self.checkup.end_epoch()

    def on_fit_end(self, trainer: Any, module: Any) -> None:
        if self.checkup is not None:
            self.checkup.close()

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        self.on_fit_end(trainer, module)


class History(_Base):  # type: ignore[misc]
    """Write what is logged of each epoch to `history.jsonl`, as `normlab train` does.

    Args:
        folder: the same as that of `Watch`, so that `normlab inspect` draws both.
    """

    def __init__(self, folder: str | Path) -> None:
        self.rows = Rows(folder)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        if trainer.is_global_zero:
            logs = {
                name: value.detach() if isinstance(value, torch.Tensor) else value
                for name, value in trainer.callback_metrics.items()
            }
            self.rows.add(trainer.current_epoch + 1, trainer.global_step, logs)
