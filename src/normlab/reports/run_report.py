"""Results as people read them: a page that fetches nothing, and a dozen lines for the terminal."""

import base64
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from normlab.core.files import write_atomic, write_json
from normlab.core.places import make_folder
from normlab.data import ImageData
from normlab.data.changes import write_changes
from normlab.data.loading import PUBLIC, own_pictures
from normlab.data.pictures.sizes import USUAL
from normlab.errors import install
from normlab.evaluation.baselines import NEARLY_ALL
from normlab.evaluation.evaluation import Evaluation
from normlab.evaluation.heat import PASSES, Heat, Probabilities, heat_of, overlay
from normlab.evaluation.prediction import run_predictor
from normlab.evaluation.recalibration import Repair
from normlab.evaluation.scores import Score
from normlab.evaluation.sureness import sureness
from normlab.recipes import DEFAULT_OWN, RECIPES, changed_settings
from normlab.recipes.settings import option_words, written
from normlab.reports import plots
from normlab.reports.pages import render
from normlab.runs import Result, Run
from normlab.statistics import accuracy_interval
from normlab.text import counted, html, listed, shell
from normlab.training.starting_points import BUILTIN

DECISIONS = "decisions.csv"
HALF_SIZE = (
    "the first epochs learn from pictures of half the size, and validation is at the full size: "
    "where that ends, its curve jumps"
)
PRETRAINED = "resnet18.a1_in1k"  # a small network of timm, offered where none was named
SURE = 0.95  # of an answer that makes its label doubtful
MUCH = 0.1  # by which accuracies differ for a reason that is worth telling
SHOWN_CLASSES = 20
LISTED_CELLS = 40  # of the confusion matrix, where a table would be too large
MOST_PICTURES = 1_000  # behind the numbers of the confusion matrix
FEWEST_HEATS, MOST_HEATS = 16, 60


def write_run_report(run: Run, evaluation: Evaluation, images: ImageData) -> None:
    """Draw `curves.png` and `report.html` into the folder of a finished run.

    The decisions about pictures become a file there, too, which printed commands name.
    """
    result = run.finished()
    if run.task.changes is not None:
        write_changes(run.task.changes, run.path / DECISIONS)
    history = run.history
    curves = None
    if history and (len(history) > 1 or "parts" in history[0] or history[0]["steps"]):
        curves = plots.safely("curves", lambda: plots.png(plots.draw_curves(history)))
    if curves is not None:
        write_atomic(run.path / "curves.png", curves)
    recipe, environment = run.task.recipe, run.environment
    answers = run_predictor(run, evaluation.weights).answers
    facts = [
        ("recipe", ", ".join(f"{k} {_told(v)}" for k, v in recipe.settings().items())),
        ("seed", run.task.seed),
        *([("start", run.task.start)] if run.task.start else []),
        *([("decisions", run.task.changes)] if run.task.changes else []),
        *([("groups by", run.task.group_by)] if run.task.group_by else []),
        ("training", f"{result['train_seconds']:.1f} s, {result['steps']:,} steps"),
        *([("curves", HALF_SIZE)] if recipe.half_size and history else []),
        *([("speed", f"{_speed(result)}, validation included")] if result["steps"] else []),
        ("machine", f"{environment['cpu']}, {counted(environment['threads'], 'thread')}"),
        ("versions", f"normlab {environment['normlab']}, PyTorch {environment['torch']}"),
        *(
            (f"from step {entry['step'] + 1:,} on", f"with other {'; '.join(entry['differs'])}")
            for entry in environment.get("later", [])
        ),
        ("weights", f"SHA-256 {result['weights_sha256']}"),
    ]
    page = _page(
        evaluation,
        images,
        title=f"{recipe.name} on {evaluation.data}",
        heats=_heats(evaluation, images, lambda x: answers(x)[0]),
        curves="" if curves is None else _embed(curves),
        facts=facts,
        warnings=warnings_of(result),
        commands=repeat_command(run),
    )
    write_atomic(run.path / "report.html", page)


