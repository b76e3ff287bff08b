"""Signs of the gains on constructed fills, and exact pixels of regions, colours and PSNR."""

from collections.abc import Callable

import cv2
import numpy as np
import pytest

from pbe.evaluate.metrics.similarity import (
    Gains,
    background_psnr,
    colour_gain,
    cosine,
    exemplar_gain,
    hole_psnr,
    hole_region,
    match_resolution,
    mean_colour,
    neutral_outside,
    upstream_region,
    wins,
)

# Reference R, foreign reference Q, and what the photo alone suggests; orthogonal, so cosines are known.
R, Q, PHOTO = (np.eye(3)[[k]] for k in range(3))
RED, BLUE, GREY = np.array([[200.0, 0, 0]]), np.array([[0, 0, 200.0]]), np.array([[90.0, 90, 90]])

GainFunction = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], Gains]
FEATURES = pytest.param(exemplar_gain, R, Q, PHOTO, id="exemplar")
COLOURS = pytest.param(colour_gain, RED, BLUE, GREY, id="colour")


def test_cosine() -> None:
    a = np.array([[1, 0], [1, 1], [3, 4], [1, 2]])
    b = np.array([[2, 0], [-1, -1], [4, 3], [-2, 1]])
    np.testing.assert_allclose(cosine(a, b), [1, -1, 24 / 25, 0], atol=1e-12)
    with pytest.raises(ValueError, match="must be equal"):
        cosine(a, b[:1])
    with pytest.raises(ValueError, match="zeros"):
        cosine(a, b * 0)


@pytest.mark.parametrize(("gain", "own", "foreign", "photo"), [FEATURES, COLOURS])
def test_signs(gain: GainFunction, own: np.ndarray, foreign: np.ndarray, photo: np.ndarray) -> None:
    follows = gain(own, foreign, own, foreign)
    assert follows.own > 0 and follows.swap > 0

    ignores = gain(photo, photo, own, foreign)
    assert ignores.own == ignores.swap == ignores.both == 0

    contrary = gain(foreign, own, own, foreign)
    assert contrary.own < 0 and contrary.swap < 0

    # The fill of R is good and a foreign reference only damages it: own rises, swap does not.
    damaged = gain(own, photo, own, foreign)
    assert damaged.own > 0 and damaged.swap <= follows.swap / 2

    for gains in (follows, ignores, contrary, damaged):
        assert gains.both.shape == (1,)
        np.testing.assert_allclose(gains.both, (gains.own + gains.swap) / 2)


def test_gain_values() -> None:
    """fill_Q = PHOTO: it moved away from R (own 1), not towards Q (swap 0)."""
    gains = exemplar_gain(R, PHOTO, R, Q)
    np.testing.assert_allclose(np.concatenate([gains.own, gains.swap, gains.both]), [1, 0, 0.5])
    colours = colour_gain(RED, GREY, RED, BLUE)
    np.testing.assert_allclose(colours.own, (110 + 90 + 90) / 3)
    np.testing.assert_allclose(colours.swap, (200 + 0 + 200) / 3 - (90 + 90 + 110) / 3)


def test_a_tie_is_half_a_win_and_rounding_makes_no_winner() -> None:
    np.testing.assert_array_equal(wins(np.array([0.2, -1e-3, 0.0, 4e-7, -4e-7])), [1, 0, 0.5, 0.5, 0.5])


def test_gains_are_per_item() -> None:
    rng = np.random.default_rng(0)
    sets = rng.random((4, 7, 3))
    for gain in (exemplar_gain, colour_gain):
        whole = gain(*sets)
        assert whole.own.shape == whole.swap.shape == whole.both.shape == (7,)
        np.testing.assert_allclose(gain(*sets[:, 3:4]).both, whole.both[3:4])
    with pytest.raises(ValueError, match="must be equal"):
        colour_gain(sets[0], sets[1], sets[2][:1], sets[3])


def test_uint8_colours_do_not_wrap() -> None:
    dark, light = np.full((1, 3), 10, np.uint8), np.full((1, 3), 250, np.uint8)
    np.testing.assert_allclose(colour_gain(dark, light, dark, light).own, 240)


def _image(height: int = 12, width: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)


def test_the_region_keeps_its_last_row_and_column() -> None:
    image, hole_mask = _image(), np.zeros((12, 16), np.uint8)
    hole_mask[2:7, 5:11] = 1
    np.testing.assert_array_equal(hole_region(image, hole_mask), image[2:7, 5:11])

    corners = np.zeros((12, 16), np.uint8)
    corners[11, 3] = corners[4, 15] = 1  # a diagonal hole that touches the image's last row and column
    np.testing.assert_array_equal(hole_region(image, corners), image[4:12, 3:16])
    assert hole_region(image, np.eye(12, 16, 9) != 0).shape == (7, 7, 3)


