"""A run against itself, against a shifted one, and the size of the test where nothing differs."""

import numpy as np
import pytest

from pbe.evaluate.metrics.frechet import feature_statistics, frechet_to_reference
from pbe.evaluate.metrics.paired import common_items, paired_means, paired_sets

PHOTOS = [f"p{i // 3}" for i in range(60)]


def _values(seed: int) -> np.ndarray:
    """Items of one photo err together."""
    rng = np.random.default_rng(seed)
    return np.repeat(rng.standard_normal(20), 3) + 0.5 * rng.standard_normal(60)


def test_a_run_against_itself_differs_by_nothing() -> None:
    values = _values(0)
    same = paired_means(values, values, image_ids=PHOTOS, resamples=200, seed=0)
    assert (same.difference.value, same.difference.low, same.difference.high, same.p_value) == (0, 0, 0, 1)
    features = np.random.default_rng(0).standard_normal((60, 5))
    distance = frechet_to_reference(feature_statistics(np.random.default_rng(1).standard_normal((80, 5))))
    sets = paired_sets(distance, [features], [features], image_ids=PHOTOS, resamples=50, seed=0)
    assert (sets.difference.value, sets.difference.low, sets.difference.high, sets.p_value) == (0, 0, 0, 1)


def test_a_shift_is_found_and_its_sign_is_first_minus_second() -> None:
    values = _values(1)
    shifted = paired_means(values + 0.5, values, image_ids=PHOTOS, resamples=999, seed=0)
    assert shifted.difference.value == pytest.approx(0.5) and shifted.p_value == pytest.approx(0.001)
    assert shifted.difference.clusters == 20
    features = np.random.default_rng(2).standard_normal((60, 5))
    distance = frechet_to_reference(feature_statistics(np.random.default_rng(3).standard_normal((300, 5))))
    worse = paired_sets(distance, [features + 1.0], [features], image_ids=PHOTOS, resamples=99, seed=0)
    assert worse.difference.low > 0 and worse.p_value == pytest.approx(0.01)


def test_where_nothing_differs_one_test_in_twenty_says_so() -> None:
    """And one that flips items, not photos, would say it far more often: the reason for photos."""
    by_photo = by_item = 0
    for seed in range(200):
        first, second = _values(2 * seed), _values(2 * seed + 1)
        by_photo += paired_means(first, second, image_ids=PHOTOS, resamples=199, seed=seed).p_value <= 0.05
        items = [str(i) for i in range(60)]
        by_item += paired_means(first, second, image_ids=items, resamples=199, seed=seed).p_value <= 0.05
    assert 0.01 <= by_photo / 200 <= 0.1
    assert by_item / 200 > 0.12


def test_the_interval_of_a_difference_of_distances_covers_and_is_sharper_than_two_of_its_own() -> None:
    rng = np.random.default_rng(4)
    distance = frechet_to_reference(feature_statistics(rng.standard_normal((200, 4))))
    image_ids = [str(i) for i in range(50)]

    def pair() -> tuple[np.ndarray, np.ndarray]:
        common = rng.standard_normal((50, 4))
        return 1.3 * common + 0.2 * rng.standard_normal((50, 4)), 1.2 * common + 0.2 * rng.standard_normal((50, 4))

    expected = np.mean([distance(first) - distance(second) for first, second in (pair() for _ in range(800))])
    covered = 0
    for seed in range(60):
        first, second = pair()
        found = paired_sets(distance, [first], [second], image_ids=image_ids, resamples=40, seed=seed).difference
        covered += bool(found.low <= expected <= found.high)
    assert 0.85 <= covered / 60 <= 1


def test_the_same_pictures_looked_at_in_other_batches_differ_by_nothing() -> None:
    """float32 features of one picture differ in their last bits with the pictures beside it."""
    rng = np.random.default_rng(5)
    values, features = 0.4 + 0.01 * _values(0), rng.standard_normal((60, 5))
    assert paired_means(values + 1e-7 * rng.random(60), values, image_ids=PHOTOS, resamples=200, seed=0).p_value == 1
    distance = frechet_to_reference(feature_statistics(rng.standard_normal((80, 5))))
    again = features + 1e-8 * rng.random((60, 5))
    assert paired_sets(distance, [again], [features], image_ids=PHOTOS, resamples=50, seed=0).p_value == 1


def test_several_seeds_are_compared_by_their_mean() -> None:
    rng = np.random.default_rng(6)
    distance = frechet_to_reference(feature_statistics(rng.standard_normal((80, 5))))
    first, second = ([rng.standard_normal((60, 5)) + shift for _ in range(3)] for shift in (1.0, 0.0))
    found = paired_sets(distance, first, second, image_ids=PHOTOS, resamples=60, seed=0)
    expected = np.mean([distance(one) for one in first]) - np.mean([distance(one) for one in second])
    assert found.difference.value == pytest.approx(expected, rel=1e-12) and found.p_value < 0.05
    single = paired_sets(distance, first, second[:1], image_ids=PHOTOS, resamples=60, seed=0)  # a baseline has no noise
    assert single.difference.value == pytest.approx(
        np.mean([distance(one) for one in first]) - distance(second[0]), rel=1e-12
    )


def test_runs_are_compared_on_the_items_that_both_have() -> None:
    assert common_items(["c", "a", "b"], ["a", "d", "c"]) == ["c", "a"]
    with pytest.raises(ValueError, match="no item in common"):
        common_items(["a"], ["b"])