def _told(value: object) -> str:
    """A setting's value for a reader; numbers to four digits."""
    return f"{value:.4g}" if isinstance(value, float) else written(value)


def write_evaluation(
    evaluation: Evaluation,
    images: ImageData,
    folder: Path,
    probabilities: Probabilities | None = None,
) -> None:
    """Write scores, plots and a page of an evaluation into `folder`.

    probabilities: the network's, for heat maps; None for a page without.
    """
    make_folder(folder)
    write_json(folder / "evaluation.json", evaluation.as_dict())
    drawings = _drawings(evaluation)
    drawings["mistakes"] = plots.safely(
        "mistakes", lambda: plots.png(plots.draw_mistakes(evaluation, images.x_test))
    )
    for name, drawn in drawings.items():
        if drawn is not None:
            write_atomic(folder / f"{name}.png", drawn)
    page = _page(
        evaluation,
        images,
        title=f"{evaluation.run} on {evaluation.data}",
        heats=_heats(evaluation, images, probabilities),
    )
    write_atomic(folder / "report.html", page)


def repeat_command(run: Run) -> str:
    """The command that trains this run again, to the same bits on the same machine."""
    task = run.task
    words = ["normlab", "train", task.recipe.name, "--seed", str(task.seed)]
    words += option_words(changed_settings(task.recipe))
    words += _data_words(run)
    if (start := task.start) is not None:
        words += ["--from", start.run, *(["--freeze"] if start.freeze else [])]
        words += ["--statistics", start.statistics]
    return shell([*words, "--threads", str(run.environment["threads"])])


def _speed(result: Result) -> str:
    return f"{result['images_per_second']:,.0f} images/s"


def closing_lines(run: Run, install_seconds: float | None = None) -> list[str]:
    """What `normlab train` ends with: the score, where time went, what is wrong, what to try."""
    result = run.finished()
    scores = result["evaluation"]
    low, high = scores["test_accuracy_interval"]
    times = [] if install_seconds is None else [f"install {install_seconds:.0f} s"]
    times += [
        f"data {result['data_seconds']:.1f} s",
        f"training {result['train_seconds']:.1f} s"
        + (f" ({_speed(result)})" if result["steps"] else ", the fit of the output layer"),
        f"evaluation {result['evaluation_seconds']:.1f} s",
    ]
    weakest, surest = scores["weakest_class"], scores["surest_mistake"]
    lines = [
        "",
        f"Test loss: {scores['test_loss']:.4f}",
        f"Test accuracy: {scores['test_accuracy']:.4f}   95 % interval {low:.4f} to {high:.4f}, "
        f"over {scores['test_images']:,} test pictures. "
        "It covers the choice of test pictures, not the choice of seed.",
        *_length_lines(run),
        f"Time: {', '.join(times)}",
        f"Weakest class: {weakest['name']} ({weakest['accuracy']:.1%} right), "
        f"most often taken for {weakest['taken_for']} ({weakest['share']:.1%})",
    ]
    if surest is not None:
        lines.append(
            f"Surest mistake: test picture {surest.get('file') or surest['index']}, labelled "
            f"{surest['label']}, "
            f"answered {surest['answer']} with {surest['probability']:.2%}"
        )
    lines += _sure_lines(scores)
    lines += _own_data_lines(result)
    lines += [f"Warning: {warning}" for warning in warnings_of(result)]
    lines += [f"Limit: {limit}" for limit in scores["limits"]]
    return [
        *lines,
        f"Report: {run.path / 'report.html'}",
        "Next:",
        *(f"  {command}" for command in _next_commands(run)),
    ]


