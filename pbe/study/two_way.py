"""Intervals for numbers of answers that raters give about items, where both are samples.

Sources: McCullagh 2000, "Resampling and exchangeable arrays", Bernoulli 6(2); Owen 2007, "The pigeonhole bootstrap",
Annals of Applied Statistics 1(2); Owen and Eckles 2012, "Bootstrapping data arrays of arbitrary order", Annals of
Applied Statistics 6(3).

Raters are drawn with replacement, items too, and an answer counts as often as its rater times as often as its item. No
bootstrap is exact here (McCullagh); this one errs on the wide side: it counts the variance of single answers three
times. Simulated (`python -m tests.study.simulation`: rankings of 5 methods, effects of raters of sd 0.5 and of items of
sd 0.7 on the log strengths, 200 studies of each design), its 95 % intervals hold the true mean rank of

    95.0 %  in studies of 50 raters who each see all of 30 items (intervals from single answers: 44 %)
    96.2 %  of 12 raters who each see all of 30 items
    95.6 %  of 5 raters who each see all of 12 items
    98.2 %  of 20 raters who each see 10 of 30 items
    98.3 %  of 50 raters who each see 15 of 100 items
    99.9 %  of 50 raters who each see all of 30 items, if neither raters nor items have effects
"""

from collections.abc import Iterator

import numpy as np

ANSWERS_AT_ONCE = 4_000_000  # weights held in memory: 32 MB


class TooFewError(ValueError):
    """All answers are by one rater about one item."""


def resampled_weights(raters: np.ndarray, items: np.ndarray, *, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield weights (b, N) float64 of the N answers, in all `resamples` rows, none of which is all 0.

    raters, items: (N,) int, of each answer. A lone rater, or item, is always drawn: the interval then says nothing
    about others. Raises TooFewError if all answers are by one rater about one item.
    """
    _, rater = np.unique(raters, return_inverse=True)
    _, item = np.unique(items, return_inverse=True)
    if not len(rater) or (rater.max() == 0 and item.max() == 0):
        raise TooFewError("an interval needs answers of two raters, or about two items")
    rng = np.random.default_rng(seed)
    left = resamples
    while left:
        rows = min(left, max(1, ANSWERS_AT_ONCE // len(rater)))
        weights = _times_drawn(rng, rater, rows) * _times_drawn(rng, item, rows)
        weights = weights[weights.any(axis=1)]  # if raters see different items, a draw may hold no answer
        left -= len(weights)
        yield weights


def _times_drawn(rng: np.random.Generator, index: np.ndarray, rows: int) -> np.ndarray:
    """(rows, N): how often each answer's rater, or item, is drawn."""
    units = int(index.max()) + 1
    return rng.multinomial(units, np.full(units, 1 / units), size=rows)[:, index].astype(np.float64)
