"""Pictures that a browser sends, and the hole in the photo's own pixels, by brush, box or mask file. No Gradio.

Bytes are opened by pbe/data/images.py alone, within the limits below, and kept as they came: the recipe of an edit
contains them.
"""

import re
from dataclasses import dataclass

import numpy as np

from pbe.data import images
from pbe.data.boxes import Box
from pbe.data.masks import MaskError, read_hole_mask
from pbe.errors import UserError
from pbe.recipe import Picture

UPLOAD_BYTES_MAX = 32 << 20
PHOTO_PIXELS_MAX = 50_000_000
SHOWN_PX = 1024  # longer side of the photo under the brush
_BOX = re.compile(r"\s*(\d{1,6})\s*,\s*(\d{1,6})\s*,\s*(\d{1,6})\s*,\s*(\d{1,6})\s*")


class PageError(UserError, ValueError):
    """What the visitor has to do; the page shows the message."""


@dataclass(frozen=True)
class Upload:
    """A picture as it came: its bytes; and its pixels, upright (H, W, 3) uint8 sRGB, on white where transparent."""

    data: bytes
    pixels: np.ndarray

    @property
    def size(self) -> str:
        return f"{self.pixels.shape[1]} x {self.pixels.shape[0]} px"


def open_upload(data: bytes, what: str) -> Upload:
    """what: "photo", for the message. Raises PageError for what is no picture or beyond the limits."""
    try:
        return Upload(data, _within_limits(data).on_white())
    except images.ImageTooLargeError:
        raise PageError(f"The {what} is too large: at most {limits_text()}.") from None
    except images.ImageError as error:
        raise PageError(f"The {what} cannot be read: {error}.") from None


def limits_text() -> str:
    return f"{UPLOAD_BYTES_MAX >> 20} MiB and {PHOTO_PIXELS_MAX // 1_000_000} megapixels"


def _within_limits(data: bytes) -> images.Picture:
    return images.open_picture(data, max_bytes=UPLOAD_BYTES_MAX, max_pixels=PHOTO_PIXELS_MAX)


def shown(pixels: np.ndarray, longest_px: int = SHOWN_PX) -> np.ndarray:
    """The picture with its longer side at most `longest_px`."""
    scale = longest_px / max(pixels.shape[:2])
    if scale >= 1:
        return pixels
    high, wide = (max(1, round(scale * side)) for side in pixels.shape[:2])
    return images.resize(pixels, width_px=wide, height_px=high)


def brushed_hole(layer: bytes, photo: np.ndarray) -> np.ndarray:
    """(H, W) bool of the photo's own pixels, from what the brush painted over `shown(photo)`.

    layer: a picture of that size, hole where half opaque or more; empty if nothing is painted. A pixel of the photo is
    hole where the pixel of the layer under its centre is; for a photo of at most SHOWN_PX these are the same pixels.
    Raises PageError.
    """
    nothing = "Paint over the part of the photo that should change."
    if not layer:
        raise PageError(nothing)
    height_px, width_px = photo.shape[:2]
    high, wide = shown(photo).shape[:2]
    try:
        picture = images.open_picture(layer, max_bytes=UPLOAD_BYTES_MAX, max_pixels=SHOWN_PX**2)
        if (picture.header.height_px, picture.header.width_px) != (high, wide):
            raise PageError("The brush was used on another photo; clear it and paint again.")
        alpha = picture.upright_alpha()
    except images.ImageError as error:
        raise PageError(f"What was painted cannot be read ({error}); clear it and paint again.") from None
    painted = np.ones((high, wide), bool) if alpha is None else alpha >= 128
    rows = ((np.arange(height_px) + 0.5) * high / height_px).astype(int)
    columns = ((np.arange(width_px) + 0.5) * wide / width_px).astype(int)
    return _usable(painted[rows[:, None], columns], nothing)


def boxed_hole(text: str, photo: np.ndarray) -> Box:
    """The box x0,y0,x1,y1 in pixels of the photo, half-open. Raises PageError."""
    height_px, width_px = photo.shape[:2]
    found = _BOX.fullmatch(text)
    if found is None:
        raise PageError("A box is four whole numbers, left, top, right and bottom in pixels, such as 140,60,480,330.")
    x0, y0, x1, y1 = map(int, found.groups())
    if not (x0 < x1 <= width_px and y0 < y1 <= height_px):
        raise PageError(f"The box {x0},{y0},{x1},{y1} is not inside the photo of {width_px} x {height_px} px.")
    if (x0, y0, x1, y1) == (0, 0, width_px, height_px):
        raise PageError("The box covers the whole photo; leave a part that the model can see.")
    return Box(x0, y0, x1, y1)


def masked_hole(data: bytes, photo: np.ndarray) -> np.ndarray:
    """(H, W) bool from a mask file, white where the edit goes. Raises PageError."""
    try:
        hole_mask = read_hole_mask(_within_limits(data))
    except (images.ImageError, MaskError) as error:
        raise PageError(f"The mask cannot be used: {error}.") from None
    if hole_mask.shape != photo.shape[:2]:
        size, photo_size = (f"{array.shape[1]} x {array.shape[0]} px" for array in (hole_mask, photo))
        raise PageError(f"The mask is {size}, the photo {photo_size}; they must be the same.")
    return _usable(hole_mask, "The mask is black everywhere; it must be white where the edit goes.")


def _usable(hole_mask: np.ndarray, if_empty: str) -> np.ndarray:
    if not hole_mask.any():
        raise PageError(if_empty)
    if hole_mask.all():
        raise PageError("The hole covers the whole photo; leave a part that the model can see.")
    return hole_mask


def mask_of(hole: np.ndarray | Box, photo: np.ndarray) -> np.ndarray:
    """(H, W) bool."""
    if isinstance(hole, Box):
        hole_mask = np.zeros(photo.shape[:2], bool)
        hole_mask[hole.y0 : hole.y1, hole.x0 : hole.x1] = True
        return hole_mask
    return hole


def hole_picture(hole: np.ndarray | Box) -> Picture | Box:
    """The hole as a recipe has it: a box, or a mask (H, W) bool as a picture, white where the edit goes."""
    if isinstance(hole, Box):
        return hole
    level = np.where(hole, np.uint8(255), np.uint8(0))
    return Picture.embedded("mask.png", images.encode_png(np.repeat(level[..., None], 3, axis=2)))
