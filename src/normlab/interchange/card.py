"""The model card: a `README.md` beside an exported model."""

import json
import os
from pathlib import Path

from normlab.core.places import check_regular
from normlab.errors import UserError
from normlab.evaluation.evaluation import Evaluation
from normlab.interchange import companions
from normlab.interchange.certificate import Certificate
from normlab.runs import Run
from normlab.text import html, markdown, printable

NAME = "README.md"
_MARK = "<!-- normlab's model card of {file} -->"


def _mark(model: Path) -> str:
    return _MARK.format(file=html(model.name))


def check_place(model: Path) -> None:
    """Refuse to write over somebody's model or README, or over the files beside another model.

    Raises:
        UserError: such a file is beside `model`.
    """
    ours = {NAME: _mark(model)}
    folder = model.parent
    alone = model.suffix == ".html" and not os.path.lexists(model.with_name(NAME))
    if alone and folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{str(folder)!r} has files in it: choose a folder of its own for --out")
    if os.path.lexists(model) and not os.path.lexists(model.with_name(NAME)):
        raise UserError(
            f"{str(model)!r} is there, without a card that says normlab wrote it: choose another "
            "--out, or move it away"
        )
    if model.suffix == ".onnx":
        ours |= dict.fromkeys(companions.NAMES, companions.mark(model.name))
    for name, mark in ours.items():
        path = model.with_name(name)
        if not os.path.lexists(path):
            continue
        check_regular(path)
        with open(path, encoding="utf-8", errors="replace") as f:
            first = f.readline(500).rstrip("\n")
        if first != mark:
            what = "the card of" if name == NAME else "what normlab wrote for"
            raise UserError(
                f"{str(path)!r} is there and not {what} {model.name}: "
                "choose a folder of its own for --out"
            )


def card(
    model: Path,
    run: Run,
    evaluation: Evaluation,
    certificate: Certificate,
    unfolded: tuple[str, ...],
) -> str:
    """Write the card as Markdown: how to use the model, data, recipe, scores, limits.

    Names of classes, files and settings are text in it, whatever they hold.
    """
    task, recipe = run.task, run.task.recipe
    low, high = evaluation.interval
    settings = ", ".join(
        f"{k} {markdown(str(v))}" for k, v in recipe.settings().items() if v is not None
    )
    usage, taken = _FORMS[model.suffix]
    names = ", ".join(map(markdown, task.class_names))
    size = task.image_size
    rows = [
        ("test images", f"{len(evaluation.labels):,}"),
        ("accuracy", f"{evaluation.accuracy:.4f} (95 % interval {low:.4f} to {high:.4f})"),
        ("balanced accuracy", f"{evaluation.balanced_accuracy:.4f}"),
        ("loss (mean cross-entropy, nats)", f"{evaluation.loss:.4f}"),
        ("expected calibration error", _calibrated(evaluation)),
    ]
    by_class = zip(evaluation.class_names, evaluation.class_accuracy, strict=True)
    rows += [(f"accuracy on {markdown(name)}", f"{accuracy:.3f}") for name, accuracy in by_class]
    return "\n".join(
        [
            _mark(model),
            f"# {markdown(model.name)}",
            "",
            f"An image classifier for {len(task.class_names)} classes: {names}.",
            "",
            "## Use",
            "",
            *([taken.format(size=size, classes=len(task.class_names)), ""] if taken else []),
            usage.format(
                file=json.dumps(printable(model.name)),
                size=size,
                names=json.dumps(list(task.class_names)),
            ),
            "## Data and recipe",
            "",
            f"Data: {markdown(Path(task.data).name)} (SHA-256 {task.data_sha256}).",
            "",
            f"Recipe: {settings}; seed {task.seed}."
            + (f" Started from {markdown(str(task.start.published()))}." if task.start else ""),
            "",
            "## Scores",
            "",
            "The interval covers the choice of test images. It does not cover the choice of seed.",
            "",
            "| score | value |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows),
            "",
            "## Limits",
            "",
            *(f"- {limit}" for limit in evaluation.limits),
            f"- {_when_sure(evaluation, certificate, tells_unlike=model.suffix != '.keras')}",
            "",
            "## Certificate",
            "",
            f"Compared with the run it came from, on {_of(certificate, evaluation)} test images, "
            f"by {certificate.checked_with}: {certificate}.",
            "",
            *(f"- {markdown(sentence)}." for sentence in unfolded),
            f"- Weights: SHA-256 {certificate.weights_sha256}.",
            "",
        ]
    )


