"""From what the brush painted to the photo's own pixels."""

import threading
from pathlib import Path

import numpy as np
import pytest

from pbe.data import images
from pbe.diffusion.sampling import Sampling
from pbe.edit import Editor
from pbe.page.uploads import PageError, brushed_hole, open_upload, shown
from pbe.page.visitors import StoppedError, stopping


def _layer(alpha: np.ndarray) -> bytes:
    """A layer as the browser sends it: PNG with alpha (h, w) uint8."""
    import cv2

    return cv2.imencode(".png", np.dstack([*[np.full_like(alpha, 90)] * 3, alpha]))[1].tobytes()


def test_a_photo_that_is_shown_whole_has_the_painted_pixels_exactly() -> None:
    alpha = np.random.default_rng(1).integers(0, 256, (30, 41)).astype(np.uint8)
    assert np.array_equal(brushed_hole(_layer(alpha), np.zeros((30, 41, 3), np.uint8)), alpha >= 128)


def test_a_larger_photo_has_the_painted_pixel_under_each_centre() -> None:
    photo = np.zeros((1500, 3001, 3), np.uint8)
    high, wide = shown(photo).shape[:2]
    assert (high, wide) == (512, 1024)
    alpha = np.zeros((high, wide), np.uint8)
    alpha[100:200, 300:1024] = 255
    rows, columns = ((np.arange(size) + 0.5) * small / size for size, small in ((1500, 512), (3001, 1024)))
    wanted = ((rows >= 100) & (rows < 200))[:, None] & (columns >= 300)[None]
    assert np.array_equal(brushed_hole(_layer(alpha), photo), wanted)


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (b"", "Paint over"),
        (_layer(np.zeros((20, 30), np.uint8)), "Paint over"),
        (_layer(np.full((20, 30), 255, np.uint8)), "whole photo"),
        (_layer(np.full((20, 31), 200, np.uint8)), "another photo"),
        (b"\0", "cannot be read"),
    ],
    ids=["nothing", "empty", "all", "other size", "damaged"],
)
def test_an_unsuitable_layer_is_refused(layer: bytes, said: str) -> None:
    with pytest.raises(PageError, match=said):
        brushed_hole(layer, np.zeros((20, 30, 3), np.uint8))


def test_a_photo_beyond_the_limits_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pbe.page.uploads.PHOTO_PIXELS_MAX", 99)
    with pytest.raises(PageError, match="too large"):
        open_upload(images.encode_png(np.zeros((10, 10, 3), np.uint8)), "photo")


def test_an_edit_ends_within_a_step_of_its_cancellation(model_folder: Path) -> None:
    stop, steps = threading.Event(), 0

    def count() -> None:
        nonlocal steps
        steps += 1
        if steps == 3:
            stop.set()

    photo = np.zeros((32, 32, 3), np.uint8)
    hole_mask = np.zeros((32, 32), bool)
    hole_mask[8:16, 8:16] = True
    with pytest.raises(StoppedError):
        Editor.load(model_folder).edit(
            photo, hole_mask, photo, seed=1, sampling=Sampling(steps=9), on_step=stopping(stop, count)
        )
    assert steps == 3