def _length_lines(run: Run) -> list[str]:
    """How long the training went on and which weights it keeps, where held-out images decided."""
    result = run.finished()
    length, patience = result.get("length"), run.task.recipe.patience
    if patience is None or length is None or not length["held_out"]:
        return []
    epochs, planned, best = length["epochs"], length["planned"], length["best_epoch"]
    held_out = counted(length["held_out"] or 0, "held-out picture")
    ended = f"all {planned} epochs"
    if epochs != planned:
        ended = f"{epochs} of {planned} epochs, since {patience} brought no lower loss on them"
    kept = f"those of the best epoch, {best}" if run.kept == "best" else "the last ones"
    return [f"Watched: {held_out}; {ended}; the weights kept are {kept}"]


def _sure_lines(scores: dict[str, Any]) -> list[str]:
    """How sure it is, if pictures were held out to learn it from."""
    if not (sure := scores.get("sure")):
        return []
    c, answered = scores["calibration"], sure["answered"]
    rightly = f", {sure['right'] / answered:.1%} of them rightly" if answered else ""
    return [
        f"Sure of {answered:,} of {scores['test_images']:,} test pictures{rightly}; of the others "
        "`normlab predict` says that it is not sure. Calibration error "
        f"{c['before']['error']:.3f}, {c['after']['error']:.3f} with the temperature "
        f"{c['temperature']:.2f} of {sure['held_out']:,} held-out pictures."
    ]


def _own_data_lines(result: Result) -> list[str]:
    """On data of one's own, what the score is worth: beside answers that need no network."""
    baselines = result.get("baselines")
    if not baselines:
        return []
    rows = {"this network": result["evaluation"], **baselines}
    width = max(map(len, rows))
    lines = ["Beside simpler answers, on the same test pictures:"]
    for name, scores in rows.items():
        low, high = scores["test_accuracy_interval"]
        lines.append(
            f"  {name:<{width}}  accuracy {scores['test_accuracy']:.4f} ({low:.4f} to {high:.4f}), "
            f"balanced {scores['balanced_accuracy']:.4f}, macro-F1 {scores['macro_f1']:.4f}"
        )
    return lines


def warnings_of(result: Result) -> list[str]:
    """What a person must hear about a result before anybody relies on it, with what to try."""
    scores, found = result["evaluation"], []
    if leak := result.get("leak"):
        found.append(leak)
    if repair := result.get("repair"):
        found.append(str(Repair(Score(**repair["before"]), Score(**repair["after"]))))
    missed = [name for name, a in scores["class_accuracy"].items() if a == 0]
    if missed:
        found.append(
            f"no test picture of {listed(missed)} was answered rightly: look at those pictures "
            "with `normlab evaluate`, and give more of them"
        )
    simple = (result.get("baselines") or {}).get("logistic regression")
    accuracy = scores["test_accuracy"]
    if simple and accuracy <= simple["test_accuracy_interval"][1] and accuracy < NEARLY_ALL:
        found.append(
            "this network is not clearly better than a logistic regression on 8 × 8 pixels: try "
            "more pictures, or more --minutes"
        )
    return found + _other_kind(result)


def _other_kind(result: Result) -> list[str]:
    """Whether far more of the pictures held out from training were right than of the test pictures:
    chance, or the choice of the best epoch, does not make as much.
    """
    right, accuracy = result.get("val_accuracy"), result["test_accuracy"]
    held_out = (result.get("length") or {}).get("held_out")
    if not held_out or right is None or right - accuracy <= MUCH:
        return []
    least, _ = accuracy_interval(round(right * held_out), held_out)
    if least <= result["test_accuracy_interval"][1]:
        return []
    return [
        f"{right:.1%} of the held-out pictures are right and {accuracy:.1%} of the test pictures: "
        "the test pictures are of another kind, or the held-out ones have copies among those for "
        "training; `normlab data check` shows copies"
    ]


def _data_words(run: Run) -> list[str]:
    """The options that name a run's data and say how its pictures were read."""
    task = run.task
    words = [] if task.data == "cifar10" else ["--data", task.data]
    if own_pictures(task.data) is not None:
        words += ["--image-size", str(task.image_size)]
    if task.skip_bad:
        words.append("--skip-bad")
    if task.group_by is not None:
        words += ["--group-by", task.group_by]
    if task.changes is not None:
        file = str(run.path / DECISIONS)
        words += ["--exclude", file] if task.changes.exclude else []
        words += ["--relabel", file] if task.changes.relabel else []
    return words


