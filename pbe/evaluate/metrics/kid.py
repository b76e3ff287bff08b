"""Kernel distance: the unbiased squared maximum mean discrepancy under a cubic kernel, for small N.

Source: Binkowski et al. 2018 (KID), section 3. Deviation: the whole sets at once, not the mean over random blocks of
1,000: the same expectation, less noise, and nothing is drawn. Unlike a Frechet distance it is not biased by N; it may
be below 0.
"""

from collections.abc import Callable, Iterator

import numpy as np

BLOCK_ROWS = 1024  # of a kernel matrix that are held at once


def kid(a: np.ndarray, b: np.ndarray) -> float:
    """MMD^2 of features a (N, d), b (M, d), N, M >= 2, with the kernel (x . y / d + 1)^3; float64 inside.

    Raises ValueError for wrong shapes, fewer than two rows or values that are not finite.
    """
    return kid_to_reference(b)(a)


def kid_to_reference(reference: np.ndarray) -> Callable[[np.ndarray], float]:
    """Return a function that computes `kid` to one set (M, d), whose own terms are computed once."""
    reference = _checked(reference)
    among_reference = _mean_of_pairs(reference)

    def distance(features: np.ndarray) -> float:
        features = _checked(features)
        if features.shape[1] != reference.shape[1]:
            raise ValueError(f"features: {features.shape}, the reference has {reference.shape[1]} dimensions")
        between = sum(float(block.sum()) for block in _kernel(features, reference))
        mean_between = between / (len(features) * len(reference))
        return _mean_of_pairs(features) + among_reference - 2 * mean_between

    return distance


def _mean_of_pairs(x: np.ndarray) -> float:
    """Mean of the kernel over pairs of different rows."""
    total = sum(float(block.sum()) for block in _kernel(x, x))
    own = float(((np.einsum("nd,nd->n", x, x) / x.shape[1] + 1) ** 3).sum())
    return (total - own) / (len(x) * (len(x) - 1))


def _kernel(a: np.ndarray, b: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(a), BLOCK_ROWS):
        yield (a[start : start + BLOCK_ROWS] @ b.T / a.shape[1] + 1) ** 3


def _checked(x: np.ndarray) -> np.ndarray:
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"features: {x.shape}, expected (N, d) with N of at least 2")
    x = x.astype(np.float64)
    if not np.isfinite(x).all():
        raise ValueError("features are not all finite")
    return x