def _of(certificate: Certificate, evaluation: Evaluation) -> str:
    count, all_of_them = certificate.test_images, len(evaluation.labels)
    return f"all {count:,}" if count == all_of_them else f"{count:,} of {all_of_them:,}"


_TAKES = "It takes `images`, uint8 RGB, 0 to 255, "
_GIVES = (
    ". It returns probabilities (N, {classes}) in the order of the classes above. "
    "Pictures must be decoded as in training: turned upright, white under transparency."
)
_ONNX_TAKES = (
    f"{_TAKES}of shape (N, H, W, 3): one picture of any size, or N of one size. Taking the middle "
    f"square, resizing it to {{size}} × {{size}} and scaling are inside{_GIVES}"
)
_KERAS_TAKES = (
    f"{_TAKES}of shape (N, {{size}}, {{size}}, 3): the middle square, resized to {{size}} × "
    f"{{size}} with antialiasing. The scaling is inside{_GIVES}"
)


def _calibrated(evaluation: Evaluation) -> str:
    if evaluation.doubt is None:
        return f"{evaluation.calibration.error:.4f}"
    return (
        f"{evaluation.before.error:.4f} without the temperature {evaluation.temperature:.3f}, "
        f"{evaluation.after.error:.4f} with it"
    )


def _when_sure(evaluation: Evaluation, certificate: Certificate, *, tells_unlike: bool) -> str:
    doubt = evaluation.doubt
    if doubt is None:
        return "It always answers with one of its classes, whatever the picture shows."
    if certificate.cost is not None:
        return (
            f"Its probabilities have the temperature {doubt.temperature:.3f}, from held-out "
            "pictures. When to doubt an answer was not measured in eight bits: it always gives one."
        )
    told = (
        f"Its probabilities have the temperature {doubt.temperature:.3f}, from held-out pictures."
    )
    if tells_unlike and evaluation.familiarity is not None and doubt.tells_unlike:
        told += (
            f" Below a `familiarity` of {doubt.least_familiarity:.4f}, which 5 % of pictures like "
            "its own have, a picture is unlike those it was trained on: do not trust the answer. "
            "Above it, it may still show something else."
        )
    return told


_ONNX_USE = """```console
pip install -r requirements.txt
python predict.py picture.jpg
```

```python
from predict import answer  # in this folder

classes, doubt = answer("picture.jpg")  # [(class, probability), …], most probable first
```

The file predict.py is all that it takes: decoding as in training, and one call of ONNX Runtime.
"""

_KERAS_USE = """```python
import keras
import numpy as np
from PIL import Image, ImageOps

CLASSES = {names}


def read(path):
    picture = ImageOps.exif_transpose(Image.open(path))
    if picture.mode.startswith("I"):
        raise ValueError("more than 8 bits a channel: save it with 8")
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    square = ImageOps.fit(picture.convert("RGB"), ({size}, {size}), Image.Resampling.BICUBIC)
    return np.asarray(square)[None]


model = keras.models.load_model({file})
probabilities = model.predict(read("picture.png"))[0]
print(CLASSES[probabilities.argmax()], probabilities.max())
```
"""

_WEB_USE = """Open `index.html`: by a double click, or from any server of files. It needs JavaScript
and connects to nothing; the network runs in the browser. The folder holds all of it, with the
licence of the runtime in `LICENSE-onnxruntime.txt`.
"""

_FORMS = {
    ".onnx": (_ONNX_USE, _ONNX_TAKES),
    ".keras": (_KERAS_USE, _KERAS_TAKES),
    ".html": (_WEB_USE, ""),
}