def _next_commands(run: Run) -> list[str]:
    """What is worth doing next with a run, as commands with a reason."""
    own = run.task.data not in PUBLIC
    commands = _lacks(run) if own else _contrasts(run)
    text = "every class, plots, the surest mistakes as pictures"
    commands.append((["normlab", "evaluate", str(run.path)], text))
    if own:
        commands.append((["normlab", "serve", str(run.path)], "a page to drop pictures on"))
    return [f"{shell(words)}    # {reason}" for words, reason in commands]


def _contrasts(run: Run) -> list[tuple[list[str], str]]:
    """On data of known standing: what to compare the run with."""
    recipe, data = run.task.recipe, _data_words(run)
    commands = []
    if recipe.name in RECIPES:
        train = ["normlab", "train", recipe.name]
        if run.task.start and recipe.head != "fitted":
            commands.append(([*train, *data], "the same without --from"))
        if recipe.head != "fitted":
            twin = "none" if recipe.norm.name == "batch" else "batch"
            commands.append(([*train, "--norm", twin, *data], "its twin"))
    if recipe.name != "notebook":
        text = "the notebook's own 25 epochs"
        commands.append((["normlab", "train", "notebook", *data], text))
    return commands


def _lacks(run: Run) -> list[tuple[list[str], str]]:
    """On data of one's own: what this run's scores say that it lacks; at most two commands, the
    first of `docs/pictures.md`'s list.

    Nothing where it errs on one test picture in fifty or fewer.
    """
    task, result = run.task, run.finished()
    recipe, scores, start = task.recipe, result["evaluation"], task.start
    data, size = _data_words(run), "--image-size"
    data = data[: data.index(size)] + data[data.index(size) + 2 :] if size in data else data
    train, seconds = ["normlab", "train"], result["train_seconds"]
    accuracy, found = result["test_accuracy"], []
    if accuracy >= NEARLY_ALL:
        return []
    if start is not None and start.head == "fitted":
        words = [*train, recipe.name, "--from", start.run, "--epochs", str(recipe.epochs + 3)]
        return [([*words, *data], "the body learns on, slowly"), *_doubtful_labels(run)]
    if recipe.name != DEFAULT_OWN:
        text = "the recipe for own pictures, with the size that suits them"
        return [([*train, *data], text)]
    learnt = (run.history[-1].get("accuracy") if run.history else None) or 0.0
    if accuracy - scores["balanced_accuracy"] > 0.03 and recipe.balance != "sampling":
        text = "rare classes are answered worse: show them more often"
        found.append(([*train, *data, "--balance", "sampling"], text))
    if learnt - accuracy > MUCH and start is None:
        text = "it knows its own pictures much better than new ones: start from CIFAR-10"
        found.append(([*train, *data, "--from", BUILTIN], text))
    elif learnt - accuracy > MUCH and start is not None and start.run == BUILTIN:
        text = f"the same from ImageNet, a download; first {install('pretrained')}"
        found.append(([*train, *data, "--from", PRETRAINED], text))
    if learnt < 0.9:
        text = "it has not learnt its own pictures yet: three times as long"
        found.append(([*train, *data, "--minutes", _minutes(3 * seconds, 1)], text))
    found += _doubtful_labels(run)
    if learnt >= 0.9 and task.image_size <= USUAL:
        text = "larger pictures and a deeper network, if the pictures have the pixels"
        found.append(([*train, *data, "--minutes", _minutes(4 * seconds, 5)], text))
    if learnt >= 0.9 and start is None and task.changes is None:  # a curve takes neither
        text = f"would more pictures help? Nine trainings, about {_minutes(9 * seconds, 1)} minutes"
        found.append((["normlab", "curve", *data], text))
    return found[:2]


