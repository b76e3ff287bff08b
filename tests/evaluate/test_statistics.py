"""Frechet from mergeable statistics, and their files: right for any N and rank, whatever the order of merging."""

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg

from pbe.evaluate.metrics.frechet import (
    Card,
    StatisticsError,
    feature_statistics,
    frechet_distance,
    frechet_from_statistics,
    frechet_to_reference,
    merge,
    refuse_other_extractor,
    statistics_bytes,
    statistics_from_bytes,
)

CARD = Card("clip", "0123456789abcdef", "squash")


def _features(n: int, d: int, seed: int, decay: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((d, d))).Q
    return (rng.standard_normal((n, d)) / (1 + np.arange(d)) ** decay) @ basis + rng.random(d)


@pytest.mark.parametrize(("n", "m", "d"), [(200, 300, 16), (700, 900, 600), (20, 500, 40), (500, 20, 40), (12, 10, 64)])
@pytest.mark.parametrize("decay", [0.3, 2.0])
def test_all_ways_give_one_distance(n: int, m: int, d: int, decay: float) -> None:
    """Also beyond SVD_SIDE, where the Gram matrix is used, and with spectra over six decades."""
    a, b = _features(n, d, 0, decay), 1.1 * _features(m, d, 1, decay)
    whole = frechet_distance(a, b)
    assert frechet_to_reference(feature_statistics(b))(a) == pytest.approx(whole, rel=1e-6)
    statistics = frechet_from_statistics(feature_statistics(a), feature_statistics(b))
    assert statistics == pytest.approx(whole, rel=1e-6)


def test_the_gram_route_equals_the_textbook_formula() -> None:
    a, b = _features(900, 560, 2), 1.2 * _features(800, 560, 3)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    textbook = float(np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov_a + cov_b - 2 * root))
    assert frechet_distance(a, b) == pytest.approx(textbook, rel=1e-5)


@pytest.mark.parametrize("cuts", [[1], [500], [10, 11, 700], list(range(100, 1000, 100))])
def test_statistics_of_parts_merge_to_those_of_the_whole_in_any_order(cuts: list[int]) -> None:
    features = 1e3 + _features(1000, 24, 5)  # far from 0: sums of squares would cancel
    parts = [feature_statistics(part) for part in np.split(features, cuts)]
    whole = feature_statistics(features)
    for order in (parts, parts[::-1]):
        merged = order[0]
        for part in order[1:]:
            merged = merge(merged, part)
        assert merged.n == 1000
        np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12)
        np.testing.assert_allclose(merged.scatter, whole.scatter, rtol=1e-6, atol=1e-6 * np.abs(whole.scatter).max())
        other = feature_statistics(1e3 + _features(400, 24, 6))
        assert frechet_from_statistics(merged, other) == pytest.approx(frechet_from_statistics(whole, other), rel=1e-6)


def test_constant_features_have_a_distance_of_means_alone() -> None:
    a, b = np.full((5, 3), 2.0), np.full((9, 3), 1.0)
    assert frechet_distance(a, b) == pytest.approx(3.0)
    assert frechet_to_reference(feature_statistics(b))(a) == pytest.approx(3.0)


def test_bad_features_are_named() -> None:
    good = _features(5, 3, 0)
    bad = good.copy()
    bad[2, 1] = np.nan
    with pytest.raises(ValueError, match="not all finite: 1 of 5 rows, the first is row 2"):
        frechet_to_reference(feature_statistics(good))(bad)
    with pytest.raises(ValueError, match="needs at least 2"):
        frechet_to_reference(feature_statistics(good))(good[:1])
    with pytest.raises(ValueError, match="needs at least 2"):
        frechet_to_reference(feature_statistics(good[:1]))
    with pytest.raises(ValueError, match="the reference has 3 dimensions"):
        frechet_to_reference(feature_statistics(good))(good[:, :2])
    with pytest.raises(ValueError, match="cannot be merged"):
        merge(feature_statistics(good), feature_statistics(good[:, :2]))


def test_a_file_gives_back_what_was_saved_and_its_bytes_are_a_function_of_it() -> None:
    statistics = feature_statistics(_features(50, 6, 7))
    data = statistics_bytes(statistics, CARD)
    assert data == statistics_bytes(statistics, CARD)
    back, card = statistics_from_bytes(data, "x.npz")
    assert card == CARD and back.n == 50
    np.testing.assert_array_equal(back.scatter, statistics.scatter)


def test_a_damaged_or_foreign_file_is_refused(tmp_path: Path) -> None:
    statistics = feature_statistics(_features(50, 6, 7))
    data = statistics_bytes(statistics, CARD)
    flipped = bytearray(data)
    flipped[data.index(np.ascontiguousarray(statistics.mean).tobytes()) + 3] ^= 1
    for broken in (bytes(flipped), data[:100], b"", b"no archive"):
        with pytest.raises(StatisticsError, match=r"x\.npz: (damaged|not a file of feature statistics)"):
            statistics_from_bytes(broken, "x.npz")
    with pytest.raises(
        StatisticsError, match=r"by clip 0123456789abcdef \(squash\); the features to measure are by incep"
    ):
        refuse_other_extractor(CARD, Card("inception", "ff", "inside"), "x.npz")
    refuse_other_extractor(CARD, CARD, "x.npz")


def test_statistics_of_one_row_merge_but_have_no_covariance() -> None:
    rows = _features(3, 4, 8)
    merged = merge(merge(*(feature_statistics(row[None]) for row in rows[:2])), feature_statistics(rows[2:]))
    np.testing.assert_allclose(merged.covariance, np.cov(rows, rowvar=False))
