"""Studies of raters with known preferences: how often the intervals hold the true mean rank.

    python -m tests.study.simulation

prints the table of pbe/study/two_way.py in about half a minute.
"""

from dataclasses import dataclass

import numpy as np

from pbe.study.two_way import resampled_weights

STRENGTHS = np.array([8.0, 5.0, 3.0, 2.0, 1.0])
STUDIES, RESAMPLES = 200, 500


@dataclass(frozen=True)
class Design:
    """rater_sd, item_sd: of their own preferences for each method, on the scale of log strengths."""

    raters: int
    items: int
    items_per_rater: int
    rater_sd: float = 0.5
    item_sd: float = 0.7


def draw_study(design: Design, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rankings (N, K) from 1, and their raters and items (N,): Plackett-Luce by Gumbel noise on log strengths."""
    rng = np.random.default_rng([design.raters, design.items, seed])
    of_raters = design.rater_sd * rng.normal(size=(design.raters, len(STRENGTHS)))
    of_items = design.item_sd * rng.normal(size=(design.items, len(STRENGTHS)))
    raters = np.repeat(np.arange(design.raters), design.items_per_rater)
    items = np.concatenate([rng.permutation(design.items)[: design.items_per_rater] for _ in range(design.raters)])
    return _rank(rng, of_raters[raters] + of_items[items]), raters, items


def true_mean_ranks(design: Design, answers: int = 400_000) -> np.ndarray:
    """(K,): over all raters and items there could be, each answer with another rater and item."""
    rng = np.random.default_rng(0)
    sd = float(np.hypot(design.rater_sd, design.item_sd))
    return _rank(rng, sd * rng.normal(size=(answers, len(STRENGTHS)))).mean(axis=0)


def _rank(rng: np.random.Generator, effects: np.ndarray) -> np.ndarray:
    utilities = np.log(STRENGTHS) + effects + rng.gumbel(size=effects.shape)
    return (-utilities).argsort(axis=1).argsort(axis=1) + 1


def covers(design: Design, truth: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Whether each method's interval holds the true mean rank: of the two-way bootstrap, and of single answers."""
    ranks, raters, items = draw_study(design, seed)
    means = np.concatenate(
        [
            w @ ranks / w.sum(axis=1, keepdims=True)
            for w in resampled_weights(raters, items, resamples=RESAMPLES, seed=seed)
        ]
    )
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    naive = 1.96 * ranks.std(axis=0) / np.sqrt(len(ranks))
    return (low <= truth) & (truth <= high), np.abs(ranks.mean(axis=0) - truth) <= naive


def main() -> None:
    for design in (
        Design(50, 30, 30),
        Design(12, 30, 30),
        Design(5, 12, 12),
        Design(20, 30, 10),
        Design(50, 100, 15),
        Design(50, 30, 30, rater_sd=0, item_sd=0),
    ):
        truth = true_mean_ranks(design)
        two_way, naive = np.mean([covers(design, truth, seed) for seed in range(STUDIES)], axis=(0, 2))
        print(f"{design}: two-way {two_way:.1%}, single answers {naive:.1%}", flush=True)


if __name__ == "__main__":
    main()
