"""Diversity of fills of one hole that differ only in their noise: the paper's Fig. 9 as a number.

The paper shows only pictures. 0: the noise changes nothing, as with a copied or averaged fill.
"""

from itertools import combinations

import numpy as np

from pbe.evaluate.metrics.similarity import cosine


def feature_spread(regions: np.ndarray) -> np.ndarray:
    """(S, N, d) features of S >= 2 fills of N holes to (N,): one minus the cosine, mean over pairs of fills, 0 to 2.

    Raises ValueError for one fill, and as `cosine` does.
    """
    _refuse_one(len(regions))
    return np.mean([1 - cosine(first, second) for first, second in combinations(regions, 2)], 0)


def pixel_spread(fills: np.ndarray, hole_mask: np.ndarray) -> float:
    """(S, H, W, 3) uint8, S >= 2 fills of one hole; hole_mask (H, W), non-zero inside. The standard deviation over
    fills (of samples: S - 1), mean over the hole's pixels and channels, in levels of 255.

    Raises ValueError for one fill or an empty hole.
    """
    _refuse_one(len(fills))
    inside = hole_mask != 0
    if not inside.any():
        raise ValueError("the hole is empty")
    return float(fills[:, inside].std(0, ddof=1, dtype=np.float64).mean())


def _refuse_one(count: int) -> None:
    if count < 2:
        raise ValueError(f"{count} fill of each hole: a spread needs at least 2")
