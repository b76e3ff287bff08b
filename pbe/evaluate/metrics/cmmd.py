"""CMMD: the squared maximum mean discrepancy of CLIP embeddings under a Gaussian kernel, unbiased, for small N.

Source: Jayasumana et al. 2024 (arXiv 2401.09603) and its code, google-research/cmmd: sigma 10, times 1000.
Deviation: the unbiased estimate (Gretton et al. 2012, equation 3). Their code has the biased one (equation 5), in which
each row is also compared with itself: of equal clouds it is above 0, the more so the fewer rows there are. This one may
be below 0.
"""

from collections.abc import Callable, Iterator

import numpy as np

SIGMA, SCALE = 10.0, 1000.0
BLOCK_ROWS = 1024  # of the reference's kernel matrix that are held at once


def cmmd(a: np.ndarray, b: np.ndarray) -> float:
    """1000 MMD^2 of a (N, d), b (M, d), N, M >= 2, with the kernel exp(-|x - y|^2 / 200) of rows scaled to length 1.

    float64 inside. Raises ValueError for wrong shapes, fewer than two rows, rows of zeros or values that are not
    finite.
    """
    return CmmdToReference(b)(a)


class CmmdToReference:
    """`cmmd` to one set (M, d), whose own terms are computed once. Raises as cmmd."""

    def __init__(self, reference: np.ndarray) -> None:
        self._reference = _directions(reference)
        total = sum(float(block.sum()) for block in _kernel(self._reference, self._reference))
        count = len(self._reference)
        self._among_reference = (total - count) / (count * (count - 1))  # a row with itself: 1

    def __call__(self, features: np.ndarray) -> float:
        return self.of_rows(features)(np.arange(len(features)))

    def of_rows(self, features: np.ndarray) -> Callable[[np.ndarray], float]:
        """Prepare features (N, d) once; return a function of row indices (n,), for resampling.

        Holds an (N, N) float64 matrix.
        """
        features = _directions(features)
        if features.shape[1] != self._reference.shape[1]:
            raise ValueError(f"features: {features.shape}, the reference has {self._reference.shape[1]} dimensions")
        among = np.concatenate([*_kernel(features, features)])
        np.fill_diagonal(among, 0)
        between = np.concatenate([block.mean(1) for block in _kernel(features, self._reference)])

        def distance(rows: np.ndarray) -> float:
            if len(rows) < 2:
                raise ValueError(f"{len(rows)} feature rows, expected at least 2")
            among_rows = float(among[np.ix_(rows, rows)].sum()) / (len(rows) * (len(rows) - 1))
            return SCALE * (among_rows + self._among_reference - 2 * float(between[rows].mean()))

        return distance


def _kernel(a: np.ndarray, b: np.ndarray) -> Iterator[np.ndarray]:
    """Of rows of length 1, for which |x - y|^2 = 2 - 2 x . y."""
    for start in range(0, len(a), BLOCK_ROWS):
        yield np.exp((a[start : start + BLOCK_ROWS] @ b.T - 1) / SIGMA**2)


def _directions(x: np.ndarray) -> np.ndarray:
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"features: {x.shape}, expected (N, d) with N of at least 2")
    x = x.astype(np.float64)
    if not np.isfinite(x).all():
        raise ValueError("features are not all finite")
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    if not lengths.all():
        raise ValueError("a feature row is all zeros: it has no direction")
    return x / lengths
