"""CMMD: the squared maximum mean discrepancy of CLIP embeddings under a Gaussian kernel, unbiased, for small N.

Source: Jayasumana et al. 2024 (arXiv 2401.09603) and its code, google-research/cmmd: sigma 10, times 1000.
Deviation: the unbiased estimate (Gretton et al. 2012, equation 3). Their code has the biased one (equation 5), in which
each row is also compared with itself: of equal clouds it is above 0, the more so the fewer rows there are. This one may
be below 0.
"""

import numpy as np

from pbe.evaluate.metrics.mmd import MmdToReference

SIGMA, SCALE = 10.0, 1000.0


def cmmd(a: np.ndarray, b: np.ndarray) -> float:
    """1000 MMD^2 of a (N, d), b (M, d), with the kernel exp(-|x - y|^2 / 200) of rows scaled to length 1.

    Raises as MmdToReference, and ValueError for rows of zeros.
    """
    return cmmd_to_reference(b)(a)


def cmmd_to_reference(reference: np.ndarray) -> MmdToReference:
    """`cmmd` to one set (M, d)."""
    return MmdToReference(reference, _gaussian_kernel, prepare=_directions, scale=SCALE)


def _gaussian_kernel(products: np.ndarray, width: int) -> np.ndarray:
    """Of rows of length 1, for which |x - y|^2 = 2 - 2 x . y."""
    return np.exp((products - 1) / SIGMA**2)


def _directions(x: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    if not lengths.all():
        raise ValueError("a feature row is all zeros: it has no direction")
    return x / lengths
