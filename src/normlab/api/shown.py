"""What a study shows of itself, whatever its runs are; drawing is loaded only when asked for."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Shown:
    """A study that draws itself, and shows itself in a notebook cell."""

    @property
    def figures(self: Any) -> "dict[str, Figure]":
        """Every picture of the report, by its file's name; the study must be complete."""
        from normlab.reports.study_figures import draw_all

        return draw_all(self)

    def _repr_html_(self: Any) -> str:
        from normlab.reports.study_figures import summary_html

        return summary_html(self)
