"""Can the border of the hole be seen in the edit?

Steps of brightness across a known border are how blocking artefacts are measured, against the steps that the picture
has anyway (mean squared difference of slope: Minami and Zakhor 1995; GBIM: Wu and Yuen 1997). Here the photo tells what
the picture has anyway. No counterpart upstream, and no common definition in the field.
"""

import cv2
import numpy as np


def seam(edit: np.ndarray, photo: np.ndarray, hole_mask: np.ndarray) -> float:
    """How much larger the steps across the hole's border are in the edit than in the photo, in levels of 255.

    seam = mean |E_p - E_q| - mean |P_p - P_q| over the pairs of a pixel p in the hole and a neighbour q outside it,
    side by side or one above the other, and over the channels; E is the edit, P the photo. 0: as in the untouched
    photo; below 0: smoother than it, as a fill without the photo's texture. A difference, not a ratio, which would have
    no bound for a smooth photo. Where the hole ends at the picture's border there is no pair and no seam.

    Takes images (H, W, 3) uint8 RGB and hole_mask (H, W), non-zero where the edit went. Raises ValueError for images of
    unequal size or dtype other than uint8, and for a hole of another size, or one without a border.
    """
    if edit.shape != photo.shape or edit.dtype != np.uint8 or photo.dtype != np.uint8:
        raise ValueError(f"images: {edit.dtype} {edit.shape} and {photo.dtype} {photo.shape}, expected equal uint8")
    if hole_mask.shape != photo.shape[:2]:
        raise ValueError(f"hole_mask {hole_mask.shape} does not match the image {photo.shape}")
    here, there = _across(hole_mask != 0)
    if not len(here[0]):
        raise ValueError("hole_mask is empty or covers the whole photo: it has no border")
    in_edit, in_photo = (cv2.absdiff(image[here], image[there]).mean(dtype=np.float64) for image in (edit, photo))
    return float(in_edit - in_photo)


def _across(hole: np.ndarray) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Rows and columns of the pixels on one side of the border, and of their neighbours on the other; (N,) each."""
    y, x = np.nonzero(hole[:, 1:] != hole[:, :-1])
    v, u = np.nonzero(hole[1:] != hole[:-1])
    rows, columns = np.concatenate([y, v]), np.concatenate([x, u])
    return (rows, columns), (np.concatenate([y, v + 1]), np.concatenate([x + 1, u]))
