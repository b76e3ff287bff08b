"""The nuclear-norm form against the textbook formula, and the laws of a distance."""

import numpy as np
import pytest
import scipy.linalg

from pbe.evaluate.metrics.frechet import frechet_distance


def _features(n: int, d: int, seed: int) -> np.ndarray:
    """(n, d) correlated, not centred, with a decaying spectrum."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)) @ (rng.standard_normal((d, d)) / (1 + np.arange(d))[:, None]) + rng.random(d)


def _textbook(a: np.ndarray, b: np.ndarray) -> float:
    """As upstream's fid_score.py, with scipy's sqrtm."""
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    return float(np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov_a + cov_b - 2 * root))


@pytest.mark.parametrize(("n", "m", "d"), [(100, 80, 16), (64, 500, 32), (33, 33, 32)])
def test_equals_the_textbook_formula(n: int, m: int, d: int) -> None:
    a, b = _features(n, d, 0), _features(m, d, 1)
    assert frechet_distance(a, b) == pytest.approx(_textbook(a, b), abs=1e-5)


@pytest.mark.parametrize(("n", "m", "d"), [(10, 12, 40), (10, 200, 40), (200, 10, 40), (2, 2, 300)])
def test_fewer_rows_than_dimensions(n: int, m: int, d: int) -> None:
    """Independent check by the symmetric form tr (S_a^1/2 S_b S_a^1/2)^1/2; eigh takes singular S."""
    a, b = _features(n, d, 2), _features(m, d, 3)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    inner = np.linalg.eigvalsh(root_a @ cov_b @ root_a).clip(0)
    inner = inner[inner > 1e-12 * inner.max()]
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov_a + cov_b) - 2 * np.sqrt(inner).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("n", [8, 300])
def test_laws(n: int) -> None:
    a, b, shift = _features(n, 20, 4), _features(n, 20, 5), np.random.default_rng(6).standard_normal(20)
    distance = frechet_distance(a, b)
    assert distance > 0
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a[::-1]) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(b, a) == pytest.approx(distance)
    assert frechet_distance(a + shift, b + shift) == pytest.approx(distance)
    assert frechet_distance(a, a + shift) == pytest.approx(float(shift @ shift))
    assert frechet_distance(3 * a, 3 * b) == pytest.approx(9 * distance)
    rotation = np.linalg.qr(np.random.default_rng(7).standard_normal((20, 20))).Q
    assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(distance)


def test_float32_features_are_computed_in_float64() -> None:
    a, b = (_features(50, 20, seed).astype(np.float32) + 1000 for seed in (8, 9))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(a.astype(float), b.astype(float)), rel=1e-12)


def test_bad_input_is_refused() -> None:
    good = _features(5, 3, 0)
    with pytest.raises(ValueError, match="expected"):
        frechet_distance(good, good[:, :2])
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(good[:1], good)
    with pytest.raises(ValueError, match="finite"):
        frechet_distance(np.full((5, 3), np.nan), good)
