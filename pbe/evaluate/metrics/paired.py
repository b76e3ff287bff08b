"""Is one run better than another on the same bench? Differences on the same items, with an interval and a p-value.

Sources: sign-flip and swap permutation tests (Good 2005, chapter 3); delete-d jackknife as in intervals.py.
Items of one photo are correlated: whole photos are resampled, flipped and swapped.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pbe.evaluate.metrics.intervals import Estimate, SetStatistic, bootstrap_mean, jackknife

ROUNDING = 1e-6  # of what is compared: float32 features of one picture differ by so much between batches


@dataclass(frozen=True)
class Paired:
    """difference: first minus second. p_value: two-sided, of no difference; 1 for a run against itself."""

    difference: Estimate
    p_value: float
    test: str


def common_items(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """Return the bench ids of both runs, in the first one's order. Raises ValueError if there are none."""
    theirs = set(second)
    common = [bench_id for bench_id in first if bench_id in theirs]
    if not common:
        raise ValueError("the runs have no item in common")
    return common


def paired_means(
    first: np.ndarray, second: np.ndarray, *, image_ids: Sequence[str], resamples: int, seed: int
) -> Paired:
    """Compare per-item values (N,) in the same order of items; the test flips signs of whole photos' differences.

    Raises ValueError as bootstrap_mean does.
    """
    differences = first - second
    estimate = bootstrap_mean(differences, groups=image_ids, resamples=resamples, seed=seed)
    _, index = np.unique(np.asarray(image_ids), return_inverse=True)
    sums = np.bincount(index, weights=differences)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(resamples, len(sums)))
    close = ROUNDING * float(np.abs(first).sum() + np.abs(second).sum())
    p_value = _p_value(abs(sums.sum()), np.abs(signs @ sums), close)
    return Paired(estimate, p_value, f"sign flips of photos, {resamples}")


def paired_sets(
    statistic: SetStatistic,
    first: Sequence[np.ndarray],
    second: Sequence[np.ndarray],
    *,
    image_ids: Sequence[str],
    resamples: int,
    seed: int,
) -> Paired:
    """Compare a statistic of features (N, d), such as a Frechet distance, averaged over noise seeds.

    Both runs have the same order of items; the run with fewer seeds cycles through them.
    Interval: jackknife of the difference, both on the same subsets. p-value: swaps whole photos between the runs.
    """
    ours, theirs = ([statistic.of_rows(features) for features in of] for of in (first, second))

    def difference(rows: np.ndarray) -> float:
        return _mean_of(ours, rows) - _mean_of(theirs, rows)

    n = len(first[0])
    estimate = jackknife(difference, n, groups=image_ids, resamples=resamples, seed=seed)
    # of a pair, one below the other, item i is row i of the first run and row n + i of the second
    seeds = range(max(len(first), len(second)))
    both = [statistic.of_rows(np.concatenate([first[i % len(first)], second[i % len(second)]])) for i in seeds]
    _, index = np.unique(np.asarray(image_ids), return_inverse=True)
    rng = np.random.default_rng(seed)
    swapped = np.empty(resamples)
    for i in range(resamples):
        swap = (rng.random(index.max() + 1) < 0.5)[index]
        one = np.arange(n) + n * swap
        swapped[i] = abs(_mean_of(both, one) - _mean_of(both, np.arange(n) + n * ~swap))
    close = ROUNDING * abs(_mean_of(ours, np.arange(n)))
    return Paired(estimate, _p_value(abs(estimate.value), swapped, close), f"swaps of photos, {resamples}")


def _mean_of(statistics: Sequence[Callable[[np.ndarray], float]], rows: np.ndarray) -> float:
    return float(np.mean([statistic(rows) for statistic in statistics]))


def _p_value(found: float, drawn: np.ndarray, close: float) -> float:
    """Return the share of draws at least as far from 0, counting the run itself, so that it is never 0.

    close: differences up to this count as equal.
    """
    return float((1 + np.sum(drawn >= found - close)) / (1 + len(drawn)))
