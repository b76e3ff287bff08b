"""Baselines: untouched outside, blind inside, in the right place; Poisson's known solutions, Reinhard's statistics."""

from collections.abc import Callable

import cv2
import numpy as np
import pytest

from pbe.data.images import resize
from pbe.evaluate.bench.baselines import colour_transfer, composite, copy_paste, hole_kept, poisson

SIDE_PX = 48
Baseline = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def _nothing(source: np.ndarray, hole_mask: np.ndarray, reference: np.ndarray) -> np.ndarray:
    return hole_kept(source, hole_mask)


def _box(y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
    hole_mask = np.zeros((SIDE_PX, SIDE_PX), np.uint8)
    hole_mask[y0:y1, x0:x1] = 1
    return hole_mask


def _ellipse() -> np.ndarray:
    return cv2.ellipse(_box(0, 0, 0, 0), (20, 25), (9, 15), 20, 0, 360, 1, -1)


def _object_pasted(source: np.ndarray, hole_mask: np.ndarray, reference: np.ndarray) -> np.ndarray:
    return colour_transfer(source, hole_mask, reference, _disc(*reference.shape[:2]))


def _disc(height_px: int, width_px: int) -> np.ndarray:
    centre, axes = (width_px // 2, height_px // 2), (width_px // 3, height_px // 3)
    return cv2.ellipse(np.zeros((height_px, width_px), np.uint8), centre, axes, 0, 0, 360, 1, -1)


WITH_REFERENCE: tuple[Baseline, ...] = (copy_paste, poisson, colour_transfer, _object_pasted)
HOLES = {
    "middle": _box(15, 30, 10, 33),
    "one pixel": _box(7, 8, 40, 41),
    "two pixels": _box(7, 8, 40, 42),
    "one row": _box(20, 21, 5, 40),
    "corner": _box(0, 17, 0, 12),
    "last pixel": _box(47, 48, 47, 48),
    "whole width": _box(12, 25, 0, 48),
    "all but a row": _box(1, 48, 0, 48),
    "all": _box(0, 48, 0, 48),
    "ellipse": _ellipse(),
    "two parts": _box(3, 9, 3, 9) | _box(30, 44, 20, 48),
}


def _photo(seed: int, side_px: int = SIDE_PX) -> np.ndarray:
    """Smooth with some noise, as photos are."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(30, 226, (6, 6, 3)).astype(np.uint8)
    noise = rng.integers(-8, 9, (side_px, side_px, 3))
    return np.clip(cv2.resize(coarse, (side_px, side_px)) + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("baseline", [_nothing, *WITH_REFERENCE])
def test_outside_is_untouched_and_the_hidden_content_is_not_seen(baseline: Baseline) -> None:
    source, reference = _photo(0), _photo(1, 30)
    for name, hole_mask in HOLES.items():
        inside = hole_mask != 0
        edit = baseline(source, hole_mask, reference)
        assert edit.shape == source.shape and edit.dtype == np.uint8
        np.testing.assert_array_equal(edit[~inside], source[~inside], err_msg=name)

        other = source.copy()
        other[inside] = 255 - other[inside]
        np.testing.assert_array_equal(baseline(other, hole_mask, reference), edit, err_msg=name)
        np.testing.assert_array_equal(baseline(source, hole_mask * np.uint8(255), reference), edit, err_msg=name)
    np.testing.assert_array_equal(source, _photo(0))
    np.testing.assert_array_equal(reference, _photo(1, 30))


def test_the_kept_hole_is_mid_grey() -> None:
    edit = hole_kept(_photo(0), HOLES["ellipse"])
    assert (edit[HOLES["ellipse"] != 0] == 128).all()


def test_copy_paste_is_the_resized_reference_through_the_hole() -> None:
    source, reference = _photo(0), _photo(1, 30)
    edit = copy_paste(source, HOLES["middle"], reference)
    np.testing.assert_array_equal(edit[15:30, 10:33], resize(reference, width_px=23, height_px=15))
    ellipse = HOLES["ellipse"] != 0
    rows, columns = np.flatnonzero(ellipse.any(1)), np.flatnonzero(ellipse.any(0))
    y0, y1, x0, x1 = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    patch = resize(reference, width_px=int(x1 - x0), height_px=int(y1 - y0))
    edit = copy_paste(source, HOLES["ellipse"], reference)
    np.testing.assert_array_equal(edit[ellipse], patch[ellipse[y0:y1, x0:x1]])


@pytest.mark.parametrize("hole", ["one pixel", "one row", "corner", "whole width", "ellipse"])
def test_poisson_of_a_flat_reference_is_the_membrane(hole: str) -> None:
    """No gradients: the harmonic function of the border. A ramp is one, where the hole does not end at the edge."""
    y, x = np.mgrid[:SIDE_PX, :SIDE_PX]
    source = np.stack([40 + 3 * x, 200 - 2 * y, 60 + x + y], axis=2).astype(np.uint8)
    edit = poisson(source, HOLES[hole], np.full((20, 20, 3), 77, np.uint8)).astype(int)
    inside = HOLES[hole] != 0
    if hole in ("corner", "whole width"):
        assert (edit[inside].min(0) >= source[~inside].min(0) - 2).all()  # the maximum principle is what remains
        assert (edit[inside].max(0) <= source[~inside].max(0) + 2).all()
    else:
        assert np.abs(edit - source)[inside].max() <= 8


@pytest.mark.parametrize("hole", ["middle", "corner", "whole width", "all but a row", "ellipse"])
def test_poisson_of_the_photos_own_content_is_nearly_the_photo(hole: str) -> None:
    """And in its place: every shift by a pixel fits worse."""
    source = cv2.GaussianBlur(_photo(3), (0, 0), 0.7)
    inside = HOLES[hole] != 0
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    content = source[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    edit = poisson(source, HOLES[hole], content).astype(float)
    # Gradients are what it keeps; the level may drift, where the photo's edge leaves an end free.
    detail = edit - cv2.GaussianBlur(edit, (0, 0), 2)

    def misfit(dy: int, dx: int) -> float:
        moved = np.roll(source.astype(float), (dy, dx), (0, 1))
        core = cv2.erode(inside.astype(np.uint8), np.ones((5, 5), np.uint8), borderValue=0) != 0
        core = core if core.any() else inside
        return float(np.abs(detail - (moved - cv2.GaussianBlur(moved, (0, 0), 2)))[core].mean())

    shifted = [misfit(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
    assert misfit(0, 0) < 0.6 * min(shifted)
    assert np.abs(edit - source)[inside].mean() < 6


def test_poisson_takes_the_photos_colour_and_the_references_detail() -> None:
    source = np.full((SIDE_PX, SIDE_PX, 3), (200, 60, 60), np.uint8)
    reference = np.full((24, 24, 3), (20, 90, 200), np.uint8)
    reference[8:16, 8:16] += 40
    edit = poisson(source, _box(12, 36, 12, 36), reference).astype(int)
    np.testing.assert_allclose(edit[13, 13:35].mean(0), (200, 60, 60), atol=12)
    np.testing.assert_allclose(edit[24, 24] - edit[24, 15], 40, atol=6)
    pasted = copy_paste(source, _box(12, 36, 12, 36), reference)
    assert (pasted[13, 13] == (20, 90, 200)).all()


def test_a_hole_without_a_border_is_pasted() -> None:
    source, reference = _photo(0), _photo(1, 30)
    pasted = copy_paste(source, HOLES["all"], reference)
    for baseline in (poisson, colour_transfer):
        np.testing.assert_array_equal(baseline(source, HOLES["all"], reference), pasted)


def _lab(colours: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(colours[None].astype(np.float32) / 255, cv2.COLOR_RGB2Lab)[0]


def test_colour_transfer_has_the_rings_mean_and_contrast_and_the_references_pattern() -> None:
    source, reference = _photo(0) // 2 + 64, _photo(1, 30) // 3 + 90  # inside the gamut, nothing is clipped
    hole = HOLES["middle"] != 0
    ring = (cv2.dilate(HOLES["middle"], np.ones((7, 7), np.uint8)) != 0) & ~hole  # 3 px: a tenth of 23 is less
    edit, pasted = colour_transfer(source, HOLES["middle"], reference), copy_paste(source, HOLES["middle"], reference)
    for statistic in (np.mean, np.std):
        found, wanted = (statistic(_lab(colours), axis=0) for colours in (edit[hole], source[ring]))
        np.testing.assert_allclose(found, wanted, atol=0.2)
    for channel in range(3):
        assert np.corrcoef(_lab(edit[hole])[:, channel], _lab(pasted[hole])[:, channel])[0, 1] > 0.99
    far = source.copy()
    far[~(hole | ring)] = 0
    np.testing.assert_array_equal(colour_transfer(far, HOLES["middle"], reference)[hole], edit[hole])


def test_colour_transfer_of_one_colour_is_the_rings_mean() -> None:
    source = _photo(0)
    edit = colour_transfer(source, HOLES["middle"], np.full((20, 20, 3), 77, np.uint8))
    assert len(np.unique(edit[HOLES["middle"] != 0], axis=0)) == 1
    np.testing.assert_allclose(edit[20, 20], source[12:33, 7:36].mean((0, 1)), atol=20)


def test_an_object_is_pasted_alone_onto_an_inpainted_hole() -> None:
    source, reference = np.full((SIDE_PX, SIDE_PX, 3), (90, 160, 40), np.uint8), _photo(1, 30)
    mask = _disc(30, 30)
    edit, pasted = composite(source, HOLES["middle"], reference, mask)
    hole = HOLES["middle"] != 0
    assert 0 < pasted.sum() < hole.sum() and not pasted[~hole].any() and pasted[22, 21] and not pasted[15, 10]
    np.testing.assert_array_equal(edit[pasted], copy_paste(source, HOLES["middle"], reference)[pasted])
    assert np.abs(edit[hole & ~pasted] - np.array([90, 160, 40])).max() <= 2
    whole, everywhere = composite(source, HOLES["middle"], reference, mask * 0)
    np.testing.assert_array_equal(whole, copy_paste(source, HOLES["middle"], reference))
    np.testing.assert_array_equal(everywhere, hole)
    with pytest.raises(ValueError, match=r"object_mask .* does not match the reference"):
        composite(source, HOLES["middle"], reference, mask[:20])


@pytest.mark.parametrize("baseline", [_nothing, *WITH_REFERENCE])
def test_bad_input_is_refused(baseline: Baseline) -> None:
    source, reference = _photo(0), _photo(1, 30)
    with pytest.raises(ValueError, match="empty"):
        baseline(source, HOLES["middle"] * 0, reference)
    with pytest.raises(ValueError, match="does not match"):
        baseline(source, HOLES["middle"][:40], reference)
    with pytest.raises(ValueError, match="source: float"):
        baseline(source / 255, HOLES["middle"], reference)
    if baseline is not _nothing:
        with pytest.raises(ValueError, match="reference: "):
            baseline(source, HOLES["middle"], reference[..., 0])
