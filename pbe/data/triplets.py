"""Cut one training triplet from a photo and a box: source crop, two holes, reference.

`plan_triplet` makes all random choices (crop and holes) without reading a pixel; `cut` cuts the source and the
reference from the photo. Both are pure functions of their arguments.
Source: upstream ldm/data/open-images.py, `OpenImageDataset.__getitem__`.
Deviations: each crop has both hole shapes, and where its object has a mask a third, the object itself, so that
training can pick; they are drawn in the crop, where a pixel is 0 or 1 (upstream draws in the photo and resizes, which
leaves fractional edges); the reference is stored clean, augmentation comes later.
"""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from pbe.data import boxes, images, masks
from pbe.data.boxes import Box
from pbe.data.object_masks import ObjectMask
from pbe.data.settings import MaterializeConfig

Edges = tuple[float, float, float, float]


@dataclass(frozen=True)
class Plan:
    """A triplet without the photo's pixels.

    window, reference: the areas, in pixels of the photo, that become source and reference. Hole masks: (S, S)
    uint8, 1 = hole. box_px: the tight box, x0, y0, x1, y1 in pixels of the S x S crop.
    """

    window: Box
    reference: Box
    box_hole_mask: np.ndarray
    bezier_hole_mask: np.ndarray
    box_px: Edges


def plan_triplet(box: Box, *, width_px: int, height_px: int, cfg: MaterializeConfig, rng: np.random.Generator) -> Plan:
    """Choose the crop and draw both holes. box: the tight box, in pixels of a photo of the given size."""
    ext, window = _hole_and_crop(box, width_px=width_px, height_px=height_px, cfg=cfg, rng=rng)
    ring = masks.bezier_ring(
        box, ext, points_per_side=cfg.bezier_points_per_side, jitter_px=cfg.bezier_jitter_px, rng=rng
    )
    size_px, box_px = cfg.image_px, _in_crop(box, window, cfg.image_px)
    ring_px = (ring - (window.x0, window.y0)) * (size_px / window.width_px, size_px / window.height_px)
    box_hole = masks.box_hole(_in_crop(ext, window, size_px), width_px=size_px, height_px=size_px)
    bezier_hole = masks.bezier_hole(ring_px, width_px=size_px, height_px=size_px)
    return Plan(
        window=window,
        reference=reference_area(box, width_px=width_px, height_px=height_px, cfg=cfg),
        box_hole_mask=_with_centre(box_hole, box_px),
        bezier_hole_mask=_with_centre(bezier_hole, box_px),
        box_px=box_px,
    )


def _hole_and_crop(
    box: Box, *, width_px: int, height_px: int, cfg: MaterializeConfig, rng: np.random.Generator
) -> tuple[Box, Box]:
    """The extended box and the crop, in pixels of the photo; by `context_factor` as if the square around the box were
    the photo."""
    area = Box(0, 0, width_px, height_px)
    if cfg.context_factor is not None:
        area = boxes.context_area(box, width_px=width_px, height_px=height_px, factor=cfg.context_factor, rng=rng)
    size = {"width_px": area.width_px, "height_px": area.height_px}
    ext = boxes.extended(box.moved(-area.x0, -area.y0), **size, extend_frac=cfg.box_extend_frac, rng=rng)
    window = boxes.square_window(ext, **size, shrink_frac=cfg.crop_shrink_frac, rng=rng).box
    return ext.moved(area.x0, area.y0), window.moved(area.x0, area.y0)


def reference_area(box: Box, *, width_px: int, height_px: int, cfg: MaterializeConfig) -> Box:
    """Area of the photo that becomes the reference: the tight box, padded up to the photo's edges."""
    return boxes.padded(box, cfg.reference_pad_px, width_px=width_px, height_px=height_px)


def cut(photo: np.ndarray, area: Box, size_px: int) -> np.ndarray:
    """Cut an area from the (H, W, 3) uint8 photo and squash it to (size, size, 3), as upstream does."""
    return images.resize(photo[area.y0 : area.y1, area.x0 : area.x1], width_px=size_px, height_px=size_px)


BACKGROUNDS = {"white": 255, "grey": 128}


def without_background(reference: np.ndarray, object_mask: np.ndarray, background: str) -> np.ndarray:
    """The (R, R, 3) uint8 reference with one level where its (R, R) mask of 0/1 shows no object."""
    return cv2.copyTo(reference, object_mask, np.full_like(reference, BACKGROUNDS[background]))


def segmentation_hole(
    mask: ObjectMask, plan: Plan, *, cfg: MaterializeConfig, rng: Callable[[], np.random.Generator]
) -> np.ndarray:
    """(S, S) uint8, 1 = hole: the object in the plan's crop, grown and jittered as the settings ask."""
    hole = masks.segmentation_hole(
        mask.cut(plan.window, cfg.image_px),
        dilate_px=cfg.segmentation_dilate_px,
        jitter_px=cfg.segmentation_jitter_px,
        rng=rng,
    )
    return hole if hole.any() else _with_centre(hole, plan.box_px)


def box_order(box_count: int, rng: np.random.Generator) -> np.ndarray:
    """Random permutation of one image's boxes: slot s takes box_order[s % box_count]."""
    return rng.permutation(box_count)


def _in_crop(box: Box, window: Box, size_px: int) -> Edges:
    """The box's x0, y0, x1, y1 in pixels of the crop that `window` becomes."""
    scale_x, scale_y = size_px / window.width_px, size_px / window.height_px
    return (
        (box.x0 - window.x0) * scale_x,
        (box.y0 - window.y0) * scale_y,
        (box.x1 - window.x0) * scale_x,
        (box.y1 - window.y0) * scale_y,
    )


def _with_centre(hole_mask: np.ndarray, box_px: Edges) -> np.ndarray:
    """Mark the box's centre as hole: a small hole may fall between pixels or be jittered away."""
    x0, y0, x1, y1 = box_px
    last = hole_mask.shape[0] - 1
    hole_mask[min(int((y0 + y1) / 2), last), min(int((x0 + x1) / 2), last)] = 1
    return hole_mask
