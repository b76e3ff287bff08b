"""Intervals for reported numbers: bootstrap for means, delete-d jackknife for other statistics.

Sources: Efron and Tibshirani 1993, chapter 13 (percentile bootstrap); Davison and Hinkley 1997, section 3.8
(whole clusters); Shao and Wu 1989 (delete-d jackknife).

A bootstrap sample repeats rows, which shrinks a covariance's support: for a Frechet distance the interval misses the
point estimate (in one trial: point 3.85, bootstrap 95 % [6.59, 7.72]). Subsets without replacement have no repeats, and
their spread around their own mean is free of the bias of fewer rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Protocol

import numpy as np
from scipy.special import stdtrit

MIN_GROUPS = 4  # photos or items; with fewer a delete-half jackknife is meaningless
DRAWS_AT_ONCE = 1 << 20  # of a bootstrap, which bounds memory


class SetStatistic(Protocol):
    """A number of a set of features, such as its Frechet distance to a reference."""

    def __call__(self, features: np.ndarray) -> float:
        """Return the number of features (N, d)."""
        ...

    def of_rows(self, features: np.ndarray) -> Callable[[np.ndarray], float]:
        """Prepare features (N, d) once; return a function that maps row indices (n,) to the number of those rows.

        To rounding as a call with `features[rows]`, and many times as fast: for resampling.
        """
        ...


@dataclass(frozen=True)
class Estimate:
    """A number with its interval. `method` names what was resampled, and how.

    n: number of items; clusters: number of resampled units (n if items are resampled).
    """

    value: float
    low: float
    high: float
    n: int
    clusters: int
    method: str


def bootstrap_mean(
    values: np.ndarray, *, groups: Sequence[str] | None, resamples: int, seed: int, level: float = 0.95
) -> Estimate:
    """Return the mean of values (N,) with a percentile bootstrap interval.

    groups: the photo of each item; whole photos are then resampled, since the errors of one photo's items are
    correlated. A resample's mean is the ratio sum of values / number of items over the photos drawn, so a photo with
    many items keeps its weight. With few photos the interval is too narrow (simulated: at level 0.95 it covers about
    86 % with 8 photos, 91 % with 20, 94 % with 40). It covers the choice of items, not the training seed.
    Raises ValueError for fewer than 2 clusters, non-finite values, or groups of the wrong length.
    """
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError("values must be (N,) and finite")
    if groups is not None and len(groups) != len(values):
        raise ValueError(f"{len(groups)} groups for {len(values)} values")
    _check(resamples=resamples, level=level)
    sums: np.ndarray
    counts: np.ndarray
    if groups is None:
        sums, counts = values.astype(np.float64), np.ones(len(values))
    else:
        _, index = np.unique(np.asarray(groups), return_inverse=True)
        sums, counts = np.bincount(index, weights=values), np.bincount(index).astype(np.float64)
    clusters = len(sums)
    if clusters < 2:
        raise ValueError(f"{clusters} cluster: an interval needs at least 2")
    rng = np.random.default_rng(seed)
    at_once = max(1, DRAWS_AT_ONCE // clusters)
    means = np.empty(resamples)
    for start in range(0, resamples, at_once):
        drawn = rng.integers(clusters, size=(min(at_once, resamples - start), clusters))
        means[start : start + at_once] = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    unit = "items" if groups is None else "photos"
    return Estimate(
        value=float(sums.sum() / counts.sum()),
        low=float(low),
        high=float(high),
        n=len(values),
        clusters=clusters,
        method=f"{level:.0%} percentile bootstrap of {clusters} {unit}, {resamples} resamples",
    )


def jackknife(
    statistic: Callable[[np.ndarray], float],
    n: int,
    *,
    groups: Sequence[str] | None,
    resamples: int,
    seed: int,
    level: float = 0.95,
) -> Estimate:
    """Return statistic(all n rows) with a delete-d jackknife interval, for statistics other than means.

    statistic: maps int64 row indices (sorted, no repeats) to a number; called resamples + 1 times. groups: the photo of
    each row; whole photos are then left out, since the errors of one photo's items are correlated.

    With theta_s the statistic on all but d of the G groups (of the rows, without groups), drawn without replacement,
    d = G // 2: se^2 = (G - d) / d * mean_s (theta_s - mean theta_s)^2, interval = value -+ z se.
    d is half because a small d makes the spread noisy and, below sqrt(n), inconsistent for such statistics.
    Simulated on Frechet distances (n, dimensions): the true sd 0.027 (350, 64), 0.075 (111, 256), 0.070 (100,
    1280) is estimated as 0.026, 0.075, 0.069 with n // 2 and as 0.031, 0.070, 0.055 with n // 10.
    The interval is for the expectation at this n: it does not remove a Frechet distance's bias at finite n, and it is
    not clipped at 0. Data held by `statistic` (the real photos) counts as fixed.
    Raises ValueError for fewer than MIN_GROUPS groups or groups of the wrong length.
    """
    names = np.arange(n) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    if len(names) != n:
        raise ValueError(f"{len(names)} groups for {n} rows")
    clusters = int(names.max()) + 1 if n else 0
    unit = "items" if groups is None else "photos"
    if clusters < MIN_GROUPS:
        raise ValueError(f"{clusters} {unit}: a delete-half jackknife needs at least {MIN_GROUPS}")
    _check(resamples=resamples, level=level)
    rng = np.random.default_rng(seed)
    deleted = clusters // 2
    kept = clusters - deleted
    value = float(statistic(np.arange(n)))
    thetas = np.empty(resamples)
    for i in range(resamples):
        chosen = np.zeros(clusters, bool)
        chosen[rng.choice(clusters, size=kept, replace=False)] = True
        thetas[i] = statistic(np.flatnonzero(chosen[names]))
    se = float(np.sqrt(kept / deleted * thetas.var()))
    half_width = NormalDist().inv_cdf((1 + level) / 2) * se
    return Estimate(
        value=value,
        low=value - half_width,
        high=value + half_width,
        n=n,
        clusters=clusters,
        method=f"{level:.0%} normal interval, delete-{deleted} jackknife of {clusters} {unit} without replacement, "
        f"{resamples} subsets; bias at this n not removed",
    )


def over_seeds(estimates: Sequence[Estimate], *, level: float = 0.95) -> Estimate:
    """Combine estimates of the same items that differ in the seed of the edits' noise.

    The value is the mean. The variance is the sum of two parts: the mean of the estimates' own variances (the items),
    which more seeds do not shrink, and the sample variance of their S values over S (the seeds). The quantile is
    Student's with Welch-Satterthwaite degrees of freedom, taking the items' part as known. Returns a single estimate
    unchanged. Raises ValueError for none, or for estimates of different items.
    """
    if not estimates:
        raise ValueError("no estimates to combine")
    first = estimates[0]
    if len(estimates) == 1:
        return first
    if any((other.n, other.clusters) != (first.n, first.clusters) for other in estimates):
        raise ValueError("the seeds' estimates are of different items")
    normal = NormalDist().inv_cdf((1 + level) / 2)
    values = np.array([estimate.value for estimate in estimates])
    of_items = float(np.mean([((e.high - e.low) / (2 * normal)) ** 2 for e in estimates]))
    of_seeds = float(values.var(ddof=1)) / len(values)
    total = of_items + of_seeds
    freedom = (len(values) - 1) * (total / of_seeds) ** 2 if of_seeds > 0 else np.inf
    half_width = float(stdtrit(freedom, (1 + level) / 2)) * float(np.sqrt(total))
    return Estimate(
        value=float(values.mean()),
        low=float(values.mean()) - half_width,
        high=float(values.mean()) + half_width,
        n=first.n,
        clusters=first.clusters,
        method=f"{first.method}; with the spread of {len(values)} seeds of the noise",
    )


def _check(*, resamples: int, level: float) -> None:
    if resamples < 2:
        raise ValueError(f"resamples {resamples} must be at least 2")
    if not 0 < level < 1:
        raise ValueError(f"level {level} must be between 0 and 1")
