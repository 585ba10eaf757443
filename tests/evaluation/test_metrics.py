"""How many answers are right, counted in one pass or by PyTorch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from normlab import kernels
from normlab.evaluation.metrics import count_right, right


@pytest.mark.skipif(not kernels.available(), reason="no compiled kernels here")
@given(rows=st.integers(0, 40), classes=st.integers(1, 12), seed=st.integers(0, 99))
def test_counting_in_one_pass_is_pytorchs(rows: int, classes: int, seed: int) -> None:
    """Of equals the first counts, and NaN is larger than all."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, 4, (rows, classes), generator=generator).float()
    logits[logits == 0] = float("nan")
    labels = torch.randint(0, classes, (rows,), generator=generator)
    expected = int(right(logits, labels).sum())
    assert kernels.right(logits, labels) == count_right(logits, labels) == expected
    with kernels.disabled():
        assert count_right(logits, labels) == expected


def test_labels_that_lie_apart_are_counted() -> None:
    labels = torch.arange(10)[::2]
    logits = torch.nn.functional.one_hot(torch.tensor([0, 2, 5, 6, 8]), 10).float()
    assert count_right(logits, labels) == 4
