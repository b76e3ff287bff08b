"""Is one run better than another on the same bench? Differences on the same items, with an interval and a p-value.

Sources: sign-flip and swap permutation tests (Good 2005, chapter 3); delete-d jackknife as pbe/evaluate/intervals.py.
Items of one photo err together: whole photos are resampled, flipped and swapped.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pbe.evaluate.intervals import Estimate, bootstrap_mean, jackknife

_NAMED = 5  # items that an error names


@dataclass(frozen=True)
class Paired:
    """difference: first minus second. p_value: two-sided, of no difference; 1 for a run against itself."""

    difference: Estimate
    p_value: float
    test: str


def refuse_other_items(first: Sequence[str], second: Sequence[str]) -> None:
    """Raises ValueError naming the bench ids that only one run has."""
    alone = sorted(set(first) ^ set(second))
    if alone:
        listed = ", ".join(alone[:_NAMED]) + (f" and {len(alone) - _NAMED} more" if len(alone) > _NAMED else "")
        raise ValueError(f"the runs were not scored on the same items; only one of them has {listed}")
    if list(first) != list(second):
        raise ValueError("the runs' items are not in the same order")


def paired_means(first: np.ndarray, second: np.ndarray, *, photos: Sequence[str], resamples: int, seed: int) -> Paired:
    """Of per-item values (N,), in the same order. Flips the sign of whole photos' differences.

    Raises ValueError as bootstrap_mean does.
    """
    differences = first - second
    estimate = bootstrap_mean(differences, groups=photos, resamples=resamples, seed=seed)
    _, index = np.unique(np.asarray(photos), return_inverse=True)
    sums = np.bincount(index, weights=differences)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(resamples, len(sums)))
    return Paired(estimate, _p_value(abs(sums.sum()), np.abs(signs @ sums)), f"sign flips of photos, {resamples}")


def paired_sets(
    statistic: Callable[[np.ndarray], float],
    first: np.ndarray,
    second: np.ndarray,
    *,
    photos: Sequence[str],
    resamples: int,
    seed: int,
) -> Paired:
    """Of a statistic of features (N, d), such as a Frechet distance, in the same order of items.

    Interval: jackknife of the difference, both on the same subsets. p-value: whole photos change sides.
    """
    estimate = jackknife(
        lambda rows: statistic(first[rows]) - statistic(second[rows]),
        len(first),
        groups=photos,
        resamples=resamples,
        seed=seed,
    )
    _, index = np.unique(np.asarray(photos), return_inverse=True)
    rng = np.random.default_rng(seed)
    swapped = np.empty(resamples)
    for i in range(resamples):
        swap = (rng.random(index.max() + 1) < 0.5)[index][:, None]
        swapped[i] = abs(statistic(np.where(swap, second, first)) - statistic(np.where(swap, first, second)))
    return Paired(estimate, _p_value(abs(estimate.value), swapped), f"swaps of photos, {resamples}")


def _p_value(found: float, drawn: np.ndarray) -> float:
    """The share of draws at least as far from 0; the run itself counts as one, so that it is never 0."""
    close = 1e-12 * max(1.0, found)  # equal but for rounding is equal
    return float((1 + np.sum(drawn >= found - close)) / (1 + len(drawn)))
