"""The pictures, masks and boxes that a user names for an edit, decoded. Every message begins with the name given."""

import numpy as np

from pbe.data.boxes import Box
from pbe.data.images import ImageError, open_picture
from pbe.data.masks import MaskError, read_hole_mask
from pbe.errors import UserError


class EditInputError(UserError, ValueError):
    """A picture, mask or box does not suit an edit."""


def decode_picture(data: bytes, name: str) -> np.ndarray:
    """(H, W, 3) uint8 sRGB, upright, on white where it is transparent. Raises EditInputError."""
    try:
        return open_picture(data).on_white()
    except ImageError as error:
        raise EditInputError(f"{name}: {error}") from None


def part_of(picture: np.ndarray, box: Box | None, name: str) -> np.ndarray:
    """The box of the picture (H, W, 3) called `name`; all of it for None. Raises EditInputError if it is not inside."""
    return picture if box is None else picture[_slices(box, picture, name)]


def hole_of_box(box: Box, photo: np.ndarray, name: str) -> np.ndarray:
    """(H, W) bool, True in the box. Raises EditInputError if it is not inside the photo (H, W, 3) called `name`."""
    hole_mask = np.zeros(photo.shape[:2], bool)
    hole_mask[_slices(box, photo, name)] = True
    return hole_mask


def hole_of_mask(data: bytes, photo: np.ndarray, name: str) -> np.ndarray:
    """(H, W) bool, True where the mask called `name` is white. Raises EditInputError, also for another size."""
    try:
        hole_mask = read_hole_mask(open_picture(data))
    except (ImageError, MaskError) as error:
        raise EditInputError(f"{name}: {error}") from None
    if hole_mask.shape != photo.shape[:2]:
        size, photo_size = (f"{array.shape[1]} x {array.shape[0]}" for array in (hole_mask, photo))
        raise EditInputError(f"{name} is {size} px, the photo {photo_size}")
    return hole_mask


def _slices(box: Box, picture: np.ndarray, name: str) -> tuple[slice, slice]:
    height_px, width_px = picture.shape[:2]
    if not Box(0, 0, width_px, height_px).contains(box):
        ends = f"{box.x0},{box.y0},{box.x1},{box.y1}"
        raise EditInputError(f"{name}: {ends} is not inside its {width_px} x {height_px} px")
    return slice(box.y0, box.y1), slice(box.x0, box.x1)
