"""When a run is not sure: calibration, abstention, sets and strange pictures, measured.

    python -m benchmarks.doubt screenshots /tmp/screens
    python -m benchmarks.doubt run RUN --strange sea=FOLDER --strange screens=/tmp/screens \\
        --out docs/results/doubt/NAME.json
    python -m benchmarks.doubt draw docs/results/doubt/*.json --out docs/doubt.png
    python -m benchmarks.doubt curves docs/results/doubt/curve-*.json

Thresholds come from the run's held-out pictures. The 100 splits are of its test pictures: one half
takes the part of held-out ones, the other is counted. The file has every split.
"""

import json
import pydoc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp, softmax

from normlab.api.run import open_run
from normlab.core.files import write_atomic, write_json
from normlab.data.batches import split_images
from normlab.data.pictures.decoding import Readers
from normlab.data.pictures.walking import walk
from normlab.errors import UserError
from normlab.evaluation import held_out
from normlab.evaluation.abstention import choose_threshold, risk_coverage
from normlab.evaluation.conformal import lowest, lowest_by_class, sets_of
from normlab.evaluation.familiarity import answers_of, class_features, familiarity, some_of
from normlab.reports import plots
from normlab.study.learning_curve import LearningCurve, Point, extrapolate

SPLITS = 100
RATES = (0.8, 0.85, 0.9, 0.95, 0.98)
SET_RATES = (0.8, 0.9, 0.95)
MOST = 250  # pictures of a strange kind
MODULES = (
    "argparse array ast base64 bisect calendar cmath cmd code codecs collections copy csv "
    "datetime decimal difflib dis email enum fractions functools gzip hashlib heapq html io "
    "json logging math mimetypes numbers operator pathlib pickle queue random re shlex shutil "
    "statistics string struct tarfile textwrap timeit token trace types uuid wave weakref "
    "zipfile"
)

Floats = NDArray[np.float64]


@click.group()
def cli() -> None:
    """Measure doubt."""


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
def screenshots(folder: Path) -> None:
    """Screenshots of 50 pages: the documentation of Python's modules, in Chromium."""
    import shutil

    from playwright.sync_api import sync_playwright

    folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1024, "height": 768})
        for name in MODULES.split():
            found, told = pydoc.resolve(name)  # type: ignore[misc]
            page.set_content(pydoc.html.page(told, pydoc.html.document(found, told)))
            page.screenshot(path=folder / f"{name}.png")
        browser.close()


@cli.command()
@click.argument("path", metavar="RUN")
@click.option("--strange", multiple=True, metavar="NAME=FOLDER")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def run(path: str, strange: tuple[str, ...], out: Path) -> None:
    """Measure RUN."""
    opened = open_run(path)
    learnt = held_out.read(opened)
    if learnt is None or learnt[1] is None:
        raise UserError(f"{path} has learnt no doubt")
    doubt, means = learnt
    data, evaluation = opened.task.load(), opened.evaluate()
    size = opened.task.image_size
    kinds = {**drawn(size), **{k: read(f, size) for k, f in (s.split("=", 1) for s in strange)}}
    result: dict[str, Any] = {
        "run": opened.task.recipe.name,
        "data": Path(opened.task.data).name,
        "classes": list(data.class_names),
        "training": len(split_images(data, opened.task.recipe.validation)[0]),
        "held_out": doubt.total,
        "test": len(evaluation.labels),
        "accuracy": evaluation.accuracy,
        "temperature": doubt.temperature,
        "calibration": {
            "before": evaluation.before.as_dict(),
            "after": evaluation.after.as_dict(),
        },
        "risk_coverage": risk(evaluation.probabilities, evaluation.right),
        "abstain": abstain(opened, evaluation),
        "sets": sets(evaluation.probabilities, evaluation.labels, data.class_names),
        "strange": strange_pictures(opened, doubt, means, kinds),
        "scores": scores(opened, data, kinds),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, result)
    told = {k: v for k, v in result.items() if k not in ("classes", "sets", "risk_coverage")}
    click.echo(json.dumps(told, indent=1))


