"""Holes: the rectangle, the Bezier ring against the formula by hand, packing, and the mask at latent size."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from pbe.data.boxes import Box, extended
from pbe.data.masks import bezier_hole, bezier_ring, box_hole, keep_mask_latent, pack_mask, unpack_mask

TIGHT, EXT = Box(100, 100, 200, 200), Box(80, 60, 250, 220)


def _ring(box: Box, ext: Box, *, points: int = 18, jitter_px: int = 0, seed: int = 0) -> np.ndarray:
    return bezier_ring(box, ext, points_per_side=points, jitter_px=jitter_px, rng=np.random.default_rng(seed))


def _random_boxes(count: int, least_px: int, seed: int) -> list[tuple[Box, Box, int, int]]:
    """(tight, extended, width, height): boxes of at least `least_px` a side, anywhere in photos of up to 300 px."""
    rng, out = np.random.default_rng(seed), []
    for _ in range(count):
        width_px, height_px = (int(side) for side in rng.integers(least_px, 300, 2))
        w, h = int(rng.integers(least_px, width_px + 1)), int(rng.integers(least_px, height_px + 1))
        x0, y0 = int(rng.integers(0, width_px - w + 1)), int(rng.integers(0, height_px - h + 1))
        box = Box(x0, y0, x0 + w, y0 + h)
        out.append(
            (box, extended(box, width_px=width_px, height_px=height_px, extend_frac=0.4, rng=rng), width_px, height_px)
        )
    return out


def test_the_box_hole_is_the_extended_box_and_nothing_else() -> None:
    for _, ext, width_px, height_px in _random_boxes(300, 1, seed=1):
        hole_mask = box_hole((ext.x0, ext.y0, ext.x1, ext.y1), width_px=width_px, height_px=height_px)
        assert hole_mask.shape == (height_px, width_px) and hole_mask.dtype == np.uint8
        assert hole_mask.sum() == ext.width_px * ext.height_px
        assert hole_mask[ext.y0 : ext.y1, ext.x0 : ext.x1].all()


@pytest.mark.parametrize(
    ("side", "index", "expected"),
    [
        # t = 0.05: 0.9025 p0 + 0.095 c + 0.0025 p1, t = 0.5: p0/4 + c/2 + p1/4, t = 0.9: 0.01 p0 + 0.18 c + 0.81 p1
        ("top", 0, (105.0, 96.2)),
        ("top", 9, (150.0, 80.0)),
        ("top", 17, (190.0, 92.8)),
        ("right", 0, (204.75, 105.0)),
        ("right", 9, (225.0, 150.0)),
        ("bottom", 9, (150.0, 210.0)),
        ("bottom", 17, (110.0, 203.6)),
        ("left", 9, (90.0, 150.0)),
        ("left", 17, (96.4, 110.0)),
    ],
)
def test_the_ring_equals_the_formula_by_hand(side: str, index: int, expected: tuple[float, float]) -> None:
    """Tight 100..200 x 100..200, extended 80..250 x 60..220: controls (150, 60), (250, 150), (150, 220), (80, 150)."""
    ring = _ring(TIGHT, EXT)
    assert ring.shape == (72, 2)
    start = 18 * ("top", "right", "bottom", "left").index(side)
    np.testing.assert_allclose(ring[start + index], expected, atol=1e-9)


def test_more_points_lie_closer_together_and_end_at_the_same_t() -> None:
    twenty = _ring(TIGHT, TIGHT, points=20)
    assert twenty.shape == (80, 2) and twenty[19, 0] == pytest.approx(190)


def test_the_ring_is_clockwise_and_stays_inside_the_extended_box() -> None:
    for box, ext, _, _ in _random_boxes(500, 2, seed=2):
        x, y = _ring(box, ext).T
        assert np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y) > 0  # shoelace, y down
        low, high = np.array([x.min(), y.min()]) + 1e-9, np.array([x.max(), y.max()]) - 1e-9
        assert (low >= (ext.x0, ext.y0)).all() and (high <= (ext.x1, ext.y1)).all()


@pytest.mark.parametrize("jitter_px", [0, 1, 5])
def test_jitter_is_whole_pixels_up_to_its_bound_each_equally_likely(jitter_px: int) -> None:
    plain = _ring(TIGHT, EXT)
    moved = np.concatenate([_ring(TIGHT, EXT, jitter_px=jitter_px, seed=seed) - plain for seed in range(60)])
    offsets = np.round(moved).astype(int)
    np.testing.assert_allclose(moved, offsets, atol=1e-9)
    values, counts = np.unique(offsets, return_counts=True)
    assert values.tolist() == list(range(-jitter_px, jitter_px + 1))
    np.testing.assert_allclose(counts / offsets.size, 1 / len(values), atol=0.02)
    if jitter_px:
        assert abs(np.corrcoef(offsets.T)[0, 1]) < 0.05  # x and y are independent


def test_the_bezier_hole_covers_the_tight_box_but_for_its_corners() -> None:
    """The chord from t = 0.90 to the next side's t = 0.05 cuts at most 0.1 x 0.05 / 2 of the box at each corner."""
    for box, ext, width_px, height_px in _random_boxes(300, 40, seed=3):
        hole_mask = bezier_hole(_ring(box, ext), width_px=width_px, height_px=height_px)
        assert hole_mask.shape == (height_px, width_px) and set(np.unique(hole_mask)) <= {0, 1}
        assert hole_mask[box.y0 : box.y1, box.x0 : box.x1].mean() > 0.98
        outside = hole_mask.copy()
        outside[max(ext.y0 - 1, 0) : ext.y1 + 1, max(ext.x0 - 1, 0) : ext.x1 + 1] = 0  # rounding: one pixel
        assert not outside.any()


