"""Paired KID: against the definition written as loops, and unbiased where plain KID is not."""

import numpy as np
import pytest

from pbe.evaluate.metrics.kid import kid
from pbe.evaluate.metrics.paired_kid import paired_kid


def _loops(a: np.ndarray, b: np.ndarray, groups: list[str]) -> float:
    def k(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / len(x) + 1) ** 3)

    values = [
        k(a[i], a[j]) + k(b[i], b[j]) - k(a[i], b[j]) - k(a[j], b[i])
        for i in range(len(a))
        for j in range(len(a))
        if groups[i] != groups[j]
    ]
    return sum(values) / len(values)


def _of_normals(*, shift: float, variance: float, d: int) -> float:
    """Between N(0, 1) and N(shift, variance) in d dimensions: squared differences of their first three moments."""
    mean, unit = np.full(d, shift), np.eye(d)
    second = variance * unit + np.outer(mean, mean) - unit
    lines = np.einsum("ij,k->ijk", unit, mean)
    third = np.einsum("i,j,k->ijk", mean, mean, mean)
    third += variance * (lines + lines.transpose(0, 2, 1) + lines.transpose(2, 0, 1))
    return float(3 * (mean**2).sum() / d + 3 * (second**2).sum() / d**2 + (third**2).sum() / d**3)


@pytest.mark.parametrize("groups", [["a", "b", "c", "d", "e"], ["a", "a", "b", "c", "b"]])
def test_equals_the_double_loop_without_pairs_of_one_photo(groups: list[str]) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((5, 4)), 1 + rng.standard_normal((5, 4))
    assert paired_kid(a, b, groups=groups) == pytest.approx(_loops(a, b, groups), rel=1e-10)


def test_is_unbiased_for_pairs_that_are_alike_and_varies_less() -> None:
    """Edits keep most of their photo. Plain KID takes that for likeness of the sets, and is too small at few rows."""
    rng = np.random.default_rng(1)
    groups = [str(number) for number in range(12)]
    paired, plain = [], []
    for _ in range(1500):
        photos = rng.standard_normal((12, 6))
        edits = photos + 0.3 + 0.1 * rng.standard_normal((12, 6))
        paired.append(paired_kid(edits, photos, groups=groups))
        plain.append(kid(edits, photos))
    truth = _of_normals(shift=0.3, variance=1.01, d=6)
    error = np.std(paired) / np.sqrt(len(paired))
    assert abs(np.mean(paired) - truth) < 4 * error < 0.1 * truth
    assert np.mean(plain) < 0 and np.std(paired) < np.std(plain)
    same = rng.standard_normal((12, 6))
    assert abs(paired_kid(same, same, groups=groups)) < 1e-12  # some processors sum in another order


def test_bad_input_is_refused() -> None:
    good, groups = np.ones((3, 2)), ["a", "b", "c"]
    for a, b, of, message in (
        (good, good[:2], groups, "expected"),
        (good, good, groups[:2], "with 2 groups"),
        (good, np.full((3, 2), np.nan), groups, "finite"),
        (good, good, ["a"] * 3, "one photo"),
    ):
        with pytest.raises(ValueError, match=message):
            paired_kid(a, b, groups=of)
