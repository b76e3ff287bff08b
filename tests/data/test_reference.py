"""A(x_r): the same for the same generator, in any order; each part as often and as strong as upstream's."""

import random

import albumentations as A
import cv2
import numpy as np
import pytest

from pbe.data.reference import augment_reference, make_augmenter


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)


def _draws(image: np.ndarray, count: int) -> list[np.ndarray]:
    augmenter = make_augmenter()
    return [augment_reference(image, augmenter=augmenter, rng=np.random.default_rng(seed)) for seed in range(count)]


def test_it_is_a_function_of_image_and_generator(image: np.ndarray) -> None:
    """The result does not depend on earlier calls or on the global generators."""
    used = make_augmenter()
    for seed in range(30):
        np.random.seed(seed)
        augment_reference(image[::-1].copy(), augmenter=used, rng=np.random.default_rng(99 + seed))
        fresh = augment_reference(image, augmenter=make_augmenter(), rng=np.random.default_rng(seed))
        again = augment_reference(image, augmenter=used, rng=np.random.default_rng(seed))
        np.testing.assert_array_equal(fresh, again)
    assert len({draw.tobytes() for draw in _draws(image, 60)}) > 30


def test_the_input_stays_and_shape_and_type_are_kept(image: np.ndarray) -> None:
    before = image.copy()
    for draw in _draws(image, 30):
        assert draw.shape == image.shape and draw.dtype == np.uint8
    np.testing.assert_array_equal(image, before)


def test_no_part_changes_a_plain_colour() -> None:
    """Borders are reflected: no black corners appear."""
    plain = np.full((48, 48, 3), (10, 200, 90), np.uint8)
    assert all((draw == plain).all() for draw in _draws(plain, 200))


def test_the_parts_happen_as_often_as_upstream(image: np.ndarray) -> None:
    """Unchanged and purely mirrored: each 0.5 (mirror) x 0.5 (no turn) x 0.7 (no blur) x 0.7 (no affine) = 0.1225."""
    draws = _draws(image, 1200)
    for same in (image, image[:, ::-1]):
        assert np.mean([np.array_equal(draw, same) for draw in draws]) == pytest.approx(0.1225, abs=0.03)
    blurs = [cv2.blur(side, (k, k)) for side in (image, np.ascontiguousarray(image[:, ::-1])) for k in (3, 5, 7)]
    blurred = [np.mean([np.array_equal(draw, blur) for draw in draws]) for blur in blurs]
    np.testing.assert_allclose(blurred, 0.5 * 0.5 * 0.3 * 0.7 / 3, atol=0.015)  # kernels 3, 5 and 7 alike


def test_order_borders_and_sampling_are_upstreams() -> None:
    """Mirror, turn, blur, and the affine part last; no border repeats its edge pixel."""
    mirror, turn, blur = make_augmenter().transforms
    assert [type(part) for part in (mirror, turn, blur)] == [A.HorizontalFlip, A.Rotate, A.Blur]
    assert (mirror.p, turn.p, blur.p) == (0.5, 0.5, 0.3)
    assert (turn.limit, blur.blur_limit) == ((-20, 20), (3, 7))
    assert (turn.border_mode, turn.interpolation) == (cv2.BORDER_REFLECT_101, cv2.INTER_LINEAR)

    photo = np.random.default_rng(1).integers(0, 256, (224, 224, 3)).astype(np.uint8)
    before = np.array([[186, 186], [186, 38], [38, 38]], np.float32)  # 112 +- 74
    seen = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        start = int(rng.integers(0, 2**31))
        if rng.random() >= 0.3:
            continue
        augmenter = make_augmenter()
        augmenter.set_random_state(np.random.default_rng(start), random.Random(start))
        after = before + rng.uniform(-50, 50, (3, 2)).astype(np.float32)
        expected = cv2.warpAffine(
            augmenter(image=photo)["image"],
            cv2.getAffineTransform(before, after),
            (224, 224),
            flags=cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REFLECT_101,
        )
        out = augment_reference(photo, augmenter=make_augmenter(), rng=np.random.default_rng(seed))
        np.testing.assert_array_equal(out, expected)
        seen += 1
    assert seen > 9


@pytest.mark.parametrize("side", [224, 112])
def test_the_affine_moves_three_points_by_up_to_50_px_at_224(side: int) -> None:
    """centre +- a third of the side; the colours found at the moved points are those of the points."""
    rows, columns = np.mgrid[:side, :side]
    image = np.stack([columns, rows, np.zeros_like(rows)], axis=2).astype(np.uint8)
    centre, third, shift = side // 2, side // 3, 50 * side / 224
    before = np.array([[centre + third] * 2, [centre + third, centre - third], [centre - third] * 2])
    checked, moves, changed = 0, [], 0
    for seed in range(300):
        rng, again = np.random.default_rng(seed), np.random.default_rng(seed)
        out = augment_reference(image, augmenter=A.Compose([]), rng=rng)
        again.integers(0, 2**31)
        if again.random() >= 0.3:
            np.testing.assert_array_equal(out, image)
            continue
        changed += 1
        move = again.uniform(-shift, shift, (3, 2))
        moves.append(move)
        for (x, y), (u, v) in zip(before, before + move, strict=True):
            if 1 <= u < side - 2 and 1 <= v < side - 2:
                patch = cv2.getRectSubPix(out.astype(np.float32), (1, 1), (float(u), float(v)))[0, 0]
                np.testing.assert_allclose(patch[:2], (x, y), atol=1.5)
                checked += 1
    assert changed / 300 == pytest.approx(0.3, abs=0.08) and checked > 150
    assert 0.9 * shift < np.abs(moves).max() <= shift