def test_match_resolution_averages_areas() -> None:
    reference = _image(40, 60)
    small = match_resolution(reference, 4, 6)
    assert small.shape == (4, 6, 3) and small.dtype == np.uint8
    blocks = reference.reshape(4, 10, 6, 10, 3).mean((1, 3))
    np.testing.assert_allclose(small, blocks, atol=0.51)
    np.testing.assert_array_equal(match_resolution(reference, 40, 60), reference)
    larger = cv2.resize(reference, (90, 70), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(match_resolution(reference, 70, 90), larger)


def test_outside_the_mask_there_is_one_neutral_colour_and_the_picture_stays() -> None:
    image, mask = _image(4, 5), np.zeros((4, 5), np.uint8)
    mask[1:3, 2] = 255
    before, cut = image.copy(), neutral_outside(image, mask)
    np.testing.assert_array_equal(image, before)
    np.testing.assert_array_equal(cut[1:3, 2], image[1:3, 2])
    assert {tuple(colour) for colour in cut[mask == 0]} == {(124, 116, 104)} and cut.dtype == np.uint8


def test_mean_colour() -> None:
    image, hole_mask = np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint8)
    image[1, 1], image[2, 2], hole_mask[1, 1], hole_mask[2, 2] = (255, 0, 10), (253, 2, 20), 1, 255
    np.testing.assert_allclose(mean_colour(image, hole_mask), [254, 1, 15])
    np.testing.assert_allclose(mean_colour(image, None), image.reshape(-1, 3).mean(0))


def test_psnr_counts_the_hole_alone() -> None:
    photo, hole_mask = np.full((8, 8, 3), 100, np.uint8), np.zeros((8, 8), np.uint8)
    hole_mask[2:4, 2:4] = 1
    edit = photo.copy()
    edit[hole_mask == 0] = 0
    assert hole_psnr(edit, photo, hole_mask) == np.inf
    edit[2:4, 2:4] = 110
    assert hole_psnr(edit, photo, hole_mask) == pytest.approx(20 * np.log10(255 / 10))
    black, white = np.zeros_like(photo), np.full_like(photo, 255)
    assert hole_psnr(black, white, hole_mask) == hole_psnr(white, black, hole_mask) == pytest.approx(0)


def test_background_psnr_counts_all_but_the_hole() -> None:
    photo, hole_mask = np.full((8, 8, 3), 100, np.uint8), np.zeros((8, 8), np.uint8)
    hole_mask[2:4, 2:4] = 255
    edit = photo.copy()
    edit[hole_mask != 0] = 0
    assert background_psnr(edit, photo, hole_mask) == np.inf
    edit[hole_mask == 0] = 90
    assert background_psnr(edit, photo, hole_mask) == pytest.approx(20 * np.log10(255 / 10))
    edit[hole_mask == 0] = 100
    edit[0, 0, 1] = 110  # one value of the 60 x 3 outside
    assert background_psnr(edit, photo, hole_mask) == pytest.approx(10 * np.log10(255**2 / (100 / 180)))


def test_bad_masks_and_images_are_refused() -> None:
    image, empty, other = _image(), np.zeros((12, 16), np.uint8), np.ones((16, 12), np.uint8)
    for hole_mask, message in ((empty, "empty"), (other, "does not match")):
        with pytest.raises(ValueError, match=message):
            hole_region(image, hole_mask)
        with pytest.raises(ValueError, match=message):
            mean_colour(image, hole_mask)
        with pytest.raises(ValueError, match=message):
            hole_psnr(image, image, hole_mask)
        with pytest.raises(ValueError, match=message):
            background_psnr(image, image, hole_mask)
    with pytest.raises(ValueError, match="covers the whole photo"):
        background_psnr(image, image, np.ones((12, 16), np.uint8))
    with pytest.raises(ValueError, match="expected uint8"):
        background_psnr(image / 255, image / 255, empty)
    with pytest.raises(ValueError, match="must be equal"):
        hole_psnr(image, image[:4], empty)
    with pytest.raises(ValueError, match="expected uint8"):
        hole_psnr(image / 255, image / 255, empty)


def test_upstreams_region_lacks_the_last_row_and_column_and_is_a_box_for_boxes_alone() -> None:
    image = np.arange(8 * 9 * 3).reshape(8, 9, 3).astype(np.uint8)
    box = np.zeros((8, 9), np.uint8)
    box[2:6, 3:8] = 1
    np.testing.assert_array_equal(upstream_region(image, box), image[2:5, 3:7])
    np.testing.assert_array_equal(hole_region(image, box), image[2:6, 3:8])
    thin = np.zeros((8, 9), np.uint8)
    thin[2:6, 3] = 1
    with pytest.raises(ValueError, match=r"leaves nothing of upstream's region.*clip_region: whole"):
        upstream_region(image, thin)
