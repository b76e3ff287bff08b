"""KID against the definition written as loops."""

import numpy as np
import pytest

from pbe.evaluate.metrics import mmd as module
from pbe.evaluate.metrics.kid import kid


def _loops(a: np.ndarray, b: np.ndarray) -> float:
    def k(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / len(x) + 1) ** 3)

    n, m = len(a), len(b)
    aa = sum(k(a[i], a[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    bb = sum(k(b[i], b[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return aa + bb - 2 * sum(k(x, y) for x in a for y in b) / (n * m)


@pytest.mark.parametrize(("n", "m", "d", "block"), [(7, 9, 4, 4), (2, 30, 16, 1), (25, 3, 1, 1024)])
def test_equals_the_double_loop(n: int, m: int, d: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_ROWS", block)
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((n, d)), 1 + rng.standard_normal((m, d))
    assert kid(a, b) == pytest.approx(_loops(a, b), rel=1e-10)
    assert kid(a.astype(np.float32), b) == pytest.approx(kid(a, b), rel=1e-4)


def test_bad_input_is_refused() -> None:
    good = np.zeros((3, 2))
    for bad, message in (
        (good[:1], "N of at least 2"),
        (np.full((3, 2), np.nan), "finite"),
        (np.zeros((3, 4)), "2 dim"),
    ):
        with pytest.raises(ValueError, match=message):
            kid(bad, good)
