"""Resampling is fast: whole sets are prepared once. Each test has the plain loop that it must equal."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from pbe.evaluate.metrics import intervals, mmd
from pbe.evaluate.metrics.cmmd import cmmd_to_reference
from pbe.evaluate.metrics.frechet import SVD_SIDE, feature_statistics, frechet_to_features, frechet_to_reference
from pbe.evaluate.metrics.intervals import SetStatistic, bootstrap_mean, jackknife
from pbe.evaluate.metrics.kid import kid_to_reference
from pbe.evaluate.metrics.paired import ROUNDING, paired_sets

PHOTOS = [f"p{i // 3}" for i in range(40)]
SEEDS_OF_EDITS = 2


def _features(n: int, d: int, seed: int) -> np.ndarray:
    """(n, d) as features of pictures are: above 0, correlated, a third of the rows twice."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((d, d)) / np.sqrt(1 + np.arange(d))[:, None]
    features = np.maximum(0.3 + 0.2 * rng.standard_normal((n, d)) @ mixing, 0)
    features[: n // 3] = features[n // 3 : 2 * (n // 3)]
    return features


@pytest.mark.parametrize(("groups", "at_once"), [(PHOTOS, 1 << 20), (PHOTOS, 100), (None, 1 << 20), (None, 7)])
def test_bootstrap_draws_as_one_by_one(
    groups: Sequence[str] | None, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intervals, "DRAWS_AT_ONCE", at_once)
    values = np.random.default_rng(0).standard_normal(40)
    index = np.unique(groups, return_inverse=True)[1] if groups else np.arange(40)
    sums, counts, rng = np.bincount(index, weights=values), np.bincount(index), np.random.default_rng(5)
    means = []
    for _ in range(500):
        drawn = rng.integers(len(sums), size=len(sums))
        means.append(sums[drawn].sum() / counts[drawn].sum())
    found = bootstrap_mean(values, groups=groups, resamples=500, seed=5)
    assert (found.low, found.high) == tuple(np.quantile(means, [0.025, 0.975]))


@pytest.mark.parametrize(
    ("n", "m", "d"),
    [(40, 30, 200), (40, 300, 200), (200, 20, 64), (200, 500, 64), (SVD_SIDE + 90, 700, SVD_SIDE + 20)],
    ids=["few of both", "few edits", "few real", "many of both", "by Gram matrices"],
)
def test_distances_of_rows_are_those_of_a_set_of_them(n: int, m: int, d: int) -> None:
    features, real = _features(n, d, 0), 1.1 * _features(m, d, 1)
    rng = np.random.default_rng(2)
    # squaring, in Gram matrices, halves the digits of what is small
    tolerance = 1e-6 if min(n, m, d) > SVD_SIDE else 1e-10
    statistics: list[SetStatistic] = [
        frechet_to_reference(feature_statistics(real)),
        frechet_to_features(real),
        kid_to_reference(real),
        cmmd_to_reference(real),
    ]
    for statistic in statistics:
        of_rows = statistic.of_rows(features)
        for rows in (np.arange(n), np.sort(rng.choice(n, n // 2, replace=False)), np.array([n // 3, n - 1])):
            assert of_rows(rows) == pytest.approx(statistic(features[rows]), rel=tolerance)
        with pytest.raises(ValueError, match="1 feature row"):
            of_rows(np.array([3]))
        with pytest.raises(ValueError, match=f"the reference has {d} dimensions"):
            statistic.of_rows(features[:, :4] + 1)
        with pytest.raises(ValueError, match="not all finite"):
            statistic.of_rows(np.full((5, d), np.nan))


@pytest.mark.parametrize("to_reference", [kid_to_reference, cmmd_to_reference])
def test_a_set_whose_kernel_matrix_would_be_too_large_is_measured_anew(
    to_reference: Callable[[np.ndarray], SetStatistic], monkeypatch: pytest.MonkeyPatch
) -> None:
    features, distance, rows = _features(40, 8, 0), to_reference(_features(30, 8, 1)), np.arange(0, 40, 3)
    whole = distance.of_rows(features)(rows)
    monkeypatch.setattr(mmd, "MATRIX_ROWS", 39)
    assert distance.of_rows(features)(rows) == pytest.approx(whole, rel=1e-10)


def _swaps(
    statistic: Callable[[np.ndarray], float], pairs: Sequence[tuple[np.ndarray, np.ndarray]], resamples: int
) -> list[float]:
    """Differences after swapping whole photos, each of newly made sets."""
    index, rng, found = np.unique(PHOTOS, return_inverse=True)[1], np.random.default_rng(7), []
    for _ in range(resamples):
        swap = (rng.random(index.max() + 1) < 0.5)[index][:, None]
        ours = np.mean([statistic(np.where(swap, b, a)) for a, b in pairs])
        theirs = np.mean([statistic(np.where(swap, a, b)) for a, b in pairs])
        found.append(abs(float(ours - theirs)))
    return found


@pytest.mark.parametrize("theirs_seeds", [1, SEEDS_OF_EDITS])
def test_paired_sets_equal_their_definition(theirs_seeds: int) -> None:
    common = _features(40, 100, 1)
    first = [common + 0.05 * _features(40, 100, 2 + seed) for seed in range(SEEDS_OF_EDITS)]
    second = [common + 0.05 * _features(40, 100, 9 + seed) for seed in range(theirs_seeds)]
    statistic = frechet_to_reference(feature_statistics(_features(60, 100, 0)))

    def difference(rows: np.ndarray) -> float:
        return float(np.mean([statistic(of[rows]) for of in first]) - np.mean([statistic(of[rows]) for of in second]))

    expected = jackknife(difference, 40, groups=PHOTOS, resamples=30, seed=7)
    pairs = [(first[seed], second[seed % theirs_seeds]) for seed in range(SEEDS_OF_EDITS)]
    drawn = np.array(_swaps(statistic, pairs, 30))
    close = ROUNDING * np.mean([statistic(of) for of in first])
    found = paired_sets(statistic, first, second, image_ids=PHOTOS, resamples=30, seed=7)
    for name in ("value", "low", "high"):
        assert getattr(found.difference, name) == pytest.approx(getattr(expected, name), rel=1e-9)
    assert 1 < np.sum(drawn >= abs(expected.value) - close) < 30  # else nothing is compared
    assert found.p_value == (1 + np.sum(drawn >= abs(expected.value) - close)) / 31
