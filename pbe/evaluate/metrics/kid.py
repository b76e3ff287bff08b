"""Kernel distance: the unbiased squared maximum mean discrepancy under a cubic kernel, for small N.

Source: Binkowski et al. 2018 (KID), section 3. Deviation: the whole sets at once, not the mean over random blocks of
1,000: the same expectation, less noise, and nothing is drawn. Unlike a Frechet distance it is not biased by N; it may
be below 0.
"""

from collections.abc import Callable, Iterator

import numpy as np

BLOCK_ROWS = 1024  # of a kernel matrix that are held at once
MATRIX_ROWS = 8192  # up to so many rows, a matrix of half a GiB, resampling keeps all of it


def kid(a: np.ndarray, b: np.ndarray) -> float:
    """MMD^2 of features a (N, d), b (M, d), N, M >= 2, with the kernel (x . y / d + 1)^3; float64 inside.

    Raises ValueError for wrong shapes, fewer than two rows or values that are not finite.
    """
    return KidToReference(b)(a)


class KidToReference:
    """`kid` to one set (M, d), whose own terms are computed once. Raises as kid."""

    def __init__(self, reference: np.ndarray) -> None:
        self._reference = _checked(reference)
        self._among_reference = _mean_of_pairs(self._reference)

    def __call__(self, features: np.ndarray) -> float:
        features = self._of_same_width(features)
        between = float(self._with_reference(features).mean())
        return _mean_of_pairs(features) + self._among_reference - 2 * between

    def of_rows(self, features: np.ndarray) -> Callable[[np.ndarray], float]:
        """See SetStatistic. The kernels of all rows are computed once; a number of some rows is made of their sums."""
        features = self._of_same_width(features)
        if len(features) > MATRIX_ROWS:
            return lambda rows: self(features[rows])
        with_reference = self._with_reference(features)
        among = np.concatenate(list(_kernel(features, features)))
        np.fill_diagonal(among, 0)

        def distance(rows: np.ndarray) -> float:
            if len(rows) < 2:
                raise ValueError(f"{len(rows)} feature rows, expected at least 2")
            pairs = float(among[np.ix_(rows, rows)].sum()) / (len(rows) * (len(rows) - 1))
            return pairs + self._among_reference - 2 * float(with_reference[rows].mean())

        return distance

    def _with_reference(self, features: np.ndarray) -> np.ndarray:
        """(N,): the mean kernel of each row with the reference's."""
        return np.concatenate([block.mean(1) for block in _kernel(features, self._reference)])

    def _of_same_width(self, features: np.ndarray) -> np.ndarray:
        features = _checked(features)
        if features.shape[1] != self._reference.shape[1]:
            raise ValueError(f"features: {features.shape}, the reference has {self._reference.shape[1]} dimensions")
        return features


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
