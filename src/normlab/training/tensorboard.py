"""Scalars for TensorBoard, for those who watch many runs there."""

from typing import TYPE_CHECKING

from normlab.core.places import make_folder
from normlab.errors import UserError, install
from normlab.training.state import Plan, State

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard:
    """Writes losses and accuracies after each epoch into the run's folder `tensorboard/`.

    Raises:
        UserError: TensorBoard is not installed.
    """

    def __init__(self) -> None:
        try:
            import tensorboard  # noqa: F401
        except ImportError:
            raise UserError(f"--tensorboard needs TensorBoard: {install('tensorboard')}") from None
        self.writer: SummaryWriter | None = None

    def before_training(self, plan: Plan) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if plan.folder is not None:
            make_folder(plan.folder / "tensorboard")
            self.writer = SummaryWriter(str(plan.folder / "tensorboard"))

    def after_step(self, state: State, epoch: int, batch: int, batches: int) -> None:
        if batch < batches or self.writer is None:
            return
        row = state.history[-1]
        for key in ("loss", "accuracy", "val_loss", "val_accuracy"):
            if row[key] is not None:
                self.writer.add_scalar(key, row[key], row["epoch"])
        self.writer.flush()
