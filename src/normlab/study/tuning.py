"""Each arm's own best value of one setting, found on validation images before the study."""

from dataclasses import replace
from typing import Any

from normlab.data import ImageData
from normlab.errors import UserError, nearest
from normlab.recipes import SETTINGS
from normlab.study.design import Design, Tuning, scaled
from normlab.study.outcomes import Outcome
from normlab.study.plan import TUNING_SEED
from normlab.study.training import Job

TUNING = "tuning"
TRIAL_SEEDS = 2


def parse_tuning(text: str | None) -> Tuning | None:
    """Read `learning_rate=0.3,1,3`: a setting and the factors to try on it.

    Raises:
        UserError: it cannot be read, or is not about a number of the recipe.
    """
    if text is None:
        return None
    setting, _, rest = text.partition("=")
    tunable = [s.name for s in SETTINGS.values() if s.kind is float]
    if setting not in tunable:
        raise UserError(f"tune={text}: unknown setting {nearest(setting, tunable)}")
    try:
        factors = tuple(dict.fromkeys(float(factor) for factor in rest.split(",")))
    except ValueError:
        factors = ()
    if len(factors) < 2 or not all(0 < f < float("inf") for f in factors):
        raise UserError(f"tune={text}: give two or more factors above 0, as {setting}=0.3,1,3")
    return Tuning(setting=setting, factors=factors, seeds=TRIAL_SEEDS, scores={}, chosen={})


def trial_name(arm: str, tuning: Tuning, factor: float) -> str:
    return f"{arm}-{tuning.setting}-x{factor:g}"


def trials(design: Design, data: str | ImageData) -> list[Job]:
    """Every arm at every factor with the same seeds, which no pair of the study has.

    Raises:
        UserError: no validation images to choose by, or a factor leads out of a setting's range.
    """
    tuning = design.tuning
    if tuning is None or tuning.chosen:
        return []
    jobs = []
    for seed in range(TUNING_SEED, TUNING_SEED + tuning.seeds):
        for factor in tuning.factors:
            for arm in design.arms:
                task = design.task(arm, seed)
                if task.recipe.validation == 0:
                    raise UserError("tune: it chooses by validation images: set validation above 0")
                job = Job(
                    arm=trial_name(arm.name, tuning, factor),
                    seed=seed,
                    task=replace(task, recipe=scaled(task.recipe, tuning.setting, factor)),
                    data=data,
                    threads=design.threads,
                    thresholds=(),
                    checks=1,
                    test=False,
                    held_out=design.held_out,
                )
                jobs.append(job)
    return jobs


def choose(design: Design, outcomes: list[Outcome]) -> Design:
    """The design with each arm's best factor: the highest mean validation accuracy.

    Equal scores go to the factor named first.
    """
    tuning = design.tuning
    if tuning is None or tuning.chosen:
        return design
    scores: dict[str, list[float]] = {}
    chosen: dict[str, float] = {}
    for arm in design.arms:
        means = []
        for factor in tuning.factors:
            name = trial_name(arm.name, tuning, factor)
            found: list[Any] = [o.val_accuracy for o in outcomes if o.arm == name]
            means.append(sum(found) / len(found))
        scores[arm.name] = means
        chosen[arm.name] = tuning.factors[means.index(max(means))]
    return replace(design, tuning=replace(tuning, scores=scores, chosen=chosen))
