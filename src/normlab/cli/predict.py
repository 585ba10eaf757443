"""`normlab predict`: pictures in, classes out, one line a picture."""

import csv
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normlab.cli.options import ABSTAIN_AT, PER_CLASS, SETS, VIEWS, WEIGHTS
from normlab.cli.output import say
from normlab.text import printable

if TYPE_CHECKING:
    from normlab.evaluation.doubt import Reason, Rule
    from normlab.evaluation.prediction import Prediction, Predictor


@dataclass(frozen=True)
class _Answer:
    """What is said of one picture.

    Attributes:
        top: the most probable classes and their probabilities.
        doubt: why it is not sure, `unlike` or `undecided`; None where it is sure.
        inside: the classes of its set; None if no sets were asked for.
    """

    path: str
    top: list[tuple[str, float]]
    doubt: "Reason | None" = None
    familiarity: float | None = None
    inside: list[str] | None = None


@click.command()
@click.argument("words", metavar="[RUN|MODEL.onnx] IMAGE|FOLDER…", nargs=-1, required=True)
@click.option(
    "--top", type=click.IntRange(1), default=3, show_default=True, help="Classes a picture."
)
@WEIGHTS
@VIEWS
@ABSTAIN_AT
@SETS
@PER_CLASS
@click.option("--always", is_flag=True, help="Always answer, however unsure it is.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line and picture.")
@click.option("--csv", "as_csv", is_flag=True, help="Comma-separated values with a header.")
def predict(
    words: tuple[str, ...],
    top: int,
    weights: str,
    views: str,
    abstain_at: float | None,
    sets: float | None,
    per_class: bool,
    always: bool,
    as_json: bool,
    as_csv: bool,
) -> None:
    """Say what is on pictures: the most likely classes and their probabilities.

    RUN is the folder of a run, by default the latest; MODEL.onnx is a file that `normlab export`
    wrote. Folders are searched at any depth. It says "not sure" of a picture that is unlike those
    it was trained on, or where no class is more likely than not. A file that cannot be read is
    reported on standard error and the rest go on; the exit code is then 1, and 2 if no picture
    could be answered.
    """
    from normlab.errors import UserError
    from normlab.evaluation.doubt import NOTHING_HELD_OUT
    from normlab.evaluation.prediction import predict as predictions

    if as_json and as_csv:
        raise click.UsageError("--json and --csv cannot be combined")
    if always and (abstain_at is not None or sets is not None):
        raise click.UsageError("--always cannot be combined with --abstain-at or --sets")
    if per_class and sets is None:
        raise click.UsageError("--per-class says how --sets are made: add --sets 90")
    if views != "single" and (abstain_at is not None or sets is not None):
        raise click.UsageError("--abstain-at and --sets hold for single views: leave out --views")
    predictor, paths = _model_and_paths(words, weights, views)
    names, doubt = predictor.class_names, predictor.doubt
    unlearnt = NOTHING_HELD_OUT
    if weights != "kept":
        unlearnt = (
            "for these weights nothing was learnt from held-out pictures: leave out --weights"
        )
    if doubt is None and (abstain_at is not None or sets is not None):
        raise UserError(f"this model knows no doubt: {unlearnt}")
    rule = None if doubt is None or always else doubt.rule(_share(abstain_at))
    limits = None
    if doubt is not None and sets is not None:
        limits = doubt.set_limits(sets / 100, len(names), by_class=per_class)
    write = _writer(as_json, as_csv, min(top, len(names)), always, limits is not None)
    seen = Counter["Reason | None"]()
    bad = 0
    for answer in predictions(predictor, paths):
        if answer.problem is None:
            said = _judged(answer, names, top, rule, limits)
            seen[said.doubt] += 1
            write(said)
        else:
            bad += 1
            say(f"{_shown(answer.path)}: {answer.problem}", err=True)
    if not seen:
        raise UserError(f"no picture in {', '.join(map(_shown, paths))}: give pictures or folders")
    if doubt is None and not always:
        say(f"Note: this model answers whatever it is shown; {unlearnt}", err=True)
    for line in _summary(seen, rule):
        say(line, err=True)
    if bad:
        click.get_current_context().exit(1)


