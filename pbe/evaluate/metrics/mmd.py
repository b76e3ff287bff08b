"""The unbiased squared maximum mean discrepancy of two sets of features under a kernel of their inner products.

Source: Gretton et al. 2012 (JMLR 13), equation 3. No row is compared with itself, so that N does not bias it; it may be
below 0. KID and CMMD are this under two kernels.
"""

from collections.abc import Callable, Iterator

import numpy as np

BLOCK_ROWS = 1024  # of a kernel matrix that are held at once
MATRIX_ROWS = 8192  # up to so many rows, a matrix of half a GiB, resampling keeps all of it

Kernel = Callable[[np.ndarray, int], np.ndarray]  # inner products of rows, and their d, to kernel values; elementwise
Prepare = Callable[[np.ndarray], np.ndarray]  # rows (N, d), finite, to those that are compared


class MmdToReference:
    """`scale` MMD^2 to one set (M, d), whose own terms are computed once; float64 inside.

    Called with features (N, d), N, M >= 2. Raises ValueError for wrong shapes, fewer than two rows or values that are
    not finite, and what `prepare` raises.
    """

    def __init__(
        self, reference: np.ndarray, kernel: Kernel, *, prepare: Prepare = lambda rows: rows, scale: float = 1.0
    ) -> None:
        self._kernel, self._prepare, self._scale = kernel, prepare, scale
        self._reference = self._prepare(_checked(reference))
        self._among_reference = self._mean_of_pairs(self._reference)

    def __call__(self, features: np.ndarray) -> float:
        features = self._of_same_width(features)
        between = float(self._with_reference(features).mean())
        return self._scale * (self._mean_of_pairs(features) + self._among_reference - 2 * between)

    def of_rows(self, features: np.ndarray) -> Callable[[np.ndarray], float]:
        """See SetStatistic. The kernels of all rows are computed once; a number of some rows is made of their sums."""
        if len(features) > MATRIX_ROWS:
            return lambda rows: self(features[rows])
        features = self._of_same_width(features)
        with_reference = self._with_reference(features)
        among = np.concatenate(list(self._blocks(features, features)))
        np.fill_diagonal(among, 0)

        def distance(rows: np.ndarray) -> float:
            if len(rows) < 2:
                raise ValueError(f"{len(rows)} feature rows, expected at least 2")
            pairs = float(among[np.ix_(rows, rows)].sum()) / (len(rows) * (len(rows) - 1))
            return self._scale * (pairs + self._among_reference - 2 * float(with_reference[rows].mean()))

        return distance

    def _with_reference(self, features: np.ndarray) -> np.ndarray:
        """(N,): the mean kernel of each row with the reference's."""
        return np.concatenate([block.mean(1) for block in self._blocks(features, self._reference)])

    def _mean_of_pairs(self, x: np.ndarray) -> float:
        """Mean of the kernel over pairs of different rows."""
        total = sum(float(block.sum()) for block in self._blocks(x, x))
        own = float(self._kernel(np.einsum("nd,nd->n", x, x), x.shape[1]).sum())
        return (total - own) / (len(x) * (len(x) - 1))

    def _blocks(self, a: np.ndarray, b: np.ndarray) -> Iterator[np.ndarray]:
        for start in range(0, len(a), BLOCK_ROWS):
            yield self._kernel(a[start : start + BLOCK_ROWS] @ b.T, a.shape[1])

    def _of_same_width(self, features: np.ndarray) -> np.ndarray:
        features = _checked(features)
        if features.shape[1] != self._reference.shape[1]:
            raise ValueError(f"features: {features.shape}, the reference has {self._reference.shape[1]} dimensions")
        return self._prepare(features)


def _checked(x: np.ndarray) -> np.ndarray:
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"features: {x.shape}, expected (N, d) with N of at least 2")
    x = x.astype(np.float64)
    if not np.isfinite(x).all():
        raise ValueError("features are not all finite")
    return x