def _doubtful_labels(run: Run) -> list[tuple[list[str], str]]:
    """Where an answer is nearly certain and wrong, and nobody has decided about pictures: a look
    at the labels.
    """
    surest = run.finished()["evaluation"].get("surest_mistake")
    if surest is None or surest["probability"] < SURE or run.task.changes is not None:
        return []
    by = [] if run.task.group_by is None else ["--group-by", run.task.group_by]
    text = f"one wrong answer is {surest['probability']:.1%} sure: is its label right?"
    return [(["normlab", "data", "check", run.task.data, *by], text)]


def _minutes(seconds: float, least: int) -> str:
    return str(max(least, math.ceil(seconds / 60)))


def run_summary_html(run: Run) -> str:
    """A run in a notebook cell: its score and its curves."""
    result = run.result
    if result is None:
        return f"<p>unfinished run <code>{html(str(run.path))}</code></p>"
    low, high = result["test_accuracy_interval"]
    curves = run.path / "curves.png"
    picture = f"<img width=640 src='{_embed(curves.read_bytes())}'>" if curves.is_file() else ""
    return (
        f"<p><b>{html(run.task.recipe.name)}</b>, seed {run.task.seed}: test accuracy "
        f"<b>{result['test_accuracy']:.2%}</b> (95 % interval over test pictures {low:.2%} to "
        f"{high:.2%}) after {result['train_seconds']:.0f} s "
        f"(<code>{html(str(run.path))}</code>)</p>{picture}"
    )


def evaluation_summary_html(evaluation: Evaluation) -> str:
    """An evaluation in a notebook cell: its scores and the confusion matrix."""
    fig = plots.figure(5, 4.6)

    def draw() -> bytes:
        plots.plot_confusion(fig.subplots(), evaluation)
        return plots.png(fig)

    drawn = plots.safely("the confusion matrix", draw)
    text = html(str(evaluation)).replace("\n", "<br>")
    return f"<p>{text}</p>" + (f"<img width=480 src='{_embed(drawn)}'>" if drawn else "")


def _page(
    evaluation: Evaluation,
    images: ImageData,
    *,
    title: str,
    heats: Mapping[int, Heat] | None = None,
    **parts: Any,
) -> bytes:
    heats = heats or {}
    values = {
        "title": title,
        "subtitle": f"{evaluation.weights} weights of {evaluation.run}",
        "e": evaluation,
        "classes": [
            (name, "–" if a != a else f"{100 * a:.1f} %")
            for name, a in zip(evaluation.class_names, evaluation.class_accuracy, strict=True)
        ],
        "mistakes": _gallery(evaluation, images, evaluation.surest_mistakes(), {}),
        "worst": [
            (name, _gallery(evaluation, images, worst, heats))
            for k, name in enumerate(images.class_names[:SHOWN_CLASSES])
            if len(worst := evaluation.worst_mistakes(k))
        ],
        "heats": len(heats),
        "table": _table(evaluation),
        "cells": _cells(evaluation, images),
        "sure": sureness(evaluation),
        "curves": None,
        "facts": [],
        "warnings": [],
        "commands": "",
        **{k: drawn and _embed(drawn) for k, drawn in _drawings(evaluation).items()},
        **parts,
    }
    return render("report.html", **values)