def _share(percent: float | None) -> float | None:
    return None if percent is None else percent / 100


def _model_and_paths(
    words: tuple[str, ...], weights: str, views: str
) -> tuple["Predictor", tuple[str, ...]]:
    """A first word that is a run's folder or an ONNX file is the model; the rest is pictures."""
    from normlab.evaluation.prediction import is_model, open_predictor

    named = is_model(words[0])
    if named and len(words) == 1:
        raise click.UsageError(f"{words[0]} is a model; give pictures or folders after it")
    return open_predictor(words[0] if named else None, weights, views), words[named:]


def _judged(
    answer: "Prediction", names: tuple[str, ...], top: int, rule: "Rule | None", limits: Any
) -> _Answer:
    """What to say of a picture that was answered."""
    from normlab.evaluation.conformal import sets_of

    p = answer.probabilities
    assert p is not None
    doubt = inside = None
    if rule is not None:
        doubt = rule.doubt(p, answer.familiarity)
    if limits is not None:
        chosen = sets_of(p[None], limits)[0]
        inside = [names[k] for k in (-p).argsort(kind="stable") if chosen[k]]
        # A set says itself between which classes it is not sure.
        doubt = doubt if doubt == "unlike" or (rule and rule.threshold) else None
    return _Answer(str(answer.path), answer.top(names, top), doubt, answer.familiarity, inside)


def _writer(
    as_json: bool, as_csv: bool, top: int, always: bool, sets: bool
) -> Callable[[_Answer], None]:
    """What puts one answer on standard output."""
    if as_json:
        return lambda answer: click.echo(json.dumps(_object(answer, always)))
    if not as_csv:
        return _write_line
    rows = csv.writer(sys.stdout, lineterminator="\n")
    head = ["path", *(f"{what}_{i + 1}" for i in range(top) for what in ("class", "p"))]
    rows.writerow(head if always else [*head, "doubt", "familiarity", *["set"] * sets])

    def write(answer: _Answer) -> None:
        row: list[Any] = [_shown(answer.path)]
        row += [v for name, p in answer.top for v in (printable(name), p)]
        if not always:
            row += [answer.doubt or "", "" if answer.familiarity is None else answer.familiarity]
        if answer.inside is not None:
            row.append("|".join(map(printable, answer.inside)))
        rows.writerow(row)

    return write


def _object(answer: _Answer, always: bool) -> dict[str, Any]:
    classes = [{"class": name, "probability": p} for name, p in answer.top]
    said: dict[str, Any] = {"path": answer.path, "predictions": classes}
    if not always:
        said |= {"doubt": answer.doubt, "familiarity": answer.familiarity}
    return said if answer.inside is None else {**said, "set": answer.inside}


def _write_line(answer: _Answer) -> None:
    from normlab.evaluation.doubt import WORDS

    likely = ", ".join(f"{name} {p:.1%}" for name, p in answer.top)
    said = likely if answer.inside is None else " or ".join(answer.inside)
    if answer.doubt is not None:
        said = f"not sure, {WORDS[answer.doubt]}"
        said += f"; if any: {likely}" if answer.doubt == "unlike" else f": {likely}"
    say(f"{_shown(answer.path)}: {said}")


def _summary(seen: Counter["Reason | None"], rule: "Rule | None") -> list[str]:
    """What the rule was and how often it spoke, for people who see the lines above."""
    from normlab.evaluation.doubt import WORDS

    lines = []
    if rule is not None and rule.threshold is not None:
        lines.append(f"Sure {rule.told()}")
    unsure = sum(count for doubt, count in seen.items() if doubt is not None)
    if unsure:
        why = ", ".join(f"{seen[key]:,} {words}" for key, words in WORDS.items() if seen[key])
        lines.append(f"Not sure of {unsure:,} of {sum(seen.values()):,}: {why}; --always answers")
    return lines


def _shown(path: str | Path) -> str:
    from normlab.text import shown

    return shown(path)
