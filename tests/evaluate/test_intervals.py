"""Intervals cover what they claim to cover, in simulation with fixed seeds."""

import numpy as np
import pytest

from pbe.evaluate.metrics.frechet import frechet_distance
from pbe.evaluate.metrics.intervals import Estimate, bootstrap_mean, jackknife, over_seeds


def _photos(rng: np.random.Generator, clusters: int) -> tuple[np.ndarray, list[str]]:
    """Values with mean 0, 1 to 9 items per photo, half of the variance shared within a photo."""
    index = np.repeat(np.arange(clusters), rng.integers(1, 10, clusters))
    return rng.standard_normal(clusters)[index] + rng.standard_normal(len(index)), [f"photo{i}" for i in index]


def test_bootstrap_covers_over_photos_where_items_do_not() -> None:
    by_photo = by_item = 0
    for seed in range(200):
        values, groups = _photos(np.random.default_rng(seed), 50)
        whole = bootstrap_mean(values, groups=groups, resamples=300, seed=seed)
        naive = bootstrap_mean(values, groups=None, resamples=300, seed=seed)
        by_photo += whole.low <= 0 <= whole.high
        by_item += naive.low <= 0 <= naive.high
    assert 0.89 <= by_photo / 200 <= 0.99
    assert by_item / 200 < 0.8  # the reason for groups


def test_level_is_the_coverage() -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal(2000)
    estimate = bootstrap_mean(values, groups=None, resamples=4000, seed=0, level=0.8)
    half_width = 1.2816 * values.std() / np.sqrt(2000)
    assert (estimate.low, estimate.high) == pytest.approx(
        (values.mean() - half_width, values.mean() + half_width), abs=0.1 * half_width
    )
    assert "80%" in estimate.method


def test_bootstrap_keeps_the_weight_of_a_crowded_photo() -> None:
    """Photo a has 9 items of value 1, photo b one of value 0: draws are aa, ab, ba, bb with means 1, .9, .9,
    0.
    """
    values, groups = np.array([1.0] * 9 + [0.0]), ["a"] * 9 + ["b"]
    estimate = bootstrap_mean(values, groups=groups, resamples=2000, seed=0, level=0.4)
    assert estimate.value == pytest.approx(0.9)
    assert (estimate.low, estimate.high) == pytest.approx((0.9, 0.9))
    wide = bootstrap_mean(values, groups=groups, resamples=2000, seed=0)
    assert (wide.low, wide.high) == pytest.approx((0, 1))
    assert (wide.n, wide.clusters) == (10, 2)
    assert "2 photos" in wide.method


def test_bootstrap_is_a_function_of_its_arguments() -> None:
    values, groups = _photos(np.random.default_rng(1), 10)
    first = bootstrap_mean(values, groups=groups, resamples=100, seed=3)
    assert first == bootstrap_mean(values, groups=groups, resamples=100, seed=3)
    assert first != bootstrap_mean(values, groups=groups, resamples=100, seed=4)
    order = np.random.default_rng(2).permutation(len(values))
    shuffled = bootstrap_mean(values[order], groups=[groups[i] for i in order], resamples=100, seed=3)
    assert (shuffled.low, shuffled.high) == pytest.approx((first.low, first.high))
    assert first.low < first.value < first.high


def test_bootstrap_refuses_bad_input() -> None:
    good = np.arange(4.0)
    with pytest.raises(ValueError, match="at least 2"):
        bootstrap_mean(good, groups=["a"] * 4, resamples=10, seed=0)
    with pytest.raises(ValueError, match="at least 2"):
        bootstrap_mean(good[:0], groups=None, resamples=10, seed=0)
    with pytest.raises(ValueError, match="finite"):
        bootstrap_mean(np.array([1.0, np.inf]), groups=None, resamples=10, seed=0)
    with pytest.raises(ValueError, match="3 groups for 4 values"):
        bootstrap_mean(good, groups=["a", "b", "c"], resamples=10, seed=0)
    with pytest.raises(ValueError, match="resamples"):
        bootstrap_mean(good, groups=None, resamples=1, seed=0)
    with pytest.raises(ValueError, match="level"):
        bootstrap_mean(good, groups=None, resamples=10, seed=0, level=95)


@pytest.mark.parametrize("n", [5, 30, 31])
def test_jackknife_of_a_mean_is_its_standard_error(n: int) -> None:
    """For a mean the delete-d formula gives s / sqrt(n) for every d, odd n included."""
    values = np.random.default_rng(0).standard_normal(n)
    estimate = jackknife(lambda rows: float(values[rows].mean()), n, groups=None, resamples=4000, seed=0)
    half_width = 1.95996 * values.std(ddof=1) / np.sqrt(n)
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.high - estimate.value == pytest.approx(half_width, rel=0.05)
    assert estimate.value - estimate.low == pytest.approx(estimate.high - estimate.value)
    assert (estimate.n, estimate.clusters) == (n, n)


