"""A model card holds names as text, whatever they are."""

import re
from pathlib import Path

import numpy as np
import pytest

from normlab.errors import DataError
from normlab.evaluation.evaluation import assess
from normlab.interchange.card import card, check_place
from normlab.interchange.certificate import certify
from normlab.recipes import get
from normlab.runs import Run, Task

NAMES = ("cat | 99 %", "[free](https://example.com)", "<img src=x>", "a\n# b\x1b", "\udcff`")


def write_card(model: Path, data: str = "sample") -> str:
    task = Task(
        recipe=get("fast79"), seed=0, data=data, data_sha256="0" * 64, class_names=NAMES,
        image_size=32,
    )  # fmt: skip
    labels = np.arange(len(NAMES))
    logits = np.eye(len(NAMES))
    common = {"data": "d", "class_names": NAMES, "limits": ("limit",)}
    evaluation = assess(logits, labels, run="r", weights="last", **common)  # type: ignore[arg-type]
    certificate = certify(
        logits, logits, labels, data="d", data_sha256="0", weights_sha256="0", checked_with="c"
    )
    return card(model, Run(Path("r"), task), evaluation, certificate, ())


def test_names_are_neither_links_nor_cells_nor_headings_of_a_card(tmp_path: Path) -> None:
    text = write_card(tmp_path / 'm"*.onnx', data="x](y) <b>")
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    bare = re.sub(r"\\.", "", outside).replace("`images`", "")
    assert not re.search(r"\]\(|<img|<b>|`", bare)
    assert "\x1b" not in text
    assert [line for line in text.split("\n") if line.startswith("# ")] == [r'# m"\*.onnx']
    rows = [line for line in bare.split("\n") if line.startswith("|")]
    assert {row.count("|") for row in rows} == {3}
    keras = write_card(tmp_path / 'm"*.keras')
    assert r'load_model("m\"*.keras")' in keras


def test_a_card_is_known_by_its_first_line_and_is_no_link(tmp_path: Path) -> None:
    model = tmp_path / "a--> <b>.onnx"
    beside = tmp_path / "README.md"
    beside.write_bytes(write_card(model).encode("utf-8", "backslashreplace"))
    check_place(model)
    beside.rename(tmp_path / "other")
    beside.symlink_to("other")
    with pytest.raises(DataError, match="a link"):
        check_place(model)
