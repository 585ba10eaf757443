"""The attacks on the server of `make attack`, in short and at length."""

from pathlib import Path
from random import Random

import pytest

from attack.server import attacks


@pytest.mark.soak
def test_no_attack_does_harm(tmp_path: Path) -> None:
    cases = list(attacks(tmp_path, Random(0), tries=1))
    assert [case for case in cases if case.survived < case.tried] == []
    assert all(case.tried for case in cases)


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", [1, 2])
def test_no_attack_does_harm_at_length(tmp_path: Path, seed: int) -> None:
    cases = list(attacks(tmp_path, Random(seed), tries=60))
    assert [case for case in cases if case.survived < case.tried] == []
