"""A run against itself, against a shifted one, and the size of the test where nothing differs."""

import numpy as np
import pytest

from pbe.evaluate.frechet import feature_statistics, frechet_to_reference
from pbe.evaluate.paired import paired_means, paired_sets, refuse_other_items

PHOTOS = [f"p{i // 3}" for i in range(60)]


def _values(seed: int) -> np.ndarray:
    """Items of one photo err together."""
    rng = np.random.default_rng(seed)
    return np.repeat(rng.standard_normal(20), 3) + 0.5 * rng.standard_normal(60)


def test_a_run_against_itself_differs_by_nothing() -> None:
    values = _values(0)
    same = paired_means(values, values, photos=PHOTOS, resamples=200, seed=0)
    assert (same.difference.value, same.difference.low, same.difference.high, same.p_value) == (0, 0, 0, 1)
    features = np.random.default_rng(0).standard_normal((60, 5))
    distance = frechet_to_reference(feature_statistics(np.random.default_rng(1).standard_normal((80, 5))))
    sets = paired_sets(distance, features, features, photos=PHOTOS, resamples=50, seed=0)
    assert (sets.difference.value, sets.difference.low, sets.difference.high, sets.p_value) == (0, 0, 0, 1)


def test_a_shift_is_found_and_its_sign_is_first_minus_second() -> None:
    values = _values(1)
    shifted = paired_means(values + 0.5, values, photos=PHOTOS, resamples=999, seed=0)
    assert shifted.difference.value == pytest.approx(0.5) and shifted.p_value == pytest.approx(0.001)
    assert shifted.difference.clusters == 20
    features = np.random.default_rng(2).standard_normal((60, 5))
    distance = frechet_to_reference(feature_statistics(np.random.default_rng(3).standard_normal((300, 5))))
    worse = paired_sets(distance, features + 1.0, features, photos=PHOTOS, resamples=99, seed=0)
    assert worse.difference.low > 0 and worse.p_value == pytest.approx(0.01)


def test_where_nothing_differs_one_test_in_twenty_says_so() -> None:
    """And one that flips items, not photos, would say it far more often: the reason for photos."""
    by_photo = by_item = 0
    for seed in range(200):
        first, second = _values(2 * seed), _values(2 * seed + 1)
        by_photo += paired_means(first, second, photos=PHOTOS, resamples=199, seed=seed).p_value <= 0.05
        items = [str(i) for i in range(60)]
        by_item += paired_means(first, second, photos=items, resamples=199, seed=seed).p_value <= 0.05
    assert 0.01 <= by_photo / 200 <= 0.1
    assert by_item / 200 > 0.12


def test_the_interval_of_a_difference_of_distances_covers_and_is_sharper_than_two_of_its_own() -> None:
    rng = np.random.default_rng(4)
    distance = frechet_to_reference(feature_statistics(rng.standard_normal((200, 4))))
    photos = [str(i) for i in range(50)]

    def pair() -> tuple[np.ndarray, np.ndarray]:
        common = rng.standard_normal((50, 4))
        return 1.3 * common + 0.2 * rng.standard_normal((50, 4)), 1.2 * common + 0.2 * rng.standard_normal((50, 4))

    expected = np.mean([distance(first) - distance(second) for first, second in (pair() for _ in range(800))])
    covered = 0
    for seed in range(60):
        first, second = pair()
        found = paired_sets(distance, first, second, photos=photos, resamples=40, seed=seed).difference
        covered += found.low <= expected <= found.high
    assert 0.85 <= covered / 60 <= 1


def test_other_items_are_refused_by_name() -> None:
    refuse_other_items(["a", "b"], ["a", "b"])
    with pytest.raises(ValueError, match="only one of them has b, c"):
        refuse_other_items(["a", "b"], ["a", "c"])
    with pytest.raises(ValueError, match="and 4 more"):
        refuse_other_items(list("abcdefghi"), [])
    with pytest.raises(ValueError, match="not in the same order"):
        refuse_other_items(["a", "b"], ["b", "a"])