@cli.command()
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True)
def draw(results: tuple[Path, ...], out: Path) -> None:
    """Draw risk and coverage, and what is answered of strange pictures; print the tables."""
    fig = plots.figure(9.5, 4)
    left, right = fig.subplots(1, 2)
    found = [json.loads(path.read_text()) for path in results]
    kinds: list[str] = []
    for r in found:
        rows = r["risk_coverage"]
        left.plot([x["coverage"] for x in rows], [x["accuracy"] for x in rows], "o-", ms=3)
        kinds += [kind for kind in r["strange"] if kind not in kinds]
        label = f"{r['data']}, {r['accuracy']:.3f}"
        left.annotate(label, (rows[-1]["coverage"], rows[-1]["accuracy"]), fontsize=7, ha="right")
        click.echo(table(r))
    left.set(xlabel="share answered, surest first", ylabel="accuracy of those answered")
    height = 0.8 / len(found)
    for i, r in enumerate(found):
        places = [k for k, kind in enumerate(kinds) if kind in r["strange"]]
        rows = [r["strange"][kinds[k]] for k in places]
        shares = [row["answered"] / row["pictures"] for row in rows]
        right.barh([k + i * height for k in places], shares, height=height, label=r["data"])
    right.set_yticks([k + 0.4 - height / 2 for k in range(len(kinds))], kinds, fontsize=8)
    right.invert_yaxis()
    right.set(xlim=(0, 1), xlabel="answered by default, though of no class")
    right.legend(fontsize=7)
    write_atomic(out, plots.png(fig))


def table(r: dict[str, Any]) -> str:
    """The figures of a run as Markdown."""
    before, after = r["calibration"]["before"], r["calibration"]["after"]
    lines = [
        f"{r['data']}: {r['training']:,} training pictures, {r['held_out']:,} held out, "
        f"{r['test']:,} test; accuracy {r['accuracy']:.4f}; temperature {r['temperature']:.3f}; "
        + ", ".join(f"{k} {before[k]:.4f} → {after[k]:.4f}" for k in ("error", "brier", "loss")),
    ]
    for row in r["abstain"]:
        held, splits = row["held_out"], row["splits"]
        told = "cannot be shown"
        if held is not None and held["test_answered"]:
            share = held["test_answered"] / r["test"]
            right = held["test_right"] / held["test_answered"]
            told = f"{share:.1%} answered, {right:.1%} right"
        broken = splits["shown"] - splits["kept"]
        lines.append(f"| {row['rate']:.0%} | {told} | {splits['shown']} | {broken} |")
    lines += [
        f"| {row['rate']:.0%} | {'each class' if row['by_class'] else 'all'} | "
        f"{row['coverage']:.3f} ± {row['sd']:.3f} | {row['worst_class'][1]:.3f} "
        f"({row['worst_class'][0]}) | {row['size']:.2f} |"
        for row in r["sets"]
    ]
    for kind, row in r["strange"].items():
        by_score = " | ".join(f"{scores[kind]:.0%}" for scores in r["scores"].values())
        lines.append(
            f"| {kind} | {row['pictures']} | {row['answered'] / row['pictures']:.0%} | {by_score} |"
        )
    by_score = " | ".join(f"{scores['test']:.0%}" for scores in r["scores"].values())
    lines.append(f"| its own test pictures | {r['test']} | | {by_score} |")
    return "\n".join(lines) + "\n"


