"""The random draws: pure, independent of everything but their arguments, and random enough."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsnap.data.draws import FIXED_SPLIT, HELD_OUT, KEPT, crops_and_flips, permutation, shuffled

SEEDS = st.integers(0, 2**64 - 1)
EPOCHS = st.integers(0, 10**6)
PERMUTATION = [2, 5, 9, 7, 3, 0, 6, 8, 4, 1]
OFFSETS = [[4, 7], [1, 8], [7, 0], [1, 0], [1, 1]]
FLIPS = [True, False, False, False, True]


@given(SEEDS, EPOCHS, st.integers(0, 300))
def test_permutation_visits_every_image_once(seed, epoch, n):
    order = permutation(seed, epoch, n)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(n))


@given(SEEDS, EPOCHS, st.integers(0, 8), st.booleans())
def test_draws_of_an_image_do_not_depend_on_how_many_there_are(seed, epoch, padding, flip):
    few_offsets, few_flips = crops_and_flips(seed, epoch, 20, padding, flip)
    offsets, flips = crops_and_flips(seed, epoch, 333, padding, flip)
    assert offsets.shape == (333, 2)
    assert np.array_equal(offsets[:20], few_offsets)
    assert np.array_equal(flips[:20], few_flips)
    assert offsets.min() >= 0
    assert offsets.max() <= 2 * padding


def test_draws_are_the_same_in_every_version():
    """Runs could not be repeated or resumed by a later version if these changed."""
    assert permutation(7, 3, 10).tolist() == PERMUTATION
    offsets, flips = crops_and_flips(7, 3, 5, 4, True)
    assert offsets.tolist() == OFFSETS
    assert flips.tolist() == FLIPS


def test_seeds_epochs_and_purposes_are_different_streams():
    orders = [permutation(0, 0, 1000), permutation(1, 0, 1000), permutation(0, 1, 1000)]
    orders += [shuffled(0, purpose, 0, 1000) for purpose in (HELD_OUT, KEPT, FIXED_SPLIT)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).sum() < 10  # about 1 is expected
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.15


def test_offsets_and_flips_are_uniform_and_independent():
    n, padding = 90_000, 4
    offsets, flips = crops_and_flips(0, 0, n, padding, True)
    cells = np.bincount(offsets[:, 0] * 9 + offsets[:, 1], minlength=81)
    expected = n / 81
    assert ((cells - expected) ** 2 / expected).sum() < 130  # chi-square, 80 degrees of freedom, p = 0.0003
    assert abs(flips.mean() - 0.5) < 0.007  # 4 standard deviations
    assert np.abs(np.corrcoef([*offsets.T, flips]) - np.eye(3)).max() < 0.014
    later_offsets, later_flips = crops_and_flips(0, 1, n, padding, True)
    assert abs(np.corrcoef(flips, later_flips)[0, 1]) < 0.014
    assert abs(np.corrcoef(offsets[:, 0], later_offsets[:, 0])[0, 1]) < 0.014


def test_every_position_of_the_order_is_equally_likely():
    places = np.array([np.flatnonzero(permutation(seed, 0, 50) == 17)[0] for seed in range(2000)])
    assert abs(places.mean() - 24.5) < 1.3  # 4 standard deviations
    assert np.bincount(places, minlength=50).max() < 75  # 40 are expected


def test_no_flips_without_flip_and_no_offsets_without_padding():
    offsets, flips = crops_and_flips(0, 0, 1000, 0, False)
    assert not offsets.any()
    assert not flips.any()


@pytest.mark.parametrize(("seed", "epoch"), [(-1, 0), (2**64, 0), (0, -1), (0, 2**48)])
def test_seed_and_epoch_out_of_range_are_errors(seed, epoch):
    with pytest.raises(ValueError, match=r"(seed|epoch) must be between 0 and .*, got"):
        permutation(seed, epoch, 10)
