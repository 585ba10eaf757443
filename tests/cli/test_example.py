"""The notebook in examples/ runs, keeps outputs of all of CIFAR-10, and judges every sentence."""

import base64
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from PIL import Image

from scripts.run_example import EXAMPLE, execute

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
HEAD = ["The seed notebook", "is", "What was measured", "where"]

# Every sentence of the seed notebook that claims something, as it stands there. Its long ones are
# cut where a second claim begins; together the parts are the sentence.
SENTENCES = [
    "Distribution on each mini-batch keeps changing.",
    "In order to learn changed distribuition, model deviates a little from correct direction.",
    "Batch Normalization prevents the mean of weights on each batch from being biased toward "
    "+ or -,",
    "so that backpropagate weights smoothly.",
    "Batch Normalization is the concept of normalizing the output of the middle layer",
    "so that the next layer learns normalized output from the previous layer.",
    "BN(x_i) = γ · (x_i − μ_B) / √(σ_B² + ε)",
    "in keras: model.add(tf.keras.layers.BatchNormalization())",
    "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Coveriance Shift",
    "This improves accuracy on CIFAR10 learning (74% to 79%)",
]
# Its comments, settings and printed numbers that do so.
CODE = [
    "Length of train set: 50000",
    "# Unifying image size (reshape X_train, X_test)",
    "# Normalize pixel value in image",
    "# Label is already one-hot encoded",
    "# Batch Normalization",
    "epochs = 25",
    "Test accuracy: 0.7896000146865845",
]
PRIVATE = re.compile(
    r"/(home|root|tmp|work|usr|opt|var|Users|private)/|[A-Z]:\\|localhost|\w+://"
    r"|\b\d{1,3}(\.\d{1,3}){3}\b|\b(token|password|secret|api_?key)\b",
    re.IGNORECASE,
)


@pytest.fixture(scope="module")
def kept() -> nbformat.NotebookNode:
    return nbformat.read(EXAMPLE, as_version=4)


@pytest.mark.soak
def test_every_cell_runs_on_the_sample(tmp_path: Path) -> None:
    before = sorted(EXAMPLE.parent.rglob("*")), sorted(os.listdir(ROOT))
    ran = execute(tmp_path, DATA="sample", EPOCHS=1, PAIRS=2)
    assert (sorted(EXAMPLE.parent.rglob("*")), sorted(os.listdir(ROOT))) == before
    assert "ImageData('sample'" in text(ran)
    assert not private(ran)
    assert_nothing_went_wrong(ran)
    assert_the_table_is_whole(ran)


def test_a_failing_cell_fails(tmp_path: Path) -> None:
    from nbclient.exceptions import CellExecutionError

    with pytest.raises(CellExecutionError, match="not a data set"):
        execute(tmp_path, DATA="not a data set", EPOCHS=1, PAIRS=2)


def test_the_kept_outputs_are_of_all_of_cifar10(kept: nbformat.NotebookNode) -> None:
    cells = [cell for cell in kept.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert [cell.source for cell in cells if not cell.outputs] == [cells[0].source]
    assert 'DATA = "cifar10"' in cells[0].source
    for sign in (
        "ImageData('cifar10': 50,000 training and 10,000 test images",
        "45,000 training and 5,000 validation images",
        "N = 10,000",
        "of 10,000 test images",
    ):
        assert sign in text(kept)
    assert_nothing_went_wrong(kept)
    assert_the_table_is_whole(kept)
    assert EXAMPLE.stat().st_size < 1_500_000


def test_the_kept_pictures_show_something(kept: nbformat.NotebookNode) -> None:
    pictures = [o.data["image/png"] for o in outputs(kept) if "image/png" in o.get("data", {})]
    assert len(pictures) >= 6
    for picture in pictures:
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))).convert("L"))
        assert (pixels < 250).mean() > 0.01


def test_the_kept_file_says_nothing_of_the_machine(kept: nbformat.NotebookNode) -> None:
    assert not private(kept)
    assert kept.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert all(set(cell.metadata) <= {"tags"} for cell in kept.cells)


def test_the_quoted_figures_are_those_of_the_results(kept: nbformat.NotebookNode) -> None:
    table = markdown(kept)
    runs = [RESULTS / "notebook" / name for name in ("notebook-plain", "notebook")]
    runs += [RESULTS / "inside-notebook-25" / name for name in ("none", "batch")]
    scores = [read(run / "result.json")["test_accuracy"] for run in runs]
    assert f"{scores[0]:.4f} and {scores[1]:.4f}" in table
    assert f"{scores[2]:.4f} and {scores[3]:.4f}" in table
    for study in ("notebook-25-epochs", "notebook-5-epochs"):
        result = read(RESULTS / "studies" / study / "result.json")
        batch, none = (100 * arm["test_accuracy"] for arm in result["arms"])
        found = result["comparisons"][0]
        low, high = (100 * end for end in found["interval"])
        by = f"by {100 * found['difference']:.2f} points ({low:.2f} to {high:.2f})"
        assert f"{none:.2f} % and {batch:.2f} %, better {by}" in table
    for run in runs[:2]:
        lines = (run / "history.jsonl").read_text().splitlines()
        history = [json.loads(line) for line in lines]
        best, last = min(history, key=lambda row: row["val_loss"]), history[-1]
        assert f"epoch {best['epoch']} ({best['val_loss']:.3f}; " in table
        assert f"{best['val_accuracy']:.3f}) and {last['val_loss']:.3f}" in table
    arms = read(RESULTS / "landscape" / "landscape.json")["arms"]
    plain, batch = (
        {name: np.median(values, axis=1) for name, values in arms[arm].items()}
        for arm in ("none", "batch")
    )
    assert f"by {plain['change'].mean():.0f} times its norm" in table
    assert f"by {batch['change'].mean():.2f} times with it" in table
    cosines = f"{plain['agreement'].mean():.3f} and {batch['agreement'].mean():.3f}"
    assert cosines in table
    for arm, where in ((batch, "with it"), (plain, "without")):
        s = arm["smoothness"]
        assert f"{s.mean():.0f} ({s.min():.0f} to {s.max():.0f}) {where}" in table


def assert_nothing_went_wrong(notebook: nbformat.NotebookNode) -> None:
    for output in outputs(notebook):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text


def assert_the_table_is_whole(notebook: nbformat.NotebookNode) -> None:
    """Its rows are the sentences in their order; what its cell says is what it shows."""
    table = markdown(notebook)
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.strip().splitlines()]
    head, _, *body = [[cell.strip() for cell in row] for row in rows]
    assert head == HEAD
    assert [row[0] for row in body] == [*SENTENCES, *CODE]
    assert {row[1] for row in body} == {"true", "false", "imprecise"}
    assert all(len(row) == 4 and row[2] and row[3] for row in body)
    [cell] = [c for c in notebook.cells if "claims" in c.metadata.get("tags", [])]
    said = cell.source.split('"""')[1]
    for part in re.split(r"\{[^}]*\}", said):
        assert part in table


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]


def text(notebook: nbformat.NotebookNode) -> str:
    """All that the cells put out in letters."""
    found = []
    for output in outputs(notebook):
        data = output.get("data", {})
        found += [output.get("text", ""), *(v for k, v in data.items() if k != "image/png")]
    return "\n".join(found)


def private(notebook: nbformat.NotebookNode) -> re.Match[str] | None:
    return PRIVATE.search(text(notebook))


def markdown(notebook: nbformat.NotebookNode) -> str:
    [cell] = [c for c in notebook.cells if "claims" in c.metadata.get("tags", [])]
    shown: str = cell.outputs[0].data["text/markdown"]
    return shown
