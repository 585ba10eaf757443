"""A run and an evaluation as people hold them: they score and show themselves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from normlab import runs
from normlab.data import ImageData
from normlab.evaluation import evaluation


class Evaluation(evaluation.Evaluation):
    """An `Evaluation` that shows itself in a notebook cell."""

    def _repr_html_(self) -> str:
        from normlab.reports.run_report import evaluation_summary_html

        return evaluation_summary_html(self)


class Run(runs.Run):
    """A run's folder, opened; it can be scored, and shows itself in a notebook cell."""

    def evaluate(
        self,
        data: str | Path | Mapping[str, Any] | ImageData | None = None,
        *,
        weights: str = "kept",
        views: str = "single",
    ) -> Evaluation:
        """Score the run on the test images; see `normlab.evaluate`."""
        return evaluate(self, data, weights=weights, views=views)

    def _repr_html_(self) -> str:
        from normlab.reports.run_report import run_summary_html

        return run_summary_html(self)


def open_run(path: str | Path | None = None) -> Run:
    """Open the run at `path`; without one, the run in `runs/` with the highest number.

    Raises:
        UserError: there is none, or its files are damaged.
    """
    found = runs.open_run(path)
    return Run(found.path, found.task)


def evaluate(
    run: runs.Run,
    data: str | Path | Mapping[str, Any] | ImageData | None = None,
    *,
    weights: str = "kept",
    views: str = "single",
) -> Evaluation:
    """Score `run` on the test images of `data`, or of the data it was trained on.

    With `views` other than `single` (see `normlab.evaluation.forward.logits_of`) a picture is
    answered from several versions of it, which is more work and not comparable with a single view.

    Raises:
        DataError: the data cannot be had, or has other classes or another image size.
    """
    return Evaluation(**vars(evaluation.evaluate(run, data, weights=weights, views=views)))
