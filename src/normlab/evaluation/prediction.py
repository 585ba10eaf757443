"""Pictures in, classes out: any number of files, one batch of them in memory at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from normlab.data.pictures.decoding import Readers
from normlab.data.pictures.walking import Found, walk
from normlab.errors import UserError
from normlab.evaluation.doubt import Doubt

if TYPE_CHECKING:
    from normlab.formats.onnx_model import OnnxModel
    from normlab.runs import Run

BATCH_SIZE = 64


# Probabilities (N, K), rows that add up to 1, and familiarity (N,), if that can be told.
Answers = tuple[NDArray[np.floating], NDArray[np.floating] | None]


@dataclass(frozen=True)
class Predictor:
    """A classifier of pictures, wherever it comes from.

    answers: to images (N, S, S, 3) uint8.
    class_names: K names.
    image_size: S.
    doubt: what its held-out pictures taught; None if nothing did.
    """

    answers: Callable[[NDArray[np.uint8]], Answers]
    class_names: tuple[str, ...]
    image_size: int
    doubt: Doubt | None = None


@dataclass(frozen=True)
class Prediction:
    """The answer to one picture: probabilities (K,), or why there is none.

    familiarity: of the picture, if that can be told.
    """

    path: Path
    probabilities: NDArray[np.floating] | None
    problem: str | None = None
    familiarity: float | None = None

    def top(self, class_names: tuple[str, ...], count: int) -> list[tuple[str, float]]:
        """The most probable classes, most probable first."""
        p = np.empty(0) if self.probabilities is None else self.probabilities
        order = np.argsort(-p, kind="stable")[:count]
        return [(class_names[k], float(p[k])) for k in order]


def run_predictor(run: "Run", weights: str = "kept", views: str = "single") -> Predictor:
    """The network of a run, as trained.

    Args:
        views: of each picture, see `logits_of`. `unsure` takes those of `shift` where the single
            view is less sure than for three quarters of the held-out pictures, so that no answer
            hangs on what else is asked. The temperature is that of single views, and these tell
            what is familiar.

    Raises:
        UserError: the run has no such weights, or held out nothing that says what is unsure.
    """
    from normlab.evaluation import held_out
    from normlab.evaluation.familiarity import answers_of, familiarity
    from normlab.evaluation.forward import UNSURE, logits_of, see_again

    model = run.model(weights)
    doubt, means = held_out.read(run, weights) or (None, None)
    temperature = 1.0 if doubt is None else doubt.temperature
    least = 0.0  # probability with which a single view is sure
    if views == "unsure":
        if doubt is None:
            raise UserError(
                f"no held-out pictures say which answers of run {run.path} by its {weights} "
                "weights are unsure: choose views flip or shift"
            )
        least = float(np.quantile(doubt.probability, UNSURE))

    def answers(images: NDArray[np.uint8]) -> Answers:
        features = None
        if views in ("single", "unsure") or means is not None:
            logits, features = answers_of(model, images)
        if views == "unsure":
            sure = (logits.double() / temperature).softmax(1).amax(1)
            see_again(model, images, logits, (sure < least).nonzero()[:, 0])
        elif views != "single":
            logits = logits_of(model, images, views=views)
        near = None if means is None or features is None else familiarity(features, means)
        probabilities: NDArray[np.floating] = (logits.double() / temperature).softmax(1).numpy()
        return probabilities, near

    return Predictor(answers, run.task.class_names, run.task.image_size, doubt)


def is_model(path: str | Path) -> bool:
    """Whether `path` names a model and not pictures: a run's folder, or a name in .onnx."""
    return Path(path).suffix.lower() == ".onnx" or (Path(path) / "recipe.json").is_file()


def open_predictor(
    path: str | Path | None = None, weights: str = "kept", views: str = "single"
) -> Predictor:
    """The classifier at `path`: a run's folder or an exported ONNX file; by default the latest run.

    Args:
        weights: of a run; see `normlab.runs.Run.model`.
        views: of each picture, by a run; see `run_predictor`.

    Raises:
        UserError: there is none, it is damaged or of another kind, or has no such weights or views.
    """
    if path is None or Path(path).suffix.lower() != ".onnx":
        from normlab.runs import open_run  # with PyTorch, which an ONNX file does not need

        return run_predictor(open_run(path), weights, views)
    if weights != "kept":
        raise UserError(f"{path} holds one set of weights: leave out --weights {weights}")
    require_single(path, views)
    from normlab.formats.onnx_model import open_onnx

    return onnx_predictor(open_onnx(path), path)


def onnx_predictor(model: "OnnxModel", where: object) -> Predictor:
    """An exported file's network, by single views.

    Raises:
        DataError: what it says of its held-out pictures is not as `normlab export` wrote it.
    """
    doubt = doubt_of(model.metadata, where)
    return Predictor(model.answers, model.class_names, model.image_size, doubt)


def require_single(path: str | Path, views: str) -> None:
    """Refuse other views of an exported file, whose graph makes none.

    Raises:
        UserError: other views.
    """
    if views != "single":
        raise UserError(f"{path} answers single views: leave out --views, or name its run")


def doubt_of(metadata: Mapping[str, Any], where: object) -> Doubt | None:
    """What an exported file's metadata say of its held-out pictures.

    Raises:
        DataError: it is not as `normlab export` wrote it.
    """
    told = metadata.get("doubt")
    return None if told is None else Doubt.from_dict(told, where)


def predict(
    predictor: Predictor, paths: Iterable[str | Path], batch_size: int = BATCH_SIZE
) -> Iterator[Prediction]:
    """Classify the pictures at `paths` and in the folders among them, in order, lazily.

    Each file gives one `Prediction`, and so does a bad one and what cannot be reached. Files are
    decoded on all cores, at most `batch_size` at a time, exactly as for training.
    """
    found = _files(paths)
    with Readers() as readers:
        while batch := list(islice(found, batch_size)):
            yield from _predict_batch(predictor, batch, readers)


def _predict_batch(predictor: Predictor, batch: list[Found], readers: Readers) -> list[Prediction]:
    reachable = [file.path for file in batch if file.problem is None]
    read = readers.read(reachable, predictor.image_size)
    decoded: list[tuple[NDArray[np.uint8] | None, str]] = []
    for file in batch:
        if file.problem is not None:
            decoded.append((None, file.problem))
        else:
            pixels, _, problem = next(read)
            decoded.append((pixels, problem))
    good = [pixels for pixels, _ in decoded if pixels is not None]
    rows, near = predictor.answers(np.stack(good)) if good else (np.empty((0, 0)), None)
    known = iter(zip(rows, [None] * len(rows) if near is None else near.tolist(), strict=True))
    found = []
    for file, (pixels, problem) in zip(batch, decoded, strict=True):
        if pixels is None:
            found.append(Prediction(file.path, None, problem))
        else:
            row, familiarity = next(known)
            if np.isfinite(row).all():
                found.append(Prediction(file.path, row, familiarity=familiarity))
            else:
                found.append(Prediction(file.path, None, "the network answers with NaN"))
    return found


def _files(paths: Iterable[str | Path]) -> Iterator[Found]:
    """Named files as they are; of folders, everything below them but litter."""
    for path in map(Path, paths):
        if path.is_dir():
            yield from walk(path)
        else:
            yield Found(path)
