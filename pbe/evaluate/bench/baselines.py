"""Baselines without a model: the hole left open, the reference pasted, Poisson-blended, or in the colours of the photo.

Sources: the paper, section 3.2 (copy-and-paste, the trivial solution that it fights);
Perez et al. 2003, "Poisson image editing"; Reinhard et al. 2001, "Color transfer between images". Upstream has no code
for any.

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
_RING_FRAC = 0.1  # width of the ring of `colour_transfer`, of the longer side of the hole's bounding box
_RING_MIN_PX = 3
_TELEA_RADIUS_PX = 3

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
    destination = _filled(source, hole, nearest_outside(source, hole))
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


def colour_transfer(
    source: np.ndarray, hole_mask: np.ndarray, reference: np.ndarray, object_mask: np.ndarray | None = None
) -> np.ndarray:
    """`composite` with the mean and standard deviation, per channel, of the ring around the hole: Reinhard et al.

    The ring is the photo within a tenth of the longer side of the hole's box, and at least 3 px. Where a hole covers
    the whole photo there is none, and the composite stays as it is. Deviations: CIELAB in place of their l-alpha-beta,
    whose logarithm has no value for black; statistics of the ring, not of the whole photo.
    """
    hole = _checked(source, hole_mask)
    edit, pasted = composite(source, hole_mask, reference, object_mask)
    ring = _ring(hole)
    if ring.any():
        edit[pasted] = _with_statistics_of(edit[pasted], source[ring])
    return edit


def composite(
    source: np.ndarray, hole_mask: np.ndarray, reference: np.ndarray, object_mask: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """What harmonisation starts from: the reference pasted as by `copy_paste`, and (S, T) bool, True where it lies.

    object_mask: (h, w), non-zero where the reference shows its object. With one, only the object is pasted, and the
    rest of the hole is inpainted by OpenCV's Telea. A mask of which the hole shows nothing counts as none.
    """
    hole = _checked(source, hole_mask)
    pasted = hole if object_mask is None else hole & _placed_mask(object_mask, reference, hole)
    if not pasted.any() or pasted is hole:
        return _filled(source, hole, _placed(reference, hole)), hole
    # Telea leaves a hole that covers the whole photo as it is: grey, then, not the answer
    empty = _filled(source, hole, np.full_like(source, HOLE_GREY))
    background = cv2.inpaint(empty, hole.astype(np.uint8), _TELEA_RADIUS_PX, cv2.INPAINT_TELEA)
    return _filled(background, pasted, _placed(reference, hole)), pasted


def _ring(hole: np.ndarray) -> np.ndarray:
    """(S, T) bool: the photo around the hole."""
    _, _, width, height = cv2.boundingRect(hole.astype(np.uint8))
    ring_px = max(_RING_MIN_PX, round(_RING_FRAC * max(width, height)))
    square = np.ones((2 * ring_px + 1,) * 2, np.uint8)
    return (cv2.dilate(hole.astype(np.uint8), square) != 0) & ~hole


def _with_statistics_of(colours: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """(n, 3) uint8 colours moved to the mean and standard deviation of (m, 3) others, per channel of CIELAB."""
    lab, other = (cv2.cvtColor(c[None].astype(np.float32) / 255, cv2.COLOR_RGB2Lab)[0] for c in (colours, wanted))
    std = lab.std(0)
    scale = np.divide(other.std(0), std, out=np.ones_like(std), where=std > 1e-3)  # one colour has no contrast to move
    moved = (lab - lab.mean(0)) * scale + other.mean(0)
    return np.rint(cv2.cvtColor(moved[None], cv2.COLOR_Lab2RGB)[0].clip(0, 1) * 255).astype(np.uint8)


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
    left, top, width, height = cv2.boundingRect(hole.astype(np.uint8))
    patch = resize(reference, width_px=width, height_px=height)
    margins = ((top, hole.shape[0] - top - height), (left, hole.shape[1] - left - width), (0, 0))
    return np.pad(patch, margins, "edge")


def _placed_mask(object_mask: np.ndarray, reference: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """(S, T) bool: the reference's mask where `_placed` puts the reference."""
    if object_mask.shape != reference.shape[:2]:
        raise ValueError(f"object_mask {object_mask.shape} does not match the reference {reference.shape}")
    left, top, width, height = cv2.boundingRect(hole.astype(np.uint8))
    placed = np.zeros(hole.shape, bool)
    grey = (object_mask != 0).astype(np.uint8) * np.uint8(255)
    placed[top : top + height, left : left + width] = resize(grey, width_px=width, height_px=height) >= 128
    return placed


def nearest_outside(source: np.ndarray, hole: np.ndarray) -> np.ndarray:
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
