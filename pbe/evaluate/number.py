"""One number of the result table: a mean over items or a statistic of a set, with its interval by photo."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pbe.evaluate.metrics.intervals import Estimate, bootstrap_mean, jackknife, over_seeds
from pbe.evaluate.settings import StatisticsConfig

OfRows = Callable[[np.ndarray], float]  # a statistic of some rows of a set, by their indices


@dataclass(frozen=True)
class Score:
    """One number. per_item: (N,), mean over seeds, where the number is a mean: for paired tests. extractor: "" for
    pixels. chance: the number's expectation for fills that tell nothing of their reference, where that is known.
    """

    metric: str
    extractor: str
    estimate: Estimate
    per_item: np.ndarray | None
    chance: float | None = None


def mean_score(
    metric: str,
    extractor: str,
    values: np.ndarray,
    image_ids: Sequence[str],
    cfg: StatisticsConfig,
    *,
    chance: float | None = None,
) -> Score:
    """The mean of values (N,) with a bootstrap interval. image_ids: image id of each item."""
    estimate = bootstrap_mean(values, groups=image_ids, resamples=cfg.resamples, seed=cfg.seed)
    return Score(metric, extractor, estimate, values, chance)


def set_estimate(
    statistic: Callable[[np.ndarray], OfRows],
    sets: Sequence[np.ndarray],
    image_ids: Sequence[str],
    cfg: StatisticsConfig,
) -> Estimate:
    """A statistic of a whole set of features, such as a Frechet distance, by a jackknife: per seed, then over seeds.

    statistic: maps one seed's features (N, d) to the statistic of its rows.
    """
    return over_seeds(
        [
            jackknife(statistic(features), len(features), groups=image_ids, resamples=cfg.subsets, seed=cfg.seed)
            for features in sets
        ]
    )


def of_rows(statistic: Callable[[np.ndarray], float]) -> Callable[[np.ndarray], OfRows]:
    """Turn a statistic of features into one of their rows."""
    return lambda features: lambda rows: statistic(features[rows])
