"""`normlab evaluate`: a run scored on the test images, with plots and its mistakes."""

import json

import click

from normlab.cli.options import ABSTAIN_AT, DATA, JSON, PER_CLASS, SETS, VIEWS, WEIGHTS
from normlab.cli.output import say


@click.command()
@click.argument("run", required=False)
@DATA
@WEIGHTS
@VIEWS
@ABSTAIN_AT
@SETS
@PER_CLASS
@JSON
def evaluate(
    run: str | None,
    data: str | None,
    weights: str,
    views: str,
    abstain_at: float | None,
    sets: float | None,
    per_class: bool,
    as_json: bool,
) -> None:
    """Score RUN (by default the latest) on the test images, with plots and its mistakes.

    --abstain-at and --sets say what `normlab predict` with the same options gives on them.
    """
    from normlab.api.run import open_run
    from normlab.evaluation.prediction import run_predictor
    from normlab.evaluation.sureness import sureness
    from normlab.reports.run_report import write_evaluation

    if per_class and sets is None:
        raise click.UsageError("--per-class says how --sets are made: add --sets 90")
    opened = open_run(run)
    images = opened.task.load(data)
    evaluation = opened.evaluate(images, weights=weights, views=views)
    sure = sureness(evaluation, abstain_at, sets, per_class=per_class)
    weights = evaluation.weights
    name = weights if views == "single" else f"{weights}-{views}"
    folder = opened.path / f"evaluation-{name}"
    single = views == "single"
    answers = run_predictor(opened, weights).answers if single else None
    write_evaluation(evaluation, images, folder, answers and (lambda x: answers(x)[0]))
    if views != "single":
        say(f"Views: {views}; not comparable with figures from a single view")
    say(str(evaluation))
    say(f"Balanced accuracy: {evaluation.balanced_accuracy:.4f}")
    width = max(map(len, evaluation.class_names))
    for name, accuracy in zip(evaluation.class_names, evaluation.class_accuracy, strict=True):
        say(f"  {name:<{width}}  {accuracy:.3f}")
    for line in sure.lines():
        say(line)
    for limit in evaluation.limits:
        say(f"Limit: {limit}")
    say(f"Report: {folder / 'report.html'}")
    if as_json:
        click.echo(json.dumps({**evaluation.as_dict(), **sure.as_dict()}))
