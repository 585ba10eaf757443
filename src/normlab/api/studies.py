"""Studies of any kind through one door: of a recipe, a function, or a command."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from normlab.errors import UserError
from normlab.recipes import Recipe
from normlab.study import plan as plans


def compare(what: str | Recipe | Callable[..., Any] | None = None, **options: Any) -> Any:
    """Compare arms from the same seeds and say which is better, and how sure that is.

        study = normlab.compare("fast79", arms=["batch", "none"], seeds=6)
        print(study.comparisons[0].sentence)

        study = normlab.compare(train, arms={"wide": {"width": 64}, "narrow": {"width": 16}})

    Called again with the same arguments it goes on where it was stopped; with more seeds it adds
    pairs, which counts as a further look.

    Args:
        what: a recipe (None for the default one of the data), whose options are those of
            `normlab.api.compare.compare`; or a function, called as function(seed, **settings) in
            processes, whose options are those of
            `normlab.api.measured.compare_function`. A function needs no PyTorch.

    Raises:
        UserError: something asked for is not possible, or another plan is in the folder.
        Interrupted: SIGINT or SIGTERM came; finished runs are kept.
    """
    if callable(what):
        from normlab.api.measured import compare_function

        return compare_function(what, **options)
    from normlab.api.compare import compare as compare_recipe

    return compare_recipe(what, **options)


def open_study(path: str | Path) -> Any:
    """Read a study's folder, whatever its runs are.

    Raises:
        UserError: it is none.
        DataError: a file in it is damaged.
    """
    plan = plans.load(Path(path))
    if plan is None:
        raise UserError(f"{str(path)!r} holds no study: name a folder that `normlab compare` made")
    if plan.kind == "measured":
        from normlab.api.measured import open_study as open_measured

        return open_measured(path)
    from normlab.api.compare import open_study as open_recipe

    return open_recipe(path)


def closing_lines(study: Any) -> list[str]:
    """What `normlab compare` ends with."""
    if study.design.kind == "measured":
        from normlab.reports.measured_report import closing_lines as of_measured

        return of_measured(study)
    from normlab.reports.study_report import closing_lines as of_recipe

    return of_recipe(study)
