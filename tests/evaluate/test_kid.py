"""KID against the definition written as loops, and against what is known of it."""

import numpy as np
import pytest

from pbe.evaluate.metrics import kid as module
from pbe.evaluate.metrics.intervals import Estimate, jackknife
from pbe.evaluate.metrics.kid import kid


def _loops(a: np.ndarray, b: np.ndarray) -> float:
    def k(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / len(x) + 1) ** 3)

    n, m = len(a), len(b)
    aa = sum(k(a[i], a[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    bb = sum(k(b[i], b[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return aa + bb - 2 * sum(k(x, y) for x in a for y in b) / (n * m)


@pytest.mark.parametrize(("n", "m", "d"), [(7, 9, 4), (2, 30, 16), (25, 3, 1)])
@pytest.mark.parametrize("block", [1, 4, 1024])
def test_equals_the_double_loop(n: int, m: int, d: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_ROWS", block)
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((n, d)), 1 + rng.standard_normal((m, d))
    assert kid(a, b) == pytest.approx(_loops(a, b), rel=1e-10)
    assert kid(a.astype(np.float32), b) == pytest.approx(kid(a, b), rel=1e-4)


def test_is_unbiased_where_a_frechet_distance_is_not() -> None:
    """Two samples of one distribution: 0 on average, at any N."""
    rng = np.random.default_rng(1)
    values = [kid(rng.standard_normal((10, 6)), rng.standard_normal((12, 6))) for _ in range(1500)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))
    assert min(values) < 0


def test_jackknife_covers_its_expectation() -> None:
    rng = np.random.default_rng(2)
    reference = rng.standard_normal((120, 5))
    expected = np.mean([kid(1.3 * rng.standard_normal((40, 5)), reference) for _ in range(600)])

    def estimate_of(sample: np.ndarray, seed: int) -> Estimate:
        return jackknife(lambda rows: kid(sample[rows], reference), 40, groups=None, resamples=40, seed=seed)

    covered = 0
    for trial in range(80):
        estimate = estimate_of(1.3 * rng.standard_normal((40, 5)), trial)
        covered += bool(estimate.low <= expected <= estimate.high)
    assert 0.85 <= covered / 80 <= 1


def test_bad_input_is_refused() -> None:
    good = np.zeros((3, 2))
    for bad, message in (
        (good[:1], "N of at least 2"),
        (np.full((3, 2), np.nan), "finite"),
        (np.zeros((3, 4)), "2 dim"),
    ):
        with pytest.raises(ValueError, match=message):
            kid(bad, good)
