"""Contact sheets: small pictures in rows, for the report and MLflow."""

from collections.abc import Sequence

import numpy as np

from pbe.data import images
from pbe.evaluate.items import EditedItem

TILE_PX = 96
HOLE_GREY = 128


def sheet(rows: Sequence[Sequence[np.ndarray]], *, gap_px: int = 2) -> np.ndarray:
    """Rows of (h, w, 3) uint8 pictures, each scaled to TILE_PX, on white."""
    height_px = len(rows) * (TILE_PX + gap_px) + gap_px
    width_px = max(map(len, rows)) * (TILE_PX + gap_px) + gap_px
    out = np.full((height_px, width_px, 3), 255, np.uint8)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            top, left = gap_px + y * (TILE_PX + gap_px), gap_px + x * (TILE_PX + gap_px)
            out[top : top + TILE_PX, left : left + TILE_PX] = images.resize(
                picture, width_px=TILE_PX, height_px=TILE_PX
            )
    return out


def with_hole(source: np.ndarray, hole_mask: np.ndarray) -> np.ndarray:
    """The source with its hole painted mid grey, as the network sees it."""
    return np.where(hole_mask[..., None] > 0, np.uint8(HOLE_GREY), source)


def edit_grid(items: Sequence[EditedItem], *, columns: int) -> np.ndarray:
    """Rows: photo, hole, own reference, its edit, foreign reference, its edit. Items evenly spaced, none chosen."""
    chosen = [items[index] for index in np.linspace(0, len(items) - 1, min(columns, len(items))).round().astype(int)]
    return sheet(
        [
            [item.source for item in chosen],
            [with_hole(item.source, item.hole_mask) for item in chosen],
            [item.own_reference for item in chosen],
            [item.own_edit for item in chosen],
            [item.foreign_reference for item in chosen],
            [item.foreign_edit for item in chosen],
        ]
    )
