"""Boxes onto their photos: in which frame, stored or upright, and in which unit a box file means them.

Fractions are the same for a photo of another size, but not for a photo that was turned: of one with EXIF orientation 5
to 8, width and height as stored are height and width of the upright picture. Tools differ in which they state.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pbe.data.boxfiles.coordinates import ALLOWED, clip, inside, pixel_slack
from pbe.data.schema import ENDS

# where a point of the stored picture is in the upright one, and back, in fractions, by EXIF orientation
Move = Callable[[Any, Any], tuple[Any, Any]]  # of floats or arrays
_TO_UPRIGHT: Mapping[int, Move] = {
    5: lambda x, y: (y, x),
    6: lambda x, y: (1 - y, x),
    7: lambda x, y: (1 - y, 1 - x),
    8: lambda x, y: (y, 1 - x),
}
_TO_STORED: Mapping[int, Move] = {
    5: lambda x, y: (y, x),
    6: lambda x, y: (y, 1 - x),
    7: lambda x, y: (1 - y, 1 - x),
    8: lambda x, y: (1 - y, x),
}


@dataclass(frozen=True)
class Frame:
    """A photo as ingest keeps it. exif_orientation: of its file, 1 to 8; upright: whether it is applied."""

    width_px: int
    height_px: int
    exif_orientation: int
    upright: bool


class NotOnPhotoError(Exception):
    """A box does not fit its photo. `reason` is one of the schema's; `str()` is the detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Placed:
    """ends: xmin, xmax, ymin, ymax, in fractions of the photo. What was done to them: clipped, or turned."""

    ends: tuple[float, float, float, float]
    clipped: bool = False
    turned: bool = False


def place(box: Mapping[str, Any], stated: Mapping[str, Any], frame: Frame) -> Placed:
    """Put a box of BOXES onto its photo. stated: its file's row of STATED. Raises NotOnPhotoError."""
    ends = tuple(box[name] for name in ENDS)
    if stated["width_px"] is None:
        return _from_pixels(ends, frame)
    if not is_turned((stated["width_px"], stated["height_px"]), frame, f"{box['file']} states"):
        return Placed(ends)
    move = _mover(frame)
    (x0, y0), (x1, y1) = move(ends[0], ends[2]), move(ends[1], ends[3])
    return Placed((min(x0, x1), max(x0, x1), min(y0, y1), max(y0, y1)), turned=True)


def is_turned(size: tuple[float, float], frame: Frame, said: str) -> bool:
    """Return whether what was made on a picture of this width and height belongs to the photo's other frame.

    said: what states the size, for the message. Raises NotOnPhotoError for a size that fits neither frame.
    """
    here, sideways = (frame.width_px, frame.height_px), frame.exif_orientation in _TO_UPRIGHT
    there = here[::-1]
    if size == here or (_is_scaled(size, here) and not (sideways and size == there)):
        return False
    if sideways and _is_scaled(size, there):
        return True
    kind = "upright" if frame.upright else "stored"
    raise NotOnPhotoError(
        "box_size_mismatch",
        f"{said} {size[0]:g} x {size[1]:g} px, the photo has {here[0]} x {here[1]} ({kind}), EXIF "
        f"orientation {frame.exif_orientation}: it was turned, cropped or replaced after it was labelled",
    )


def turned_points(points: np.ndarray, frame: Frame) -> np.ndarray:
    """(N, 2) fractions x, y of the other frame in the photo's own."""
    return np.stack(_mover(frame)(points[:, 0], points[:, 1]), axis=1)


def turned_array(array: np.ndarray, frame: Frame) -> np.ndarray:
    """(H, W) of the other frame in the photo's own."""
    height, width = array.shape
    y, x = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height, indexing="ij")
    back = _TO_STORED if frame.upright else _TO_UPRIGHT
    from_x, from_y = back[frame.exif_orientation](x, y)
    return array[(from_y * height).astype(int), (from_x * width).astype(int)]


def _mover(frame: Frame) -> Move:
    return (_TO_UPRIGHT if frame.upright else _TO_STORED)[frame.exif_orientation]


def _from_pixels(ends_px: tuple[float, ...], frame: Frame) -> Placed:
    width, height = np.array([frame.width_px]), np.array([frame.height_px])
    ends = np.array(ends_px)[:, None] / np.stack([width, width, height, height])
    clipped, changed = clip(ends, pixel_slack(width, height))
    x0, x1, y0, y1 = clipped[:, 0].tolist()
    if not inside(clipped).all():
        raise NotOnPhotoError("box_outside_image", f"x {x0}..{x1}, y {y0}..{y1}; {ALLOWED}")
    return Placed((x0, x1, y0, y1), clipped=bool(changed.any()))


def _is_scaled(size: tuple[float, float], other: tuple[float, float]) -> bool:
    """True if one size is the other one times a factor, rounded to pixels."""
    rounding = max(sum(size), sum(other))
    return abs(size[0] * other[1] - size[1] * other[0]) <= rounding