def _heats(
    evaluation: Evaluation, images: ImageData, probabilities: Probabilities | None
) -> dict[int, Heat]:
    """Heat maps of mistakes, by index: the worst of each class, then the second of each, ….

    As many as take no longer than the scoring of the test images did, but at least `FEWEST_HEATS`.
    """
    if probabilities is None:
        return {}
    most = min(MOST_HEATS, max(FEWEST_HEATS, len(evaluation.labels) // PASSES))
    worst = [evaluation.worst_mistakes(k) for k in range(len(images.class_names))][:SHOWN_CLASSES]
    order = [int(w[place]) for place in range(8) for w in worst if place < len(w)][:most]
    answers = evaluation.predictions
    return {i: heat_of(probabilities, np.array(images.x_test[i]), int(answers[i])) for i in order}


def _table(evaluation: Evaluation) -> list[list[dict[str, Any]]] | None:
    """The confusion matrix as a table's rows; None for so many classes that none could read it."""
    counts = evaluation.confusion
    if len(counts) > SHOWN_CLASSES:
        return None
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return [
        [
            {"id": f"c-{i}-{j}", "count": int(counts[i, j]), "share": float(share[i, j])}
            for j in range(len(counts))
        ]
        for i in range(len(counts))
    ]


def _cells(evaluation: Evaluation, images: ImageData) -> list[dict[str, Any]]:
    """What is behind each number of the table: some of its pictures, the surest answers first.

    Of right answers the least sure are shown: they are the next mistakes. Of too many classes for
    a table, the most frequent mistakes.
    """
    counts, names = evaluation.confusion, evaluation.class_names
    places = [(int(i), int(j)) for i, j in np.argwhere(counts)]
    if len(names) > SHOWN_CLASSES:
        wrong = [place for place in places if place[0] != place[1]]
        places = sorted(wrong, key=lambda place: -counts[place])[:LISTED_CELLS]
    most = int(np.clip(MOST_PICTURES // max(1, len(places)), 4, 24))
    top, answers = evaluation.probabilities.max(1), evaluation.predictions
    cells = []
    for i, j in places:
        found = np.flatnonzero((evaluation.labels == i) & (answers == j))
        order = np.argsort(top[found] if i == j else -top[found], kind="stable")
        cells.append(
            {
                "id": f"c-{i}-{j}",
                "label": names[i],
                "answer": names[j],
                "count": int(counts[i, j]),
                "pictures": _gallery(evaluation, images, found[order][:most], {}, photo=True),
            }
        )
    return cells


def _gallery(
    evaluation: Evaluation,
    images: ImageData,
    indices: NDArray[np.int64],
    heats: Mapping[int, Heat],
    *,
    photo: bool = False,
) -> list[dict[str, Any]]:
    """Pictures with their label, answer and its probability, ready for the page.

    photo: as JPEG, a third of the size.
    """
    names, answers = evaluation.class_names, evaluation.predictions
    return [
        {
            "index": int(i),
            "file": None if evaluation.files is None else evaluation.files[i],
            "label": names[evaluation.labels[i]],
            "answer": names[answers[i]],
            "probability": float(evaluation.probabilities[i, answers[i]]),
            "source": _picture(images.x_test[i], "jpeg" if photo else "png"),
            "heat": _picture(overlay(np.array(images.x_test[i]), heats[int(i)]), "jpeg")
            if int(i) in heats
            else None,
            "hidden": heats[int(i)].least if int(i) in heats else None,
        }
        for i in indices
    ]


def _picture(pixels: NDArray[np.uint8], kind: str) -> str:
    buffer = io.BytesIO()
    settings = {"quality": 88, "subsampling": 0} if kind == "jpeg" else {}
    Image.fromarray(pixels).save(buffer, format=kind, **settings)
    return _embed(buffer.getvalue(), kind)


def _drawings(evaluation: Evaluation) -> dict[str, bytes | None]:
    """Pictures by name; None for one that cannot be drawn."""

    def confusion() -> bytes:
        fig = plots.figure(5.6, 5)
        plots.plot_confusion(fig.subplots(), evaluation)
        return plots.png(fig)

    def calibration() -> bytes:
        fig = plots.figure(4.4, 4)
        before = None if evaluation.doubt is None else evaluation.uncalibrated
        plots.plot_calibration(fig.subplots(), evaluation.calibration, before)
        return plots.png(fig)

    def coverage() -> bytes:
        fig = plots.figure(4.4, 4)
        plots.plot_risk_coverage(fig.subplots(), evaluation)
        return plots.png(fig)

    drawings = {"confusion": confusion, "calibration": calibration, "coverage": coverage}
    return {name: plots.safely(name, draw) for name, draw in drawings.items()}


def _embed(image: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64," + base64.b64encode(image).decode()
