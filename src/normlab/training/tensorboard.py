"""Scalars for TensorBoard, for those who watch many runs there."""

from typing import TYPE_CHECKING

from normlab.core.places import make_folder
from normlab.errors import UserError, install
from normlab.training.state import Plan, State

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard:
    """Writes losses and accuracies after each epoch into the run's folder `tensorboard/`.

    Args:
        begin: also where the run has no such folder yet.

    Raises:
        UserError: TensorBoard is not installed; before the training where it goes on with a folder.
    """

    def __init__(self, *, begin: bool) -> None:
        self.begin = begin
        if begin and not _installed():
            raise UserError(f"--tensorboard needs TensorBoard: {install('tensorboard')}")
        self.writer: SummaryWriter | None = None

    def before_training(self, plan: Plan) -> None:
        folder = None if plan.folder is None else plan.folder / "tensorboard"
        if folder is None or not (self.begin or folder.is_dir()):
            return
        if not _installed():
            raise UserError(
                f"going on with {str(folder)!r} needs TensorBoard: {install('tensorboard')}, or "
                "remove that folder"
            )
        from torch.utils.tensorboard import SummaryWriter

        make_folder(folder)
        self.writer = SummaryWriter(str(folder))

    def after_step(self, state: State, epoch: int, batch: int, batches: int) -> None:
        if batch < batches or self.writer is None:
            return
        row = state.history[-1]
        for key in ("loss", "accuracy", "val_loss", "val_accuracy"):
            if row[key] is not None:
                self.writer.add_scalar(key, row[key], row["epoch"])
        self.writer.flush()


def _installed() -> bool:
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        return False
    return True
