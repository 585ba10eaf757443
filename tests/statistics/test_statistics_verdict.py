"""Verdicts, levels of looks, Holm's correction, the sentences, and their honesty in short form."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike

from normlab.errors import UserError
from normlab.statistics import Comparison, Contrast, holm, judge, level_of_look

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "verdict_honesty.py"


def verdict_of(differences: ArrayLike, look: int = 1, **options: float) -> Comparison:
    contrast = Contrast("batch", "none", differences)
    [comparison] = judge([contrast], look=look, generator=np.random.default_rng(0), **options)
    return comparison


SPREAD = np.array([-0.004, 0.003, -0.001, 0.002, -0.003, 0.003])


@pytest.mark.parametrize(
    ("differences", "look", "verdict"),
    [
        (SPREAD + 0.05, 1, "better"),
        (SPREAD - 0.05, 1, "worse"),
        (SPREAD, 1, "no_difference"),
        (SPREAD * 3, 1, "not_enough_seeds"),
        (SPREAD * 1.5 - 0.0035, 1, "not_enough_seeds"),  # beyond the margin on one side alone
        (0.0035 - SPREAD * 1.5, 1, "not_enough_seeds"),
        (SPREAD[:5] + 0.05, 1, "not_enough_seeds"),  # five pairs show nothing,
        (SPREAD[:5] / 100, 1, "not_enough_seeds"),  # not even that there is nothing
        (SPREAD + 0.05, 2, "not_enough_seeds"),  # nor do six on a second look
        (np.tile(SPREAD, 2) + 0.05, 2, "better"),
        (np.tile(SPREAD, 4) + 0.05, 3, "better"),  # by random flips
        (SPREAD / 10 + 0.002, 1, "better"),  # sure and small: the sign comes first
    ],
)
def test_verdicts(differences: np.ndarray, look: int, verdict: str) -> None:
    assert verdict_of(differences, look).verdict == verdict


@pytest.mark.parametrize("n", [1, 5, 6, 20, 24])
def test_all_zero_is_no_difference_where_any_could_have_been_seen(n: int) -> None:
    comparison = verdict_of(np.zeros(n))
    assert comparison.verdict == ("not_enough_seeds" if n < 6 else "no_difference")
    assert comparison.p_value == 1
    assert comparison.interval == ((-1, 1) if n < 6 else (0, 0))
    assert "scored the same in every pair" in comparison.sentence


def test_margin_decides_no_difference() -> None:
    assert verdict_of(SPREAD, margin=0.004).verdict == "no_difference"
    assert verdict_of(SPREAD, margin=0.001).verdict == "not_enough_seeds"
    with pytest.raises(UserError, match="margin is 0"):
        verdict_of(SPREAD, margin=0)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.lists(st.integers(-20, 40), min_size=7, max_size=7).map(lambda c: np.array(c) / 1000),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([1, 2]),
)
def test_verdict_interval_and_p_value_never_contradict(many: list[np.ndarray], look: int) -> None:
    contrasts = [Contrast("batch", str(arm), d) for arm, d in enumerate(many)]
    for result in judge(contrasts, look=look, generator=np.random.default_rng(0)):
        decided = result.verdict in ("better", "worse")
        lower, upper = result.interval
        assert decided == (lower > 0 or upper < 0)
        assert decided == (result.p_value <= level_of_look(look))
        assert lower - 1e-12 <= result.difference <= upper + 1e-12
        assert level_of_look(look) / len(many) <= result.level <= level_of_look(look)


def test_levels_of_looks_add_up_to_five_percent() -> None:
    levels = [level_of_look(look) for look in range(1, 60)]
    assert levels[:4] == [0.04, 0.005, 0.0025, 0.00125]
    assert sum(levels) == pytest.approx(0.05)
    with pytest.raises(UserError, match="look 0"):
        level_of_look(0)


def test_holm_by_hand() -> None:
    adjusted, levels = holm([0.01, 0.04, 0.03, 0.005], 0.05)
    # sorted 0.005·4, 0.01·3, 0.03·2, then 0.04·1, which may not fall below the one before
    assert adjusted == pytest.approx([0.03, 0.06, 0.06, 0.02])
    # 0.005 ≤ 0.05/4 and 0.01 ≤ 0.05/3, but 0.03 > 0.05/2 stops: 0.04 is judged there too
    assert levels == pytest.approx([0.05 / 3, 0.05 / 2, 0.05 / 2, 0.05 / 4])
    assert holm([0.04], 0.04) == ([0.04], [0.04])
    assert holm([0.9, 0.8], 0.05)[0] == [1.0, 1.0]
    assert holm([], 0.05) == ([], [])


def test_holm_can_take_a_verdict_away() -> None:
    sure, weak = np.tile(SPREAD, 2) + 0.05, (np.arange(-3, 9) + 0.25) / 100
    generator = np.random.default_rng(0)
    alone = judge([Contrast("a", "c", weak)], look=1, generator=generator)[0]
    assert 0.02 < alone.p_value <= 0.04
    assert alone.verdict == "better"
    two = [Contrast("a", "c", weak), Contrast("b", "c", weak)]
    for result in judge(two, look=1, generator=generator):
        assert (result.verdict, result.level) == ("not_enough_seeds", 0.02)
        assert result.p_unadjusted == alone.p_value
        assert result.p_value == pytest.approx(2 * alone.p_value)
    # behind a sure contrast the weak one keeps the whole level
    results = judge([two[0], Contrast("b", "c", sure)], look=1, generator=generator)
    assert [(r.verdict, r.level) for r in results] == [("better", 0.04), ("better", 0.02)]


def test_comparison_is_strict_json() -> None:
    record = json.loads(json.dumps(dataclasses.asdict(verdict_of([0.01])), allow_nan=False))
    assert record["interval"] == [-1, 1]
    wanted = "first other n difference interval p_value verdict diverged sentence"
    assert set(wanted.split()) <= set(record)


def test_sentences() -> None:
    assert verdict_of(SPREAD + 0.05).sentence == (
        "batch is better than none: +5.00 points of test accuracy, 96 % interval +4.60 to +5.30, "
        "p = 0.031, 6 pairs, look 1. "
        "This holds for these 6 seeds, this training set and this test set."
    )
    contrast = Contrast("batch", "none", [0.69], diverged=(0, 1))
    [single] = judge([contrast], look=2, generator=np.random.default_rng(0))
    assert single.sentence == (
        "1 pair cannot tell batch from none: +69.00 points of test accuracy, no 99.5 % interval "
        "from so few pairs, p = 1, 1 pair, look 2. "
        "Nothing can be shown at this level with fewer than 9 pairs. "
        "Diverged and counted at chance: 1 of 1 runs of none. "
        "This holds for this seed, this training set and this test set."
    )
    assert "Sure, but small: at most 0.5 points." in verdict_of(SPREAD / 10 + 0.002).sentence
    assert verdict_of(SPREAD).sentence.startswith("batch and none differ by at most 0.5 points: ")
    assert "too many looks" in verdict_of(np.full(24, 0.1), look=12).sentence


def test_simulated_studies_of_an_arm_with_itself_are_honest(tmp_path: Path) -> None:
    """The short form; docs/results/verdict-honesty.json holds 20,000 studies a cell."""
    out = tmp_path / "honesty.json"
    command = [sys.executable, str(BENCHMARK), "--studies", "100", "--jobs", "1", "--out", str(out)]
    subprocess.run(command, check=True, timeout=240, capture_output=True)
    report = json.loads(out.read_text())
    assert report["passed"]
    assert len(report["results"]) == 12
    for result in report["results"]:
        assert result["winner_named"] <= result["winner_limit"]
        assert result["all_intervals_cover"] >= result["coverage_limit"]
    assert any(result["winner_named"] > 0 for result in report["results"])
