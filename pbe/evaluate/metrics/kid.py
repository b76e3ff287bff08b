"""Kernel distance: the unbiased squared maximum mean discrepancy under a cubic kernel, for small N.

Source: Binkowski et al. 2018 (KID), section 3. Deviation: the whole sets at once, not the mean over random blocks of
1,000: the same expectation, less noise, and nothing is drawn. Unlike a Frechet distance it is not biased by N; it may
be below 0.
"""

import numpy as np

from pbe.evaluate.metrics.mmd import MmdToReference


def kid(a: np.ndarray, b: np.ndarray) -> float:
    """MMD^2 of features a (N, d), b (M, d), with the kernel (x . y / d + 1)^3. Raises as MmdToReference."""
    return kid_to_reference(b)(a)


def kid_to_reference(reference: np.ndarray) -> MmdToReference:
    """`kid` to one set (M, d)."""
    return MmdToReference(reference, cubic_kernel)


def cubic_kernel(products: np.ndarray, width: int) -> np.ndarray:
    """(x . y / d + 1)^3 of inner products x . y of features of d = `width`."""
    return (products / width + 1) ** 3
