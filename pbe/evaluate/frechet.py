"""The Frechet distance between two sets of features, each taken as a Gaussian.

Source: Heusel et al. 2017 (FID), equation 6; upstream eval_tool/fid/fid_score.py.
Deviation: no scipy sqrtm of a d x d product, which is slow, complex-valued and singular for fewer rows than
dimensions; the nuclear norm below is the same number, and defined for any N.
"""

import numpy as np


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|mu_a - mu_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2), in squared feature units, >= 0.

    a (N, d), b (M, d): one feature vector per row; N, M >= 2, and fewer than d is fine. S is the unbiased
    covariance (1 / (n - 1)), as in np.cov. float64 inside.

    With A the centred rows of a over sqrt(N - 1), so that S_a = A^T A, and B likewise: the non-zero
    eigenvalues of S_a S_b = A^T (A B^T B) are those of (A B^T B) A^T = (A B^T)(A B^T)^T, the squared singular
    values of A B^T. Hence tr (S_a S_b)^(1/2) = ||A B^T||_*, the sum of the singular values.

    The estimate is biased upwards, roughly in proportion to 1 / N: compare only numbers of equal N and M.
    Raises ValueError for wrong shapes, fewer than two rows or values that are not finite.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features: {a.shape} and {b.shape}, expected (N, d) and (M, d)")
    mean_a, root_a = _mean_and_root(a)
    mean_b, root_b = _mean_and_root(b)
    overlap = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    distance = np.sum((mean_a - mean_b) ** 2) + np.sum(root_a**2) + np.sum(root_b**2) - 2 * overlap
    return max(float(distance), 0.0)  # rounding may leave a negative zero


def _mean_and_root(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, d) to the mean (d,) and a matrix R (min(n, d), d) with R^T R the covariance, float64."""
    if len(x) < 2:
        raise ValueError(f"{len(x)} feature rows: a covariance needs at least 2")
    x = x.astype(np.float64)
    if not np.isfinite(x).all():
        raise ValueError("features are not all finite")
    mean = x.mean(0)
    root = (x - mean) / np.sqrt(len(x) - 1)
    # R of A = Q R has the same R^T R: the SVD never grows beyond d x d, however many images there are.
    return mean, np.linalg.qr(root).R if len(root) > root.shape[1] else root
