"""FID and KID by another program: the values that torchmetrics 1.9.0 (torch 2.14.1) gave for the same features.

By torchmetrics.image.fid._compute_fid, of means and torch.cov in float64, and torchmetrics.image.kid.poly_mmd, which
takes sets of one size alone.
"""

import numpy as np
import pytest

from pbe.evaluate.metrics.frechet import frechet_distance, frechet_to_features
from pbe.evaluate.metrics.kid import kid


def _features(n: int, d: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.random((n, d)) @ rng.random((d, d)) / d + seed / 10


@pytest.mark.parametrize(("n", "m", "d", "fid"), [(200, 300, 16, 0.1634017475578649), (40, 60, 64, 0.6782620082366735)])
def test_frechet_is_torchmetrics_fid(n: int, m: int, d: int, fid: float) -> None:
    a, b = _features(n, d, 1), _features(m, d, 2)
    assert frechet_distance(a, b) == pytest.approx(fid, rel=1e-4)
    assert frechet_to_features(b)(a) == pytest.approx(fid, rel=1e-4)


@pytest.mark.parametrize(("n", "d", "mmd"), [(60, 16, 0.06414983600404645), (30, 64, 0.054078414442892075)])
def test_kid_is_torchmetrics_polynomial_mmd(n: int, d: int, mmd: float) -> None:
    assert kid(_features(n, d, 1), _features(n, d, 2)) == pytest.approx(mmd, rel=1e-4)
