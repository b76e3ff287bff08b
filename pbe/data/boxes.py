"""Box geometry: pure functions on pixel boxes.

Pixel intervals are half-open: a box covers columns x0 <= x < x1 and rows y0 <= y < y1. Upstream's
`int(float())` end points are used as such half-open ends.
Source: upstream ldm/data/open-images.py `OpenImageDataset.__getitem__` and scripts/read_bbox.py.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Box:
    """x0, y0, x1, y1 in pixels, half-open; x0 < x1 and y0 < y1."""

    x0: int
    y0: int
    x1: int
    y1: int

    def __post_init__(self) -> None:
        if not (self.x0 < self.x1 and self.y0 < self.y1):
            raise ValueError(f"empty box {self}")

    @property
    def width_px(self) -> int:
        return self.x1 - self.x0

    @property
    def height_px(self) -> int:
        return self.y1 - self.y0

    @property
    def longer_px(self) -> int:
        return max(self.width_px, self.height_px)

    def moved(self, x_px: int, y_px: int) -> "Box":
        return Box(self.x0 + x_px, self.y0 + y_px, self.x1 + x_px, self.y1 + y_px)

    def contains(self, other: "Box") -> bool:
        return self.x0 <= other.x0 and self.y0 <= other.y0 and self.x1 >= other.x1 and self.y1 >= other.y1


@dataclass(frozen=True)
class Window:
    """The square (or, when squashed, whole) part of the photo that becomes the S x S source."""

    box: Box
    squashed: bool  # True: the photo was too narrow for a square around the box; its aspect ratio is lost


def pixel_box(xmin: float, xmax: float, ymin: float, ymax: float, *, width_px: int, height_px: int) -> Box:
    """Turn fractions [0, 1] into whole pixels: at least one pixel wide, inside the image."""
    x0 = min(int(xmin * width_px), width_px - 1)
    y0 = min(int(ymin * height_px), height_px - 1)
    x1 = min(max(int(xmax * width_px), x0 + 1), width_px)
    y1 = min(max(int(ymax * height_px), y0 + 1), height_px)
    return Box(x0, y0, x1, y1)


def padded(box: Box, pad_px: int, *, width_px: int, height_px: int) -> Box:
    """Grow by `pad_px` on each side, less where the image ends (upstream: 10 px around the reference)."""
    return Box(
        max(box.x0 - pad_px, 0),
        max(box.y0 - pad_px, 0),
        min(box.x1 + pad_px, width_px),
        min(box.y1 + pad_px, height_px),
    )


def extended(box: Box, *, width_px: int, height_px: int, extend_frac: float, rng: np.random.Generator) -> Box:
    """Push each side out by an inclusive uniform integer in [0, int(extend_frac * room)], room = px to the border.

    Four independent draws, order left, top, right, bottom.
    """

    def draw(room: int) -> int:
        return int(rng.integers(0, int(extend_frac * room), endpoint=True))

    return Box(
        box.x0 - draw(box.x0),
        box.y0 - draw(box.y0),
        box.x1 + draw(width_px - box.x1),
        box.y1 + draw(height_px - box.y1),
    )


def square_window(ext: Box, *, width_px: int, height_px: int, shrink_frac: float, rng: np.random.Generator) -> Window:
    """The crop around the extended box.

    A window of the image's short side slides along the long side, keeping `ext` inside; then r px are cut off
    all four sides, r uniform in [0, int(shrink_frac * free)], free = the smallest distance from `ext` to the
    window. When at most one square of the short side holds `ext` (it is too long, or as long as the side, or it touches
    both ends of the sliding range), the whole photo is taken and squashed, as upstream, whose test is `last <= first`.
    """
    if width_px == height_px:
        return Window(Box(0, 0, width_px, height_px), squashed=False)
    landscape = width_px > height_px
    side, length = (height_px, width_px) if landscape else (width_px, height_px)
    low, high = (ext.x0, ext.x1) if landscape else (ext.y0, ext.y1)
    first, last = max(high - side, 0), min(low + side, length) - side
    if last <= first:
        return Window(Box(0, 0, width_px, height_px), squashed=True)
    start = int(rng.integers(first, last, endpoint=True))
    x0, y0 = (start, 0) if landscape else (0, start)
    free = min(ext.x0 - x0, ext.y0 - y0, x0 + side - ext.x1, y0 + side - ext.y1)
    cut = int(rng.integers(0, int(shrink_frac * free), endpoint=True))
    return Window(Box(x0 + cut, y0 + cut, x0 + side - cut, y0 + side - cut), squashed=False)


def context_side_px(box: Box, factor: float, *, width_px: int, height_px: int) -> int:
    """Side of a square that shows the box with its context: about `factor` times the box's longer side.

    At least a pixel more than the box on each side, if the photo has room; at most the photo's short side.
    """
    return round(min(max(box.longer_px * factor, box.longer_px + 2), width_px, height_px))


def context_area(box: Box, *, width_px: int, height_px: int, factor: float, rng: np.random.Generator) -> Box:
    """The part of the photo that a crop of a small box is cut from: a square of `context_side_px` that holds the box.

    Every place that does so is equally likely. Without a draw it is the whole photo, where no smaller square will do.
    Ours; upstream cuts from the photo.
    """
    side = context_side_px(box, factor, width_px=width_px, height_px=height_px)
    if side == min(width_px, height_px):
        return Box(0, 0, width_px, height_px)
    left = int(rng.integers(max(box.x1 - side, 0), min(box.x0, width_px - side), endpoint=True))
    top = int(rng.integers(max(box.y1 - side, 0), min(box.y0, height_px - side), endpoint=True))
    return Box(left, top, left + side, top + side)


def area_frac(xmin: np.ndarray, xmax: np.ndarray, ymin: np.ndarray, ymax: np.ndarray) -> np.ndarray:
    """Relative box area in [0, 1] (upstream's only filter)."""
    return (xmax - xmin) * (ymax - ymin)
