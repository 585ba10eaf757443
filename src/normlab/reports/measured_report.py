"""A study of commands or of a function as people read it: page, closing lines, table, methods."""

import csv
import io

from normlab.core.files import write_atomic, write_json
from normlab.statistics import level_of_look
from normlab.study.arms import SEED_OFFSET, Arm
from normlab.study.commands import write_arm
from normlab.study.measured import Study
from normlab.study.plan import default_contrasts
from normlab.text import counted, shell, utf8

CAPTIONS = {
    "differences": "Differences. Dots are pairs, the diamond is their mean, the bar its interval, "
    "grey the margin of no difference, if there is one.",
    "pairs": "Each run; a line joins the runs of one seed. Crosses failed.",
    "seconds": "Time of a run, a dot a run. Runs may have gone side by side: read ratios.",
}


def write_report(study: Study) -> None:
    """Write `result.json`, `runs.csv`, the figures and `report.html` of a decided study."""
    from normlab.reports.pages import render
    from normlab.reports.study_figures import write_all

    write_json(study.path / "result.json", study.as_dict())
    write_atomic(study.path / "runs.csv", utf8(runs_csv(study)))
    page = render(
        "measured.html",
        study=study,
        design=study.design,
        figures=write_all(study, CAPTIONS),
        arms=list(zip(study.design.arms, study.summaries, strict=True)),
        others=_others(study),
        results=list(zip(study.comparisons, study.descriptions, strict=True)),
        difference=study.design.measure.difference,
        changes=_changes,
        command=command(study),
        methods=methods(study),
        counted=counted,
    )
    write_atomic(study.path / "report.html", page)


def runs_csv(study: Study) -> str:
    """One line a run."""
    buffer = io.StringIO()
    names = list(dict.fromkeys(name for o in study.outcomes for name in o.values))
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow(["arm", "seed", "value", "diverged", "seconds", "processor_seconds", *names])
    for o in study.outcomes:
        row = [o.arm, o.seed, o.value, o.diverged or "", o.seconds, o.processor_seconds]
        table.writerow([*row, *(o.values.get(name, "") for name in names)])
    return buffer.getvalue()


def closing_lines(study: Study) -> list[str]:
    """What `normlab compare --command` ends with, and `--show` prints again."""
    design, measure = study.design, study.design.measure
    lines = [""]
    for name, reason in study.given_up.items():
        lines.append(f"Given up: {name}: {reason}")
    if not study.complete:
        return [
            *lines,
            *(f"Found: {finding}" for finding in study.findings),
            f"Unfinished: {len(study.outcomes)} of {study.total} runs; there is no verdict before "
            "all are done. Go on with:",
            f"  {command(study)}",
        ]
    if study.one_pair:
        lines.append(f"No verdict: {study.one_pair}")
    else:
        lines += [f"Verdict: {c.verdict}. {c.sentence}" for c in study.comparisons]
        lines += [f"Found: {finding}" for finding in study.findings]
    width = max(map(len, design.arm_names))
    for s in study.summaries:
        sd = "" if s["value_sd"] is None else f" ± {measure.spread(s['value_sd'])}"
        lines.append(
            f"  {s['name']:<{width}}  {measure.value(s['value'])}{sd} (mean ± sd of "
            f"{counted(s['n'], 'run')}), {s['seconds']:.3g} s a run, {s['diverged']} failed"
        )
    lines += study.mixture
    page = study.path / "report.html"
    if page.exists():
        lines.append(f"Report: {page}")
    return [*lines, f"Again: {command(study)}"]


def command(study: Study) -> str:
    """The command that makes this study, or goes on with it; a function's has none."""
    design, runs = study.design, study.design.command
    if runs is None:
        return (
            f"normlab.compare({design.function}, …, out={str(study.path)!r}, seeds={design.seeds})"
        )
    words = ["normlab", "compare", "--command", runs.text]
    words += ["--shell"] if runs.shell else []
    for arm in design.arms:
        words += ["--arm", write_arm(arm.name, _filled(arm))]
    if design.contrasts != default_contrasts(design.arms):
        for contrast in design.contrasts:
            words += ["--contrast", ",".join(contrast)]
    words += ["--seeds", str(design.seeds), "--first-seed", str(design.first_seed)]
    if runs.result is not None:
        words += ["--result", runs.result]
    elif design.metric is not None:
        words += ["--metric", design.metric]
    if runs.pattern is not None:
        words += ["--pattern", runs.pattern]
    words += ["--lower-is-better"] if design.lower_is_better else []
    for option, value in (
        ("--margin", design.margin),
        ("--diverged", design.diverged),
        ("--time-limit", runs.time_limit),
    ):
        words += [] if value is None else [option, f"{value:.12g}"]
    words += ["--check-repeat"] if design.check_repeat else []
    words += ["--jobs", str(design.jobs)] if design.jobs > 1 else []
    words += ["--threads", str(design.threads)] if design.threads else []
    return shell([*words, "--out", str(study.path)])


def methods(study: Study) -> str:
    """A paragraph to paste into a paper."""
    d = study.design
    arms = "; ".join(f"{arm.name} ({_changes(arm) or 'as it is'})" for arm in d.arms)
    contrasts = ", ".join(f"{first} minus {other}" for first, other in d.contrasts)
    what = f"We ran `{d.command.text}`" if d.command else f"We called {d.function}"
    looks = f"on look {d.look}" + (
        f", after looks at {', '.join(map(str, d.looks))} pairs," if d.looks else ""
    )
    limit = d.command.time_limit if d.command else None
    failed = "no run failed"
    if d.diverged is not None:
        late = "" if limit is None else f", took longer than {limit:g} s"
        failed = f"a run that failed{late} or gave NaN counted as {d.diverged:g}"
    return (
        f"{what} from {d.seeds} seeds, {d.first_seed} to {d.first_seed + d.seeds - 1}, in "
        f"{len(d.arms)} arms: {arms}; the arms of a pair had the same seed. The outcome, fixed "
        f"beforehand, was {d.measure.name}"
        f"{' (lower is better)' if d.lower_is_better else ''}; {failed}. Contrasts ({contrasts}) "
        f"were judged {looks} by the exact sign-flip permutation test on paired differences "
        f"(100,000 random flips beyond 20 pairs) at level {level_of_look(d.look):.3g}, shared "
        f"between the contrasts by Holm's correction, with 0.04 spent on the first look and "
        f"0.01/2^(k-1) on look k; intervals invert the same test. Software and machine: "
        f"{'; '.join(study.made_with)}."
    )


def _others(study: Study) -> list[str]:
    """The first few numbers beside the one that decides."""
    return list(dict.fromkeys(name for s in study.summaries for name in s["others"]))[:6]


def _filled(arm: Arm) -> dict[str, str]:
    offset = {SEED_OFFSET: str(arm.seed_offset)} if arm.seed_offset else {}
    return {**{key: str(value) for key, value in arm.changes.items()}, **offset}


def _changes(arm: Arm) -> str:
    return ", ".join(f"{key}={value}" for key, value in _filled(arm).items())
