"""One photo and one box to one training triplet: source crop, two holes, reference.

`cut_triplet` is a pure function of its arguments; all randomness comes from the row's generator.
Source: upstream ldm/data/open-images.py (REFERENCE 1.3 a-d).
Deviations: both hole shapes are cut for the same crop, so that training can pick; masks are rounded to 0 or 1
after the resize (upstream leaves fractional edges); the reference is stored clean, augmentation comes later.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from pbe.data import boxes, images, masks
from pbe.data.boxes import Box


@dataclass(frozen=True)
class CutConfig:
    """Sizes in pixels and fractions; see params.yaml `materialize` for units and sources."""

    image_px: int
    reference_px: int
    reference_pad_px: int
    box_extend_frac: float
    crop_shrink_frac: float
    bezier_points_per_side: int
    bezier_jitter_px: int


@dataclass(frozen=True)
class Triplet:
    """source (S, S, 3) uint8; hole masks (S, S) uint8, 1 = hole; reference (R, R, 3) uint8; box in crop pixels."""

    source: np.ndarray
    box_hole_mask: np.ndarray
    bezier_hole_mask: np.ndarray
    reference: np.ndarray
    box_px: tuple[float, float, float, float]


def cut_triplet(image: np.ndarray, box: Box, *, cfg: CutConfig, rng: np.random.Generator) -> Triplet:
    """image: (H, W, 3) uint8 RGB. box: tight, in pixels of `image`."""
    height_px, width_px = image.shape[:2]
    ext = boxes.extended(box, width_px=width_px, height_px=height_px, extend_frac=cfg.box_extend_frac, rng=rng)
    window = boxes.square_window(
        ext, width_px=width_px, height_px=height_px, shrink_frac=cfg.crop_shrink_frac, rng=rng
    ).box
    ring = masks.bezier_ring(
        box, ext, points_per_side=cfg.bezier_points_per_side, jitter_px=cfg.bezier_jitter_px, rng=rng
    )
    size_px, box_px = cfg.image_px, _in_crop(box, window, cfg.image_px)
    # the polygon is drawn at the photo's size but inside the window alone, which is smaller than the photo
    polygon = masks.bezier_hole(ring - (window.x0, window.y0), width_px=window.width_px, height_px=window.height_px)
    box_hole = masks.box_hole(_in_crop(ext, window, size_px), width_px=size_px, height_px=size_px)
    # bilinear without antialias, as upstream; rounded, because the mask is one of 0 and 1
    bezier_hole = cv2.resize(polygon, (size_px, size_px), interpolation=cv2.INTER_LINEAR)
    return Triplet(
        source=_cut(image, window, size_px),
        box_hole_mask=_with_centre(box_hole, box_px),
        bezier_hole_mask=_with_centre(bezier_hole, box_px),
        reference=cut_reference(image, box, cfg=cfg),
        box_px=box_px,
    )


def cut_reference(image: np.ndarray, box: Box, *, cfg: CutConfig) -> np.ndarray:
    """The padded tight box, squashed to (R, R, 3) uint8 (upstream does not keep the aspect ratio either)."""
    height_px, width_px = image.shape[:2]
    area = boxes.padded(box, cfg.reference_pad_px, width_px=width_px, height_px=height_px)
    return _cut(image, area, cfg.reference_px)


def box_order(box_count: int, rng: np.random.Generator) -> np.ndarray:
    """Permutation of one image's boxes: slot s takes box_order[s % box_count]."""
    return rng.permutation(box_count)


def _cut(image: np.ndarray, area: Box, size_px: int) -> np.ndarray:
    return images.resize(image[area.y0 : area.y1, area.x0 : area.x1], width_px=size_px, height_px=size_px)


def _in_crop(box: Box, window: Box, size_px: int) -> tuple[float, float, float, float]:
    """x0, y0, x1, y1 in pixels of the crop that `window` becomes."""
    scale_x, scale_y = size_px / window.width_px, size_px / window.height_px
    return (
        (box.x0 - window.x0) * scale_x,
        (box.y0 - window.y0) * scale_y,
        (box.x1 - window.x0) * scale_x,
        (box.y1 - window.y0) * scale_y,
    )


def _with_centre(hole_mask: np.ndarray, box_px: tuple[float, float, float, float]) -> np.ndarray:
    """A triplet needs a hole: one that fell between the pixels, or was jittered out of sight, is the box's centre."""
    if not hole_mask.any():
        x0, y0, x1, y1 = box_px
        last = hole_mask.shape[0] - 1
        hole_mask[min(int((y0 + y1) / 2), last), min(int((x0 + x1) / 2), last)] = 1
    return hole_mask
