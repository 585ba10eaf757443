"""The table of `benchmarks.doctor_world`, and the faults that it plants."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.doctor_world import VECTOR_FAULTS, read, spoil, table


def row(form: str, fault: str = "", rule: str = "", **outcome: Any) -> dict[str, Any]:
    return {"architecture": "a", "form": form, "fault": fault, "rule": rule, **outcome}


def test_a_fault_counts_where_its_rule_says_more_than_of_the_healthy_network(
    tmp_path: Path,
) -> None:
    old = ["warning", "eps-matters", "bn1", "small"]
    new = ["warning", "eps-matters", "bn2", "small"]
    rows = [
        row("live", refused="not yet"),
        row("live", findings=[old]),  # tried again: the later line counts
        row("live", "x", "eps-matters", findings=[old, new]),
        row("live", "y", "eps-matters", findings=[old]),
        row("live", "z", "eps-matters", crashed="KeyError"),
        row("file", findings=[["serious", "stale", "bn1", "few"]]),
        row("graph", findings=[["serious", "no-normalizer", "model", "folded"]]),
        row("end"),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    lines = table(read(path)).splitlines()[2:]
    assert lines == [
        "| live | 1 | 2 | 1 | 1 | 0 | 1 | 0 | 0 | 1 |",
        "| file | 1 | 0 | 0 | 1 | 1 | 0 | 0 | 0 | 0 |",
        "| graph | 1 | 0 | 0 | 1 | 0 | 0 | 1 | 0 | 0 |",
        "| all | 1 | 2 | 1 | 3 | 1 | 1 | 1 | 0 | 1 |",
    ]


@pytest.mark.parametrize("fault", VECTOR_FAULTS)
def test_a_fault_changes_the_vectors(fault: str) -> None:
    before = np.full(4, 0.5), np.full(4, 0.3), np.full(4, 0.9)
    after = tuple(v.copy() for v in before)
    spoil(fault, *after)
    assert not all(np.array_equal(a, b) for a, b in zip(after, before, strict=True))