@cli.command()
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path))
def curves(results: tuple[Path, ...]) -> None:
    """What half of the pictures and less promise all of them, beside what all then gave."""
    click.echo("| data, recipe | pictures: accuracy | expected of all (95 %) | given | n |")
    click.echo("|---|---|---|---|---|")
    for path in results:
        read = json.loads(path.read_text())
        points = [Point(**{k: v for k, v in p.items() if k != "accuracy"}) for p in read["points"]]
        curve = LearningCurve(read["recipe"], Path(read["data"]).name, tuple(points))
        *fewer, (every, given) = [(n, [p.accuracy for p in of_n]) for n, of_n in curve.sizes]
        expected = extrapolate([p for p in points if p.pictures < every], every)
        smaller = ", ".join(f"{n:,}: {np.mean(a):.4f}" for n, a in fewer)
        click.echo(
            f"| {curve.data}, `{curve.recipe}` | {smaller} | {expected.accuracy:.4f} "
            f"({expected.low:.4f} to {expected.high:.4f}) | {every:,}: **{np.mean(given):.4f}** "
            f"({min(given):.4f} to {max(given):.4f}) | {len(given)} |"
        )


def drawn(size: int) -> dict[str, NDArray[np.uint8]]:
    """Noise and flat colours, 200 of each."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (200, 1, 1, 3), np.uint8)
    blurred = rng.normal(128, 40, (200, size, size, 3)).clip(0, 255)
    return {
        "noise, uniform": rng.integers(0, 256, (200, size, size, 3), np.uint8),
        "noise, normal": blurred.astype(np.uint8),
        "one colour": np.broadcast_to(colours, (200, size, size, 3)).copy(),
    }


def read(folder: str, size: int) -> NDArray[np.uint8]:
    """At most `MOST` pictures below a folder, evenly chosen, as for training."""
    files = [f.path for f in walk(Path(folder)) if f.problem is None]
    with Readers() as readers:
        found = [p for p, _, _ in readers.read(files[:: -(-len(files) // MOST)], size)]
    return np.stack([p for p in found if p is not None])


def risk(p: Floats, right: NDArray[np.bool_]) -> list[dict[str, float]]:
    """Accuracy of the surest tenth, two tenths, … of the test pictures."""
    curve = risk_coverage(p.max(1), right)
    rows = []
    for share in np.arange(0.1, 1.01, 0.1):
        i = int(np.searchsorted(curve.coverage, share - 1e-9))
        rows.append({"coverage": float(curve.coverage[i]), "accuracy": float(curve.accuracy[i])})
    return rows


def abstain(opened: Any, evaluation: Any) -> list[dict[str, Any]]:
    """At each rate: what the held-out pictures chose, and what splits of the test pictures do."""
    rows = []
    rng = np.random.default_rng(0)
    sure, right = evaluation.probabilities.max(1), evaluation.right
    splits = [rng.permutation(len(right)) for _ in range(SPLITS)]
    for rate in RATES:
        row: dict[str, Any] = {"rate": rate, "held_out": None}
        try:
            chosen = evaluation.answered(rate)
            threshold = evaluation.doubt.rule(rate).threshold
            row["held_out"] = {
                **threshold.as_dict(),
                "test_answered": int(chosen.sum()),
                "test_right": int(right[chosen].sum()),
            }
        except UserError as e:
            row["refused"] = str(e)
        found = []
        for order in splits:
            half = len(order) // 2
            mine, other = order[:half], order[half:]
            t = choose_threshold(risk_coverage(sure[mine], right[mine]), rate)
            if t is not None:
                answered = sure[other] >= t.least
                found.append([float(answered.mean()), float(right[other][answered].mean())])
        kept = [accuracy >= rate for _, accuracy in found]
        row["splits"] = {
            "shown": len(found),
            "kept": int(sum(kept)),
            "of_half": len(splits[0]) // 2,
            "coverage_and_accuracy": found,
        }
        rows.append(row)
    return rows


def sets(p: Floats, labels: NDArray[np.int64], names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Coverage and size of sets over random splits of the test pictures into halves."""
    rows = []
    for rate in SET_RATES:
        for by_class in (False, True):
            rng = np.random.default_rng(0)
            covered, size, classes = [], [], []
            for _ in range(SPLITS):
                order = rng.permutation(len(labels))
                mine, other = order[: len(order) // 2], order[len(order) // 2 :]
                of_label = p[mine, labels[mine]]
                least: Any = lowest(of_label, rate)
                if by_class:
                    least = lowest_by_class(of_label, labels[mine], rate, len(names))
                inside = sets_of(p[other], least)
                held = inside[np.arange(len(other)), labels[other]]
                covered.append(float(held.mean()))
                size.append(float(inside.sum(1).mean()))
                classes.append([float(held[labels[other] == k].mean()) for k in range(len(names))])
            mean = np.mean(classes, 0)
            rows.append(
                {
                    "rate": rate,
                    "by_class": by_class,
                    "coverage": float(np.mean(covered)),
                    "sd": float(np.std(covered, ddof=1)),
                    "size": float(np.mean(size)),
                    "worst_class": [names[int(mean.argmin())], float(mean.min())],
                    "each": covered,
                }
            )
    return rows


def strange_pictures(
    opened: Any, doubt: Any, means: Any, kinds: dict[str, NDArray[np.uint8]]
) -> dict[str, Any]:
    """Of each kind: how many are answered by default, and how sure they would have been."""
    rule, model, rows = doubt.rule(), opened.model(), {}
    for name, pictures in kinds.items():
        logits, features = answers_of(model, pictures)
        p = softmax(logits.double().numpy() / doubt.temperature, axis=1)
        doubts = rule.doubts(p, familiarity(features, means))
        rows[name] = {
            "pictures": len(pictures),
            "answered": doubts.count(None),
            "unlike": doubts.count("unlike"),
            "undecided": doubts.count("undecided"),
            "mean_probability": float(p.max(1).mean()),
        }
    return rows


def scores(opened: Any, data: Any, kinds: dict[str, NDArray[np.uint8]]) -> dict[str, Any]:
    """Share of each kind that is answered where 5 % of the held-out pictures are not, by score."""
    train, held = split_images(data, opened.task.recipe.validation)
    train, model, k = some_of(train), opened.model(), data.num_classes
    _, f_train = answers_of(model, train.images)
    assert f_train is not None
    f = f_train.astype(np.float64)
    mu = np.stack([f[train.labels == c].mean(0) for c in range(k)])
    within = f - mu[train.labels]
    cov = within.T @ within / len(f)
    inverse = np.linalg.inv(cov + 0.01 * np.trace(cov) / len(cov) * np.eye(len(cov)))
    bank = f / np.maximum(np.linalg.norm(f, axis=1, keepdims=True), 1e-12)
    means = class_features(f, train.labels, k)

    def mahalanobis(x: Floats) -> Floats:
        return -np.stack([((x - m) @ inverse * (x - m)).sum(1) for m in mu], 1).min(1)

    def neighbours(x: Floats) -> Floats:
        unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
        return np.sort(unit @ bank.T, 1)[:, -5]

    kinds_of_score: dict[str, Callable[[Floats, Floats], Floats]] = {
        "largest probability": lambda z, x: softmax(z, axis=1).max(1),
        "energy": lambda z, x: logsumexp(z, axis=1),
        "Mahalanobis distance": lambda z, x: mahalanobis(x),
        "5 nearest neighbours, cosine": lambda z, x: neighbours(x),
        "class means, cosine": lambda z, x: familiarity(x, means),
    }

    def asked(pictures: NDArray[np.uint8]) -> tuple[Floats, Floats]:
        logits, features = answers_of(model, pictures)
        assert features is not None
        return logits.double().numpy(), features.astype(np.float64)

    known, tested = asked(some_of(held).images), asked(data.x_test)
    found = {name: asked(pictures) for name, pictures in kinds.items()}
    rows = {}
    for name, score in kinds_of_score.items():
        least = lowest(score(*known), 0.95)
        rows[name] = {
            "test": float((score(*tested) >= least).mean()),
            **{kind: float((score(*them) >= least).mean()) for kind, them in found.items()},
        }
    return rows


if __name__ == "__main__":
    cli()
