"""The runs of a recipe's study: trainings in worker processes."""

import threading
from dataclasses import dataclass
from functools import lru_cache

from normlab.data import ImageData
from normlab.data import load as load_data
from normlab.data.batches import hold_out
from normlab.errors import DataError
from normlab.runs import Task
from normlab.study.outcomes import Outcome, train_one

_ONE_AT_A_TIME = threading.Lock()  # a Dask worker may have several threads; torch's are global


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training.

    Attributes:
        data: what `normlab.data.load` is given, or the images themselves.
        held_out: share of the training images that are tested on in place of the test images.
    """

    arm: str
    seed: int
    task: Task
    data: str | ImageData
    threads: int
    thresholds: tuple[float, ...]
    checks: int
    test: bool
    held_out: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.arm} seed {self.seed}"

    def run(self) -> Outcome:
        with _ONE_AT_A_TIME:
            images = self._images()
            if images.sha256 != self.task.data_sha256:
                raise DataError(
                    f"data {self.data!r} are others here than where the study was begun"
                )
            return train_one(
                self.task,
                images,
                arm=self.arm,
                seed=self.seed,
                threads=self.threads,
                thresholds=self.thresholds,
                checks=self.checks,
                test=self.test,
            )

    def _images(self) -> ImageData:
        if isinstance(self.data, ImageData):
            return self.data
        task = self.task
        return _load(self.data, task.image_size, task.skip_bad, task.group_by, self.held_out)


@lru_cache(maxsize=2)  # arms may have two sizes of pictures
def _load(
    data: str, image_size: int, skip_bad: bool, group_by: str | None, held_out: float
) -> ImageData:
    images = load_data(data, image_size=image_size, skip_bad=skip_bad, group_by=group_by)
    return hold_out(images, held_out) if held_out else images
