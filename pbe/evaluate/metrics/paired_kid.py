"""Kernel distance of two sets that come in pairs, such as edits and the photos that they are edits of.

Source: Gretton et al. 2012 (JMLR 13), the estimate of pairs after Lemma 6, with KID's kernel (kid.py). A pair is never
compared with itself, so that it is unbiased however alike the two of a pair are, and exactly 0 for equal sets; what a
pair has in common cancels out, which leaves less noise. `kid` would count each pair among the comparisons between
the sets, and fall below 0 the more edits keep of their photos.
"""

from collections.abc import Sequence

import numpy as np

from pbe.evaluate.metrics.kid import cubic_kernel


def paired_kid(a: np.ndarray, b: np.ndarray, *, groups: Sequence[str]) -> float:
    """MMD^2 of features a, b (N, d), whose rows i are a pair; float64 inside, in memory for N^2 numbers.

    groups: (N,), a pair's photo. Pairs of one photo are not independent, and are not compared. It may be below 0.
    Raises ValueError for unequal shapes, groups of another length, one photo alone or values that are not finite.
    """
    if a.shape != b.shape or a.ndim != 2 or len(groups) != len(a):
        raise ValueError(f"features: {a.shape} and {b.shape} with {len(groups)} groups, expected (N, d) twice and N")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("features are not all finite")
    _, number = np.unique(np.asarray(groups), return_inverse=True)
    compared = number[:, None] != number
    if not compared.any():
        raise ValueError("all pairs are of one photo: there is nothing to compare")
    a, b = a.astype(np.float64), b.astype(np.float64)
    among_a, among_b, between = (cubic_kernel(x @ y.T, a.shape[1]) for x, y in ((a, a), (b, b), (a, b)))
    return float((among_a + among_b - between - between.T)[compared].mean())
