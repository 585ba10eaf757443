"""A study as people read it: a page that fetches nothing, lines for a terminal, a table."""

import csv
import io

from normlab.core.files import write_atomic, write_json
from normlab.recipes import changed_settings
from normlab.recipes.settings import option_words, written
from normlab.reports.pages import render
from normlab.reports.study_figures import write_all
from normlab.statistics import level_of_look
from normlab.study.arms import Arm
from normlab.study.design import OUTCOMES, Design
from normlab.study.plan import default_contrasts
from normlab.study.result import Study
from normlab.text import counted, shell, utf8

CAPTIONS = {
    "differences": "Difference in what decides. Dots are pairs, the diamond is their mean, the "
    "bar its interval, grey the margin of no difference.",
    "curves": "Accuracy while training: mean over the seeds, and a band from the lowest to the "
    "highest run. A diverged run counts as chance from there on.",
    "pairs": "What decides, of each run; a line joins the runs of one seed. Crosses diverged.",
    "step-seconds": "Median time of a training step, a dot a run. Runs went side by side, so read "
    "ratios, not times.",
}


def write_report(study: Study) -> None:
    """Write `result.json`, `runs.csv`, the figures and `report.html` of a complete study."""
    write_json(study.path / "result.json", study.as_dict())
    write_atomic(study.path / "runs.csv", utf8(runs_csv(study)))
    page = render(
        "study.html",
        study=study,
        design=study.design,
        outcomes=OUTCOMES,
        figures=write_all(study, CAPTIONS),
        arms=list(zip(study.design.arms, study.summaries, strict=True)),
        results=list(zip(study.comparisons, study.descriptions, strict=True)),
        measure=study.design.measure,
        scored=_scored(study.design),
        points=points,
        percent=percent,
        edges=study.design.tuning.edges() if study.design.tuning else [],
        command=command(study),
        methods=methods(study),
        changes=changes,
        counted=counted,
    )
    write_atomic(study.path / "report.html", page)


def runs_csv(study: Study) -> str:
    """One line a run."""
    buffer = io.StringIO()
    thresholds = [f"{t:g}" for t in study.design.thresholds]
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow(
        ["arm", "seed", "test_accuracy", "balanced_accuracy", "macro_f1", "test_loss"]
        + ["val_accuracy", "validation_area"]
        + [f"steps_to_{t}" for t in thresholds]
        + ["steps", "step_seconds", "seconds", "diverged", "weights_sha256"]
    )
    for o in study.outcomes:
        table.writerow(
            [o.arm, o.seed, o.test_accuracy, o.balanced_accuracy, o.macro_f1, o.test_loss]
            + [o.val_accuracy, o.area]
            + [o.steps_to[t] for t in thresholds]
            + [o.steps, o.step_seconds, o.seconds, o.diverged or "", o.weights_sha256]
        )
    return buffer.getvalue()


def closing_lines(study: Study) -> list[str]:
    """What `normlab compare` ends with, and `--show` prints again."""
    lines = [""]
    for name, reason in study.given_up.items():
        lines.append(f"Given up: {name}: {reason}")
    if not study.complete:
        return [
            *lines,
            f"Unfinished: {len(study.outcomes)} of {study.total} runs; there is no verdict before "
            "all are done. Go on with:",
            f"  {command(study)}",
        ]
    lines += [f"Verdict: {c.verdict}. {c.sentence}" for c in study.comparisons]
    width = max(map(len, study.design.arm_names))
    for s in study.summaries:
        sd = "" if s["test_accuracy_sd"] is None else f" ± {100 * s['test_accuracy_sd']:.2f}"
        milliseconds = (
            "" if s["step_seconds"] is None else f", {1000 * s['step_seconds']:.1f} ms a step"
        )
        mean = percent(s["test_accuracy"])
        if study.design.outcome != "accuracy":
            measure = study.design.measure
            mean, sd = measure.value(s["outcome"]), f" ± {measure.spread(s['outcome_sd'])}"
        lines.append(
            f"  {s['name']:<{width}}  {mean}{sd} (mean ± sd of {s['n']} "
            f"{'run' if s['n'] == 1 else 'runs'}){milliseconds}, {s['diverged']} diverged"
        )
    lines += study.mixture
    lines += [f"Tuned: {line}" for line in tuned_lines(study.design)]
    lines += [f"Limit: {limit}" for limit in study.limits]
    page = study.path / "report.html"
    if page.exists():  # a study that was passed on may have its runs alone; the command draws it
        lines.append(f"Report: {page}")
    return [*lines, f"Again: {command(study)}"]