def test_points_outside_the_photo_are_clipped() -> None:
    ring = np.array([[-1000.0, -1000.0], [1000.0, -1000.0], [1000.0, 1000.0], [-1000.0, 1000.0]])
    assert bezier_hole(ring, width_px=7, height_px=5).all()
    assert not bezier_hole(ring + 5000, width_px=7, height_px=5).any()


@given(width_px=st.integers(1, 40), height_px=st.integers(1, 12), seed=st.integers(0, 999))
def test_packing_is_exact_at_one_bit_per_pixel(width_px: int, height_px: int, seed: int) -> None:
    mask = np.random.default_rng(seed).integers(0, 2, (height_px, width_px)).astype(np.uint8)
    data = pack_mask(mask)
    assert len(data) == height_px * -(-width_px // 8)
    again = unpack_mask(data, width_px=width_px, height_px=height_px)
    assert again.dtype == np.uint8
    np.testing.assert_array_equal(again, mask)


def test_packed_bits_are_big_endian_by_rows() -> None:
    mask = np.zeros((2, 9), np.uint8)
    mask[0, 0] = mask[0, 8] = mask[1, 7] = 1
    assert pack_mask(mask) == bytes([0b10000000, 0b10000000, 0b00000001, 0])


@pytest.mark.parametrize("cell_px", [1, 2, 3, 4, 5, 8, 16])
def test_the_keep_mask_is_torchs_bilinear_resize_without_antialias_exactly(cell_px: int) -> None:
    rng = np.random.default_rng(cell_px)
    for _ in range(20):
        rows, columns = rng.integers(1, 9, 2)
        hole_mask = rng.integers(0, 2, (rows * cell_px, columns * cell_px)).astype(np.uint8)
        keep = torch.from_numpy(1.0 - hole_mask.astype(np.float32))[None, None]
        expected = F.interpolate(
            keep, size=(int(rows), int(columns)), mode="bilinear", align_corners=False, antialias=False
        )
        got = keep_mask_latent(hole_mask, cell_px)
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, expected[0].numpy())
