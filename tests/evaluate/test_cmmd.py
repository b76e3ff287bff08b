"""CMMD against the definition written as loops."""

import numpy as np
import pytest

from pbe.evaluate.metrics import mmd as module
from pbe.evaluate.metrics.cmmd import cmmd, cmmd_to_reference


def _loops(a: np.ndarray, b: np.ndarray) -> float:
    def k(x: np.ndarray, y: np.ndarray) -> float:
        x, y = x / np.sqrt(np.sum(x**2)), y / np.sqrt(np.sum(y**2))
        return float(np.exp(-np.sum((x - y) ** 2) / (2 * 10**2)))

    n, m = len(a), len(b)
    aa = sum(k(a[i], a[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    bb = sum(k(b[i], b[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return 1000 * (aa + bb - 2 * sum(k(x, y) for x in a for y in b) / (n * m))


@pytest.mark.parametrize(("n", "m", "d", "block"), [(7, 9, 4, 4), (2, 30, 16, 1), (25, 3, 2, 1024)])
def test_equals_the_double_loop(n: int, m: int, d: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_ROWS", block)
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((n, d)), 1 + rng.standard_normal((m, d))
    assert cmmd(a, b) == pytest.approx(_loops(a, b), rel=1e-9)
    assert cmmd(3 * a, b) == pytest.approx(cmmd(a, b), rel=1e-9)  # directions alone


def test_a_subset_of_the_rows_is_a_set_of_its_own() -> None:
    rng = np.random.default_rng(0)
    a, b, rows = rng.standard_normal((12, 3)), rng.standard_normal((9, 3)), np.array([1, 4, 5, 11])
    assert cmmd_to_reference(b).of_rows(a)(rows) == pytest.approx(cmmd(a[rows], b), rel=1e-9)


def test_bad_input_is_refused() -> None:
    good = np.ones((3, 2))
    for bad, message in (
        (good[:1], "N of at least 2"),
        (np.full((3, 2), np.nan), "finite"),
        (np.ones((3, 4)), "2 dim"),
        (good * [[1], [0], [1]], "row is all zeros"),
    ):
        with pytest.raises(ValueError, match=message):
            cmmd(bad, good)
