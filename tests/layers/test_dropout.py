"""Dropout's draws: the published generator, in parts as a whole, compiled as in NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normlab import kernels
from normlab.core.streams import stream
from normlab.errors import UserError
from normlab.kernels import NONE_DROPPED, Drops
from normlab.layers import Dropout, relu_dropout
from normlab.layers.dropout import PartGenerator, draws

KEYS = st.integers(0, 2**63 - 1)


def test_words_are_those_of_the_published_generator() -> None:
    """The first of SplitMix64 for the seed 1234567, as its authors' program prints them."""
    words = draws(Drops(key=1234567), 20).view(np.uint64)
    assert words.tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@given(key=KEYS, first=st.integers(0, 9), values=st.integers(0, 50_000))
@settings(max_examples=50, deadline=None)
def test_draws_of_a_part_are_those_of_the_whole(key: int, first: int, values: int) -> None:
    whole = draws(Drops(key), first + values)
    np.testing.assert_array_equal(draws(Drops(key, first), values), whole[first:])


@pytest.mark.skipif(not kernels.available(), reason="no compiled kernels here")
@given(key=KEYS, first=st.integers(0, 9), rows=st.integers(1, 40), columns=st.integers(1, 140))
@settings(max_examples=100, deadline=None)
def test_compiled_draws_are_numpys(key: int, first: int, rows: int, columns: int) -> None:
    drops, z = Drops(key, first, 20_000, 1.5), torch.ones(rows, columns)
    kept = draws(drops, rows * columns).reshape(rows, columns) >= 20_000
    expected = torch.from_numpy(1.5 * kept).float()
    assert torch.equal(kernels.relu_dropout(z, drops), expected)
    assert torch.equal(kernels.relu_dropout_moments(z, (len(z), z.shape[1], 1), drops)[0], expected)


def test_the_share_that_is_dropped_is_the_rate_and_the_mean_stays() -> None:
    x, dropout = torch.ones(1000, 1000), Dropout(0.2)
    y = dropout(x, stream(0, "dropout"))
    sigma = (0.2 * 0.8 / x.numel()) ** 0.5
    assert abs(float((y == 0).double().mean()) - 0.2) < 4 * sigma
    assert abs(float(y.double().mean()) - 1) < 4 * sigma / 0.8
    for axis in (0, 1):  # neither rows nor columns share a draw
        shares = (y == 0).double().mean(axis)
        assert 0.8 < float(shares.var() / (0.2 * 0.8 / 1000)) < 1.2


def test_layers_of_a_step_and_steps_have_draws_of_their_own() -> None:
    x, dropout, rng = torch.ones(100, 100), Dropout(0.5), stream(0, "dropout", 1)
    masks = [dropout(x, rng) > 0, dropout(x, rng) > 0, dropout(x, stream(0, "dropout", 2)) > 0]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert abs(float((masks[a] == masks[b]).double().mean()) - 0.5) < 0.02
    assert torch.equal(dropout(x, stream(0, "dropout", 1)) > 0, masks[0])


def test_nothing_is_drawn_where_nothing_is_dropped() -> None:
    rng = stream(0, "dropout")
    assert Dropout(0).drops(10, rng) is NONE_DROPPED
    assert Dropout(0.5).eval().drops(10, None) is NONE_DROPPED
    assert rng.integers(1 << 60) == stream(0, "dropout").integers(1 << 60)
    with pytest.raises(UserError, match="generator"):
        Dropout(0.5).drops(10, None)


def test_a_profiler_may_note_the_arguments() -> None:
    dropout, rng = Dropout(0.2), stream(0, "dropout")
    assert max(dropout.drops(1, rng).key for _ in range(1000)) > 2**62
    with torch.profiler.profile(record_shapes=True):
        for _ in range(20):
            relu_dropout(torch.ones(8, 64), dropout, rng)


def test_a_part_without_images_has_no_draws() -> None:
    part = PartGenerator(stream(0, "dropout"), 3, 3)
    assert Dropout(0.5)(torch.empty(0, 4), part).shape == (0, 4)