SPECTRUM = 1 / np.sqrt(1 + np.arange(16))


def _rows(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, 16)) * SPECTRUM


def test_jackknife_covers_a_frechet_distance_where_the_bootstrap_does_not() -> None:
    real, n, trials = _rows(100, 0), 60, 40
    expected = np.mean([frechet_distance(1.2 * _rows(n, seed), real) for seed in range(10_000, 10_200)])
    covered = bootstrap_above = 0
    for seed in range(1, trials + 1):
        edits = 1.2 * _rows(n, seed)

        def distance(rows: np.ndarray, edits: np.ndarray = edits) -> float:
            return frechet_distance(edits[rows], real)

        estimate = jackknife(distance, n, groups=None, resamples=25, seed=seed)
        covered += bool(estimate.low <= expected <= estimate.high)
        rng = np.random.default_rng(seed)
        resampled = [distance(rng.integers(n, size=n)) for _ in range(25)]
        bootstrap_above += bool(np.quantile(resampled, 0.025) > estimate.value)
    assert 0.88 <= covered / trials <= 1
    assert bootstrap_above / trials > 0.5  # beside its own point estimate: the reason for the jackknife


def test_jackknife_refuses_bad_input() -> None:
    with pytest.raises(ValueError, match="at least 4"):
        jackknife(lambda rows: 0.0, 3, groups=None, resamples=10, seed=0)
    with pytest.raises(ValueError, match="level"):
        jackknife(lambda rows: 0.0, 10, groups=None, resamples=10, seed=0, level=1.0)


def test_jackknife_leaves_out_whole_photos_and_covers_where_items_do_not() -> None:
    """The mean again: its standard error over photos is that of a cluster bootstrap."""
    by_photo = by_item = 0
    for seed in range(200):
        values, groups = _photos(np.random.default_rng(seed), 50)

        def mean(rows: np.ndarray, values: np.ndarray = values) -> float:
            return float(values[rows].mean())

        whole = jackknife(mean, len(values), groups=groups, resamples=60, seed=seed)
        naive = jackknife(mean, len(values), groups=None, resamples=60, seed=seed)
        assert (whole.n, whole.clusters) == (len(values), 50)
        by_photo += whole.low <= 0 <= whole.high
        by_item += naive.low <= 0 <= naive.high
    assert 0.89 <= by_photo / 200 <= 0.99
    assert by_item / 200 < 0.8


def test_jackknife_keeps_or_drops_a_photo_as_one() -> None:
    groups = ["a", "b", "a", "c", "d", "b"]
    seen: list[np.ndarray] = []

    def note(rows: np.ndarray) -> float:
        seen.append(rows)
        return 0.0

    jackknife(note, 6, groups=groups, resamples=30, seed=0)
    for rows in seen[1:]:
        kept = {groups[row] for row in rows}
        assert len(kept) == 2 and [row for row in range(6) if groups[row] in kept] == rows.tolist()
    with pytest.raises(ValueError, match="5 groups for 6 rows"):
        jackknife(lambda rows: 0.0, 6, groups=groups[:5], resamples=10, seed=0)
    with pytest.raises(ValueError, match="3 photos: a delete-half jackknife needs at least 4"):
        jackknife(lambda rows: 0.0, 6, groups=list("aabbcc"), resamples=10, seed=0)


def test_over_seeds_covers_a_mean_whose_items_and_seeds_both_vary() -> None:
    """Value of seed s: mean of the items (shared) + noise of the seed; three seeds."""

    def estimate_of(items: np.ndarray, noise: float, trial: int) -> Estimate:
        return jackknife(lambda rows: float(items[rows].mean()) + noise, 60, groups=None, resamples=60, seed=trial)

    covered = naive = 0
    for trial in range(400):
        rng = np.random.default_rng(trial)
        items = rng.standard_normal(60)
        estimates = [estimate_of(items, noise, trial) for noise in 0.3 * rng.standard_normal(3)]
        both = over_seeds(estimates)
        assert both.value == pytest.approx(np.mean([e.value for e in estimates]))
        covered += both.low <= 0 <= both.high
        naive += estimates[0].low <= 0 <= estimates[0].high
    assert 0.9 <= covered / 400 <= 0.995
    assert naive / 400 < 0.8  # one seed's interval says nothing of the other seeds


def test_over_seeds_leaves_one_alone_and_refuses_other_items() -> None:
    one = Estimate(1.0, 0.5, 1.5, 10, 5, "m")
    assert over_seeds([one]) is one
    twice = over_seeds([one, one])
    assert (twice.low, twice.high) == pytest.approx((0.5, 1.5)) and "2 seeds" in twice.method
    with pytest.raises(ValueError, match="no estimates"):
        over_seeds([])
    with pytest.raises(ValueError, match="different items"):
        over_seeds([one, Estimate(1.0, 0.5, 1.5, 11, 5, "m")])
