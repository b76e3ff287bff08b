"""Boxes onto photos: the object that was labelled is in the box, in whichever frame it was labelled."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from pbe.data import images
from pbe.data.frames import Frame, NotOnPhotoError, Placed, place

WIDTH_PX, HEIGHT_PX = 160, 100
STORED = (WIDTH_PX, HEIGHT_PX)


def _photo() -> np.ndarray:
    """A stored picture, black but for one white object off the centre."""
    photo = np.zeros((HEIGHT_PX, WIDTH_PX, 3), np.uint8)
    photo[10:30, 40:120] = 255
    return photo


def _box_of(photo: np.ndarray) -> dict[str, Any]:
    """A row of BOXES around what is white."""
    rows, columns = np.nonzero(photo[..., 0])
    height_px, width_px = photo.shape[:2]
    x0, x1, y0, y1 = columns.min(), columns.max() + 1, rows.min(), rows.max() + 1
    return {"file": "f", "xmin": x0 / width_px, "xmax": x1 / width_px, "ymin": y0 / height_px, "ymax": y1 / height_px}


def _ends(box: Mapping[str, Any]) -> tuple[float, float, float, float]:
    return box["xmin"], box["xmax"], box["ymin"], box["ymax"]


def _stated(size: tuple[float, float] | None) -> dict[str, Any]:
    width, height = size or (None, None)
    return {"width_px": width, "height_px": height}


@pytest.mark.parametrize("kept_upright", [False, True])
@pytest.mark.parametrize("labelled_upright", [False, True])
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("scale", [1, 3.37])
def test_a_box_of_either_frame_lands_on_its_object(
    orientation: int, labelled_upright: bool, kept_upright: bool, scale: float
) -> None:
    data = images.encode_png(_photo())
    pictures = {
        upright: images.decode(data, exif_orientation=orientation if upright else 1) for upright in (False, True)
    }
    kept, labelled = pictures[kept_upright], pictures[labelled_upright]
    frame = Frame(kept.shape[1], kept.shape[0], orientation, kept_upright)
    size = (round(labelled.shape[1] * scale), round(labelled.shape[0] * scale))
    placed = place(_box_of(labelled), _stated(size), frame)
    assert placed.ends == pytest.approx(_ends(_box_of(kept)))
    assert placed.turned == (labelled_upright != kept_upright)


@pytest.mark.parametrize(
    ("size", "orientation"),
    [((HEIGHT_PX, WIDTH_PX), 1), ((HEIGHT_PX, WIDTH_PX), 3), ((160, 160), 6), ((160, 90), 1), ((640, 480), 8)],
)
def test_a_size_of_neither_frame_is_a_reject(size: tuple[float, float], orientation: int) -> None:
    with pytest.raises(NotOnPhotoError, match=r"f states .* px, the photo has 160 x 100") as caught:
        place(_box_of(_photo()), _stated(size), Frame(*STORED, orientation, False))
    assert caught.value.reason == "box_size_mismatch"


@pytest.mark.parametrize("size", [STORED, (80, 50), (641, 400), (53, 33), (1024, 640)])
def test_a_photo_of_another_size_keeps_its_boxes_to_the_bit(size: tuple[float, float]) -> None:
    box = _box_of(_photo())
    for orientation in (1, 6):
        assert place(box, _stated(size), Frame(*STORED, orientation, False)) == Placed(_ends(box))


def test_a_nearly_square_photo_is_in_the_frame_whose_size_it_has() -> None:
    box = {"file": "f", "xmin": 0.0, "xmax": 0.5, "ymin": 0.0, "ymax": 0.25}
    assert not place(box, _stated((100, 101)), Frame(100, 101, 6, False)).turned
    assert place(box, _stated((101, 100)), Frame(100, 101, 6, False)).turned


def test_pixels_of_a_photo_whose_size_is_not_stated() -> None:
    def on(*ends_px: float) -> Placed:
        box = dict(zip(("xmin", "xmax", "ymin", "ymax"), ends_px, strict=True))
        return place(box | {"file": "f"}, _stated(None), Frame(*STORED, 1, False))

    assert on(40, 120, 10, 30) == Placed((0.25, 0.75, 0.1, 0.3))
    assert on(-0.5, 160.9, 0, 100) == Placed((0, 1, 0, 1), clipped=True)
    with pytest.raises(NotOnPhotoError, match="fractions 0 <= min < max <= 1") as caught:
        on(40, 162, 10, 30)
    assert caught.value.reason == "box_outside_image"
