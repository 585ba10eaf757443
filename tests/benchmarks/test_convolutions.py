"""Times and errors of the ways to compute a convolution."""

import pytest

from benchmarks import convolutions
from normlab import kernels


@pytest.mark.skipif(not kernels.has_bfloat16(), reason="no AVX512-BF16 here")
def test_each_way_is_timed_and_its_error_is_that_of_its_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(convolutions, "ROUNDS", 1)
    rows = convolutions.measure((3, 32, 32, 8))
    assert len(rows) == 2 * len(convolutions.WAYS)
    for row in rows:
        assert row["milliseconds"] > 0
        if "bfloat16" in row["way"]:
            assert 1e-3 < row["error"] < 2e-2
        else:
            assert 1e-8 < row["error"] < 1e-5
    lines = convolutions.table_of(rows).splitlines()
    assert lines[2].startswith("| 3, 32 → 32, 8 × 8 | convolution | ")
    assert len(lines) == 4
