"""Baselines without a model: the hole left open, the reference pasted, the reference Poisson-blended.

Sources: the paper, section 3.2 (copy-and-paste, the trivial solution that it fights);
Perez et al. 2003, "Poisson image editing". Upstream has no code for either.

All take source (S, T, 3) uint8 RGB, hole_mask (S, T), non-zero where the edit goes, and, except for the first,
reference (h, w, 3) uint8 RGB. All return (S, T, 3) uint8, equal to the source outside the hole; none reads the source
inside it, which is the answer. Raises ValueError for other shapes or dtypes and for an empty hole.
"""

from typing import Literal

import cv2
import numpy as np

from pbe.data.images import resize

# The masked photo is the photo times 0 in the hole, in -1..1: that is 127.5.
HOLE_GREY = 128
# seamlessClone erodes its mask by this much, three times a 3 x 3 square, and takes what is eroded as destination.
_ERODED_PX = 3
_PAD_PX = _ERODED_PX + 2  # it also blanks the outermost row and column of the mask

Margins = tuple[int, int, int, int]  # top, bottom, left, right


def hole_kept(source: np.ndarray, hole_mask: np.ndarray) -> np.ndarray:
    """The photo as the model sees it, with the hole filled with HOLE_GREY: what a method must beat."""
    return _filled(source, _checked(source, hole_mask), np.full_like(source, HOLE_GREY))


def copy_paste(source: np.ndarray, hole_mask: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The reference resized to the hole's bounding box (aspect ratio not kept), seen through the hole."""
    hole = _checked(source, hole_mask)
    return _filled(source, hole, _placed(reference, hole))


def poisson(source: np.ndarray, hole_mask: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The same placement, blended by OpenCV's seamlessClone, NORMAL_CLONE: the reference's gradients between the
    photo's borders.

    A hole that covers the whole photo has no border to blend with: there it is `copy_paste`, the only exception.

    seamlessClone, called plainly, holds the outermost 3 px inside its mask at the destination, which would hand it the
    true content of the hole; it solves over the mask's bounding box, not over the mask; and it drops a mask that
    touches the photo's edge by one pixel, which moves the patch. So: the hole's pixels are replaced by the nearest
    ones of the photo, the photo is mirrored where the hole touches its edge and padded elsewhere, the mask grows by
    those 3 px, and outside the hole the photo is put back.
    Against the exact solution on the hole (sparse solver, 12 photo pairs, mean absolute difference in levels of 255):
    64 px, box 5.0, ellipse 7.8; 256 px, box 2.4, ellipse 5.9; the plain call, on a photo that still has its content:
    26, 33, 11 and 14. What remains shows as a faint seam around holes that are not boxes.
    """
    hole = _checked(source, hole_mask)
    patch = _placed(reference, hole)
    if hole.all():
        return patch
    destination = _filled(source, hole, _nearest_outside(source, hole))
    mirrored = _mirrored_px(hole)
    mask = _padded(hole.astype(np.uint8), mirrored, "constant")
    mask = cv2.dilate(mask, np.ones((2 * _ERODED_PX + 1,) * 2, np.uint8))
    mask[[0, -1]] = mask[:, [0, -1]] = 0
    x, y, width, height = cv2.boundingRect(mask)
    middle = (x + width // 2, y + height // 2)  # seamlessClone halves in integers too: the patch stays where it is
    blended = cv2.seamlessClone(
        _padded(patch, mirrored, "edge"),
        _padded(destination, mirrored, "edge"),
        mask * np.uint8(255),
        middle,
        cv2.NORMAL_CLONE,
    )
    top, left = mirrored[0] + _PAD_PX, mirrored[2] + _PAD_PX
    return _filled(source, hole, blended[top : top + source.shape[0], left : left + source.shape[1]])


def _mirrored_px(hole: np.ndarray) -> Margins:
    """Return how much of the photo to mirror beyond its top, bottom, left and right edges: the hole's length where it
    touches the edge. The mirror image gives the solution a free end there instead of an invented border.
    """
    rows, columns = np.flatnonzero(hole.any(1)), np.flatnonzero(hole.any(0))
    height, width = int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1
    return (
        height if hole[0].any() else 0,
        height if hole[-1].any() else 0,
        width if hole[:, 0].any() else 0,
        width if hole[:, -1].any() else 0,
    )


def _padded(image: np.ndarray, mirrored_px: Margins, mode: Literal["constant", "edge"]) -> np.ndarray:
    """Mirrored, then _PAD_PX more on every side: zeros for "constant", else the edge pixels."""
    top, bottom, left, right = mirrored_px
    channels = ((0, 0),) * (image.ndim - 2)
    image = np.pad(image, ((top, bottom), (left, right), *channels), "symmetric")
    return np.pad(image, ((_PAD_PX, _PAD_PX), (_PAD_PX, _PAD_PX), *channels), mode)


def _placed(reference: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """(S, T, 3) uint8: the reference on the hole's bounding box, its edge pixels repeated around it."""
    if reference.dtype != np.uint8 or reference.ndim != 3 or reference.shape[2] != 3 or 0 in reference.shape:
        raise ValueError(f"reference: {reference.dtype} {reference.shape}, expected uint8 (h, w, 3)")
    rows, columns = np.flatnonzero(hole.any(1)), np.flatnonzero(hole.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    patch = resize(reference, width_px=int(right - left), height_px=int(bottom - top))
    margins = ((top, hole.shape[0] - bottom), (left, hole.shape[1] - right), (0, 0))
    return np.pad(patch, margins, "edge")


def _nearest_outside(source: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """(S, T, 3) uint8: every pixel of the hole is the photo's nearest pixel outside it."""
    _, labels = cv2.distanceTransformWithLabels(
        hole.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
    )
    colours = np.zeros((labels.max() + 1, 3), np.uint8)
    colours[labels[~hole]] = source[~hole]  # every pixel outside the hole has its own label
    return colours[labels]


def _filled(source: np.ndarray, hole: np.ndarray, fill: np.ndarray) -> np.ndarray:
    return np.where(hole[..., None], fill, source)


def _checked(source: np.ndarray, hole_mask: np.ndarray) -> np.ndarray:
    """(S, T) bool, True in the hole."""
    if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
        raise ValueError(f"source: {source.dtype} {source.shape}, expected uint8 (S, T, 3)")
    if hole_mask.shape != source.shape[:2]:
        raise ValueError(f"hole_mask {hole_mask.shape} does not match the source {source.shape}")
    hole = hole_mask != 0
    if not hole.any():
        raise ValueError("hole_mask is empty")
    return hole
