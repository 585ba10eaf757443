"""`normlab predict`: pictures in, classes out, one line a picture."""

import csv
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from normlab.cli.output import say
from normlab.text import printable

if TYPE_CHECKING:
    from normlab.evaluation.prediction import Predictor

Top = Sequence[tuple[str, float]]


@click.command()
@click.argument("words", metavar="[RUN|MODEL.onnx] IMAGE|FOLDER…", nargs=-1, required=True)
@click.option(
    "--top", type=click.IntRange(1), default=3, show_default=True, help="Classes a picture."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line and picture.")
@click.option("--csv", "as_csv", is_flag=True, help="Comma-separated values with a header.")
def predict(words: tuple[str, ...], top: int, as_json: bool, as_csv: bool) -> None:
    """Say what is on pictures: the most likely classes and their probabilities.

    RUN is the folder of a run, by default the latest; MODEL.onnx is a file that `normlab export`
    wrote. Folders are searched at any depth. A file
    that cannot be read is reported on standard error and the rest go on; the exit code is then 1,
    and 2 if no picture could be answered.
    """
    from normlab.errors import UserError
    from normlab.evaluation.prediction import predict as predictions

    if as_json and as_csv:
        raise click.UsageError("--json and --csv cannot be combined")
    predictor, paths = _model_and_paths(words)
    names = predictor.class_names
    write = _writer(as_json, as_csv, min(top, len(names)))
    good = bad = 0
    for answer in predictions(predictor, paths):
        if answer.problem is None:
            good += 1
            write(str(answer.path), answer.top(names, top))
        else:
            bad += 1
            say(f"{_shown(answer.path)}: {answer.problem}", err=True)
    if not good:
        raise UserError(f"no picture in {', '.join(map(_shown, paths))}: give pictures or folders")
    if bad:
        raise SystemExit(1)


def _model_and_paths(words: tuple[str, ...]) -> tuple["Predictor", tuple[str, ...]]:
    """A first word that is a run's folder or an ONNX file is the model; the rest is pictures."""
    from normlab.evaluation.prediction import is_model, open_predictor

    named = is_model(words[0])
    if named and len(words) == 1:
        raise click.UsageError(f"{words[0]} is a model; give pictures or folders after it")
    return open_predictor(words[0] if named else None), words[named:]


def _writer(as_json: bool, as_csv: bool, top: int) -> Callable[[str, Top], None]:
    """What puts one answer on standard output."""
    if as_json:
        return _write_json
    if not as_csv:
        return _write_line
    rows = csv.writer(sys.stdout, lineterminator="\n")
    rows.writerow(["path", *(f"{what}_{i + 1}" for i in range(top) for what in ("class", "p"))])

    def write(path: str, answer: Top) -> None:
        rows.writerow([_shown(path), *(v for name, p in answer for v in (printable(name), p))])

    return write


def _write_json(path: str, answer: Top) -> None:
    classes = [{"class": name, "probability": p} for name, p in answer]
    click.echo(json.dumps({"path": path, "predictions": classes}))


def _write_line(path: str, answer: Top) -> None:
    say(f"{_shown(path)}: {', '.join(f'{name} {p:.1%}' for name, p in answer)}")


def _shown(path: str | Path) -> str:
    from normlab.text import shown

    return shown(path)
