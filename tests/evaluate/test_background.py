"""Background and seam: values that can be computed by hand, SSIM against scikit-image's."""

import numpy as np
import pytest

from pbe.evaluate.bench.baselines import copy_paste, poisson
from pbe.evaluate.metrics.background import background_max_error, background_ssim, fill_hole, ssim_map
from pbe.evaluate.metrics.seam import seam


def _photo(side: int = 64, seed: int = 0) -> np.ndarray:
    """Slopes and texture."""
    rng = np.random.default_rng(seed)
    slopes = np.linspace(40, 200, side)[:, None, None] + np.linspace(-30, 30, side)[None, :, None]
    return np.clip(slopes + rng.normal(0, 6, (side, side, 3)), 0, 255).astype(np.uint8)


def _hole(side: int = 64, rows: slice = slice(16, 40), columns: slice = slice(20, 52)) -> np.ndarray:
    hole_mask = np.zeros((side, side), np.uint8)
    hole_mask[rows, columns] = 1
    return hole_mask


def test_the_fill_changes_no_number_of_the_background() -> None:
    photo, hole_mask = _photo(), _hole()
    edit = fill_hole(photo, np.full_like(photo, 255), hole_mask)
    assert edit[20, 30, 0] == 255 and (edit != photo).any()
    assert background_max_error(edit, photo, hole_mask) == 0
    assert background_ssim(edit, photo, hole_mask) == 1
    edit[0, 0, 1] = photo[0, 0, 1] + 9
    edit[63, 63, 2] = photo[63, 63, 2] - 4
    assert background_max_error(edit, photo, hole_mask) == 9
    assert 0.99 < background_ssim(edit, photo, hole_mask) < 1


def test_ssim_is_scikit_images() -> None:
    """Its map, of which the background's pixels are averaged; contrasts that would show a formula's slip."""
    metrics = pytest.importorskip("skimage.metrics", reason="needs the sample extra")
    photo, hole_mask = _photo(), _hole()
    noise = np.random.default_rng(3).normal(0, 20, photo.shape)
    for edit in (np.clip(photo + noise, 0, 255).astype(np.uint8), 255 - photo, photo // 2):
        composite = fill_hole(edit, photo, hole_mask)
        _, expected = metrics.structural_similarity(
            composite,
            photo,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=255,
            channel_axis=2,
            full=True,
        )
        for channel in range(3):
            one, other = (np.ascontiguousarray(picture[..., channel]) for picture in (composite, photo))
            np.testing.assert_allclose(ssim_map(one, other), expected[..., channel], atol=1e-4)
        found = background_ssim(edit, photo, hole_mask)
        assert found == pytest.approx(expected[hole_mask == 0].mean(), abs=1e-4)
        assert found < expected.mean() - 0.005  # which the hole's ones raise


def test_a_hole_without_background_or_of_another_size_is_refused() -> None:
    photo = _photo()
    for of in (background_max_error, background_ssim):
        with pytest.raises(ValueError, match="covers the whole photo"):
            of(photo, photo, np.ones((64, 64), np.uint8))
        with pytest.raises(ValueError, match="is empty"):
            of(photo, photo, np.zeros((64, 64), np.uint8))
        with pytest.raises(ValueError, match="does not match the image"):
            of(photo, photo, _hole()[:-1])
        with pytest.raises(ValueError, match="expected equal uint8"):
            of(photo.astype(np.float32), photo, _hole())


# -- the seam --------------------------------------------------------------------------------------------------------


def test_the_seam_is_the_mean_step_across_the_border_beyond_the_photos() -> None:
    """A hole of 2 x 2 has eight pairs; its steps are |fill - 10|, the photo's are 0 or 6."""
    photo, hole_mask = np.full((6, 6, 3), 10, np.uint8), np.zeros((6, 6), np.uint8)
    hole_mask[2:4, 2:4] = 1
    assert seam(fill_hole(photo, np.full_like(photo, 50), hole_mask), photo, hole_mask) == 40
    photo[:, 4:] = 16  # two of the pairs have a step of 6 in the photo; the fill's are then 34
    assert seam(fill_hole(photo, np.full_like(photo, 50), hole_mask), photo, hole_mask) == (6 * 40 + 2 * 34 - 2 * 6) / 8
    assert seam(photo // 2, photo, hole_mask) == (2 * 3 - 2 * 6) / 8  # smoother than the photo


@pytest.mark.parametrize("rows", [slice(16, 40), slice(0, 30), slice(0, 64)], ids=["inside", "edge", "two edges"])
@pytest.mark.parametrize("smooth", [False, True])
def test_a_pasted_patch_shows_a_blended_one_less_and_the_photo_none(rows: slice, smooth: bool) -> None:
    photo, hole_mask = _photo(), _hole(rows=rows)
    if smooth:
        photo = np.full_like(photo, 120)
    foreign = 255 - _photo(seed=1)
    untouched, pasted, blended = (
        seam(edit, photo, hole_mask)
        for edit in (photo, copy_paste(photo, hole_mask, foreign), poisson(photo, hole_mask, foreign))
    )
    assert untouched == 0
    assert pasted > 30
    assert 0 < blended < pasted / 4


def test_a_hole_without_a_border_is_refused() -> None:
    photo = _photo()
    for hole_mask in (np.zeros((64, 64), np.uint8), np.ones((64, 64), np.uint8)):
        with pytest.raises(ValueError, match="has no border"):
            seam(photo, photo, hole_mask)