def tuned_lines(design: Design) -> list[str]:
    """Each arm's chosen factor."""
    tuning = design.tuning
    if tuning is None:
        return []
    edges = tuning.edges()
    return [
        f"{arm} {tuning.setting} × {factor:g}"
        + (" (an outermost factor: better ones may lie beyond)" if arm in edges else "")
        for arm, factor in tuning.chosen.items()
    ]


def command(study: Study) -> str:
    """The command that makes this study, or goes on with it."""
    design = study.design
    words = ["normlab", "compare", design.recipe.name]
    for arm in design.arms:
        words += ["--arm", f"{arm.name}: {changes(arm)}"]
    if design.contrasts != default_contrasts(design.arms):
        for contrast in design.contrasts:
            words += ["--contrast", ",".join(contrast)]
    words += ["--seeds", str(design.seeds), "--first-seed", str(design.first_seed)]
    words += option_words(changed_settings(design.recipe))
    if design.data != "cifar10":
        words += ["--data", design.data]
        words += ["--image-size", str(design.image_size)]
        words += ["--skip-bad"] if design.skip_bad else []
        words += ["--group-by", design.group_by] if design.group_by else []
    if design.tuning is not None:
        factors = ",".join(f"{f:g}" for f in design.tuning.factors)
        words += ["--tune", f"{design.tuning.setting}={factors}"]
    if design.outcome != "accuracy":
        words += ["--outcome", design.outcome]
    margin = design.margin * (100 if design.measure.fraction else 1)
    words += ["--margin", f"{margin:g}", "--checks", str(design.checks)]
    words += ["--thresholds", ",".join(f"{t:g}" for t in design.thresholds)]
    words += ["--threads", str(design.threads), "--out", str(study.path)]
    return shell(words)


def changes(arm: Arm) -> str:
    """What an arm changes, as `--arm` takes it."""
    items = dict(arm.changes)
    if arm.image_size is not None:
        items["image_size"] = arm.image_size
    if arm.start is not None:
        items["from"] = arm.start
    if arm.seed_offset:
        items["seed_offset"] = arm.seed_offset
    return ", ".join(f"{key}={written(value)}" for key, value in items.items())


def methods(study: Study) -> str:
    """A paragraph to paste into a paper."""
    d = study.design
    arms = "; ".join(f"{arm.name} ({changes(arm) or 'the recipe as it is'})" for arm in d.arms)
    contrasts = ", ".join(f"{first} minus {other}" for first, other in d.contrasts)
    shared = (
        "Within a pair, initial values of the layers in common, order of the images and dropout "
        "streams were shared."
    )
    if any(arm.seed_offset for arm in d.arms):
        shared += " Arms with a seed_offset used other seeds and shared none of these."
    tuned = ""
    if d.tuning is not None:
        tuned = (
            f" Before the study each arm's {d.tuning.setting} was chosen from the factors "
            f"{', '.join(f'{f:g}' for f in d.tuning.factors)} by mean validation accuracy over "
            f"{d.tuning.seeds} other seeds ({'; '.join(tuned_lines(d))})."
        )
    looks = f"on look {d.look}" + (
        f", after looks at {', '.join(map(str, d.looks))} pairs," if d.looks else ""
    )
    return (
        f"We trained {d.recipe.model.name} (recipe {d.recipe.name}, "
        f"{counted(d.recipe.epochs, 'epoch')}) on "
        f"{d.data} ({d.train_images:,} training and {d.test_images:,} "
        f"{_scored(d)} images, SHA-256 "
        f"{d.data_sha256[:12]}) from {d.seeds} seeds, {d.first_seed} to "
        f"{d.first_seed + d.seeds - 1}, in {len(d.arms)} arms: {arms}. {shared}{tuned} "
        f"The outcome, fixed beforehand, was {d.measure.name} after the last epoch; diverged runs "
        f"counted {d.measure.diverged_as}. Contrasts ({contrasts}) were judged {looks} "
        f"by the exact sign-flip permutation test on paired differences (100,000 random flips "
        f"beyond 20 pairs) at level {level_of_look(d.look):.3g}, shared between the contrasts by "
        f"Holm's correction, with 0.04 spent on the first look and 0.01/2^(k-1) on look k; "
        f"intervals invert the same test. "
        f"Software and machine: {'; '.join(study.made_with)}."
    )


def _scored(design: Design) -> str:
    """What the pictures are called that decide."""
    return "held-out" if design.held_out else "test"


def points(fraction: float | None) -> str:
    """A difference of accuracies, signed."""
    return "–" if fraction is None else f"{100 * fraction:+.2f}"


def percent(fraction: float | None) -> str:
    """An accuracy."""
    return "–" if fraction is None else f"{100 * fraction:.2f} %"
