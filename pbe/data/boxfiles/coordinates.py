"""The one tolerance of box coordinates: what ends outside the photo by less than its format rounds is clipped."""

import numpy as np

# Fractions are written with six digits or more. Pixels are whole in many tools, and some count from 1.
FRACTION_SLACK, PIXEL_SLACK = 1e-5, 1.0
ALLOWED = "fractions 0 <= min < max <= 1 are allowed"  # ends the detail of a box outside


def clip(ends: np.ndarray, slack: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
    """Clip fractions that end at most `slack` outside [0, 1]; those further out, and NaN, stay.

    ends: (4, N) float64 xmin, xmax, ymin, ymax. slack: a fraction, or (4, N). Returns the clipped ends, and (N,) bool:
    True for the boxes that changed.
    """
    with np.errstate(invalid="ignore"):
        near = (ends >= -slack) & (ends <= 1 + slack)
    clipped = np.where(near, np.clip(ends, 0.0, 1.0), ends)
    with np.errstate(invalid="ignore"):
        changed = ((clipped != ends) & near).any(axis=0)
    return clipped, changed


def inside(ends: np.ndarray) -> np.ndarray:
    """(N,) bool: True for boxes with 0 <= min < max <= 1. ends: (4, N) xmin, xmax, ymin, ymax."""
    xmin, xmax, ymin, ymax = ends
    with np.errstate(invalid="ignore"):
        return (xmin >= 0) & (xmin < xmax) & (xmax <= 1) & (ymin >= 0) & (ymin < ymax) & (ymax <= 1)


def pixel_slack(width_px: np.ndarray, height_px: np.ndarray) -> np.ndarray:
    """(4, N) of PIXEL_SLACK, in fractions of photos of these sizes, each (N,)."""
    return np.stack([PIXEL_SLACK / side for side in (width_px, width_px, height_px, height_px)])
