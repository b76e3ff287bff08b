"""Box geometry by laws, over thousands of boxes: 1 px photos and boxes, boxes on the border, all shapes of photo."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pbe.data.boxes import Box, Window, context_area, extended, padded, pixel_box, square_window

SIDES_PX = (1, 2, 3, 7, 16, 60, 100, 333, 1024)
FRACS = (0.0, 0.4, 0.6, 1.0)


def _cases(count: int, seed: int) -> Iterator[tuple[Box, int, int, np.random.Generator]]:
    """Boxes with their photo's width and height, half of them small; about a fifth of their sides touch the border."""
    rng = np.random.default_rng(seed)

    def interval(side_px: int) -> tuple[int, int]:
        longest = side_px if rng.random() < 0.5 else max(1, side_px // 6)
        length = int(rng.integers(1, longest, endpoint=True))
        start = int(rng.integers(0, side_px - length, endpoint=True))
        low, high = rng.random(2) < 0.15
        return 0 if low else start, side_px if high else start + length

    for _ in range(count):
        width_px, height_px = (int(side) for side in rng.choice(SIDES_PX, 2))
        (x0, x1), (y0, y1) = interval(width_px), interval(height_px)
        yield Box(x0, y0, x1, y1), width_px, height_px, rng


def _margins(outer: Box, inner: Box) -> tuple[int, int, int, int]:
    return inner.x0 - outer.x0, inner.y0 - outer.y0, outer.x1 - inner.x1, outer.y1 - inner.y1


def _transposed(box: Box) -> Box:
    return Box(box.y0, box.x0, box.y1, box.x1)


@pytest.mark.parametrize("corners", [(3, 0, 3, 5), (0, 4, 5, 4), (5, 0, 3, 5), (0, 5, 5, 3)])
def test_a_box_has_at_least_one_pixel(corners: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="empty box"):
        Box(*corners)


def test_contains_agrees_with_the_pixels() -> None:
    rng = np.random.default_rng(1)
    answers = set()
    for _ in range(500):
        x, y = np.sort(rng.choice(5, 2, replace=False)), np.sort(rng.choice(5, 2, replace=False))
        u, v = np.sort(rng.choice(5, 2, replace=False)), np.sort(rng.choice(5, 2, replace=False))
        one, other = Box(x[0], y[0], x[1], y[1]), Box(u[0], v[0], u[1], v[1])
        pixels = np.zeros((2, 5, 5), bool)
        pixels[0, one.y0 : one.y1, one.x0 : one.x1] = True
        pixels[1, other.y0 : other.y1, other.x0 : other.x1] = True
        assert one.contains(other) == bool((pixels[0] | ~pixels[1]).all())
        assert pixels[0].sum() == one.width_px * one.height_px
        answers.add(one.contains(other))
    assert answers == {True, False}


@settings(max_examples=400)
@given(
    xs=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
    ys=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
    width_px=st.integers(1, 3000),
    height_px=st.integers(1, 3000),
)
def test_fractions_become_pixels_inside_the_photo(
    xs: list[float], ys: list[float], width_px: int, height_px: int
) -> None:
    box = pixel_box(xs[0], xs[1], ys[0], ys[1], width_px=width_px, height_px=height_px)
    assert Box(0, 0, width_px, height_px).contains(box)
    for got, frac, side in ((box.x0, xs[0], width_px), (box.x1, xs[1], width_px), (box.y0, ys[0], height_px)):
        assert abs(got - frac * side) <= 1  # rounded down, as upstream; one pixel more where the box would be empty


@pytest.mark.parametrize(
    ("fractions", "size_px", "expected"),
    [
        ((0.0, 1.0, 0.0, 1.0), (640, 480), (0, 0, 640, 480)),
        ((0.25, 0.75, 0.5, 1.0), (100, 50), (25, 25, 75, 50)),
        ((0.119, 0.999, 0.101, 0.899), (100, 100), (11, 10, 99, 89)),  # int() rounds down, as upstream
        ((0.5, 0.5001, 0.2, 0.2001), (10, 10), (5, 2, 6, 3)),  # thinner than a pixel: one pixel
        ((0.9999, 1.0, 0.9999, 1.0), (10, 10), (9, 9, 10, 10)),
        ((0.3, 0.4, 0.1, 0.9), (1, 1), (0, 0, 1, 1)),
    ],
)
def test_fractions_by_hand(
    fractions: tuple[float, float, float, float], size_px: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    assert pixel_box(*fractions, width_px=size_px[0], height_px=size_px[1]) == Box(*expected)


def test_padding_grows_every_side_by_the_pad_or_to_the_border() -> None:
    for box, width_px, height_px, rng in _cases(2000, seed=2):
        pad_px = int(rng.integers(0, 30))
        out = padded(box, pad_px, width_px=width_px, height_px=height_px)
        room = _margins(Box(0, 0, width_px, height_px), box)
        assert _margins(out, box) == tuple(min(pad_px, side) for side in room)


def test_the_extended_box_holds_the_box_stays_inside_and_is_bounded() -> None:
    for box, width_px, height_px, rng in _cases(4000, seed=3):
        frac = float(rng.choice(FRACS))
        ext = extended(box, width_px=width_px, height_px=height_px, extend_frac=frac, rng=rng)
        photo = Box(0, 0, width_px, height_px)
        assert ext.contains(box) and photo.contains(ext)
        bounds = [int(frac * room) for room in _margins(photo, box)]
        assert all(grown <= bound for grown, bound in zip(_margins(ext, box), bounds, strict=True))


def test_the_draws_are_left_top_right_bottom() -> None:
    """The order of the draws is part of the contract: data must be reproducible later."""
    box, rng, again = Box(30, 40, 60, 55), np.random.default_rng(5), np.random.default_rng(5)
    ext = extended(box, width_px=100, height_px=100, extend_frac=0.4, rng=rng)
    rooms = (30, 40, 40, 45)
    assert _margins(ext, box) == tuple(int(again.integers(0, int(0.4 * room), endpoint=True)) for room in rooms)


def _upstream_range(ext: Box, width_px: int, height_px: int) -> tuple[int, int]:
    """left_most and right_most (or upper and lower) of upstream's open-images.py."""
    side = min(width_px, height_px)
    low, high, length = (ext.x0, ext.x1, width_px) if width_px > height_px else (ext.y0, ext.y1, height_px)
    return max(high - side, 0), min(low + side, length) - side


def test_the_window_is_a_square_around_the_extended_box_or_the_squashed_photo() -> None:
    seen = {"square photo": 0, "squashed": 0, "cut": 0}
    for ext, width_px, height_px, rng in _cases(6000, seed=6):
        frac = float(rng.choice(FRACS))
        window = square_window(ext, width_px=width_px, height_px=height_px, shrink_frac=frac, rng=rng)
        photo, box, side = Box(0, 0, width_px, height_px), window.box, min(width_px, height_px)
        assert photo.contains(box) and box.contains(ext)
        first, last = _upstream_range(ext, width_px, height_px)
        if width_px == height_px:
            assert window == Window(photo, squashed=False)
            seen["square photo"] += 1
        elif last <= first:
            assert window == Window(photo, squashed=True)
            seen["squashed"] += 1
        else:
            assert not window.squashed and box.width_px == box.height_px
            cut, odd = divmod(side - box.width_px, 2)
            assert cut >= 0 and not odd
            uncut = padded(box, cut, width_px=width_px, height_px=height_px)
            assert (uncut.width_px, uncut.height_px) == (side, side)
            assert cut <= int(frac * min(_margins(uncut, ext)))
            seen["cut"] += cut > 0
    assert min(seen.values()) > 100, seen


def test_a_portrait_is_a_transposed_landscape() -> None:
    for seed, (ext, width_px, height_px, _) in enumerate(_cases(1000, seed=8)):
        one, other = (
            square_window(box, width_px=w, height_px=h, shrink_frac=0.6, rng=np.random.default_rng(seed))
            for box, w, h in ((ext, width_px, height_px), (_transposed(ext), height_px, width_px))
        )
        assert other == Window(_transposed(one.box), one.squashed)


def test_window_by_hand() -> None:
    """100 x 60, ext x 30..50, y 10..40: left in 0..30; then up to int(0.6 * free) px less, free = the smallest gap."""
    rng, ext = np.random.default_rng(9), Box(30, 10, 50, 40)
    boxes = [square_window(ext, width_px=100, height_px=60, shrink_frac=0.6, rng=rng).box for _ in range(3000)]
    uncut = {(box.x0 - box.y0) for box in boxes}  # both moved by the same cut
    assert uncut == set(range(31))
    for left in (0, 5, 30):
        free = min(30 - left, 10, left + 60 - 50, 20)
        assert {box.y0 for box in boxes if box.x0 - box.y0 == left} == set(range(int(0.6 * free) + 1))


@pytest.mark.parametrize(
    "ext",
    [
        Box(0, 10, 50, 40),  # touches the left border: left_most = right_most = 0 (upstream squashes here too)
        Box(50, 10, 100, 40),  # touches the right border
        Box(20, 10, 80, 40),  # exactly as wide as the window
        Box(10, 10, 90, 40),  # wider than the photo is high
    ],
)
def test_where_at_most_one_square_would_do_the_photo_is_squashed(ext: Box) -> None:
    window = square_window(ext, width_px=100, height_px=60, shrink_frac=0.6, rng=np.random.default_rng(0))
    assert window == Window(Box(0, 0, 100, 60), squashed=True)


def test_a_small_box_has_a_square_of_its_own_size_at_any_place_that_holds_it() -> None:
    rng, box = np.random.default_rng(0), Box(30, 10, 40, 16)
    found = [context_area(box, width_px=100, height_px=60, factor=2.0, rng=rng) for _ in range(3000)]
    assert {(area.width_px, area.height_px) for area in found} == {(20, 20)}
    assert {area.x0 for area in found} == set(range(20, 31)) and {area.y0 for area in found} == set(range(11))


def test_a_square_of_context_holds_its_box_in_the_photo_or_is_the_whole_photo_without_a_draw() -> None:
    kinds = {"square": 0, "whole": 0}
    for box, width_px, height_px, rng in _cases(4000, seed=11):
        photo, factor = Box(0, 0, width_px, height_px), float(rng.choice([1.0, 1.5, 2.0, 4.0]))
        before = rng.bit_generator.state
        area = context_area(box, width_px=width_px, height_px=height_px, factor=factor, rng=rng)
        assert photo.contains(area) and area.contains(box)
        if area == photo:
            assert rng.bit_generator.state == before
            assert max(box.longer_px * factor, box.longer_px + 2) >= min(width_px, height_px) - 0.5
        else:
            assert area.width_px == area.height_px == round(max(box.longer_px * factor, box.longer_px + 2))
        kinds["whole" if area == photo else "square"] += 1
    assert min(kinds.values()) > 100, kinds
