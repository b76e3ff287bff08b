"""Contact sheets: small pictures in rows, for the report, MLflow and `pbe show`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pbe.data import images
from pbe.data.masks import HOLE_KINDS, hole_kinds_of, hole_of
from pbe.data.schema import HoleKind

TILE_PX = 96
HOLE_GREY = 128
EDIT_PX = 512  # longer side of a picture in edits_sheet
GAP_PX = 4


def sheet(rows: Sequence[Sequence[np.ndarray]], *, gap_px: int = 2) -> np.ndarray:
    """Lay out rows of (h, w, 3) uint8 pictures, each scaled to TILE_PX, on white."""
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


def triplet_sheet(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Rows: source, each kind of hole that one of them has, reference, and that of a pair where one has it.

    One column per row of TRIPLETS, white where it lacks something.
    """
    sources = [images.decode(row["source"]) for row in rows]

    def holed(kind: HoleKind) -> list[np.ndarray]:
        return [
            with_hole(source, hole_of(row, kind, source)) if kind in hole_kinds_of(row) else np.full_like(source, 255)
            for row, source in zip(rows, sources, strict=True)
        ]

    kinds = [kind for kind in HOLE_KINDS if any(kind in hole_kinds_of(row) for row in rows)]
    references = [[images.decode(row["reference"]) for row in rows]]
    if any(row.get("pair_reference") for row in rows):
        white = np.full_like(references[0][0], 255)
        references.append(
            [images.decode(row["pair_reference"]) if row.get("pair_reference") else white for row in rows]
        )
    return sheet([sources, *map(holed, kinds), *references])


def edits_sheet(
    photo: np.ndarray, hole_mask: np.ndarray, reference: np.ndarray | None, edits: Sequence[np.ndarray]
) -> np.ndarray:
    """One row: photo with its hole, reference if there is one, edits. The photo is at most EDIT_PX.

    Aspect ratios are kept.
    """
    pictures = [with_hole(photo, hole_mask), *([] if reference is None else [reference]), *edits]
    scale = min(1.0, EDIT_PX / max(photo.shape[:2]))
    height_px, width_px = (max(1, round(scale * side)) for side in photo.shape[:2])
    out = np.full((height_px, len(pictures) * (width_px + GAP_PX) - GAP_PX, 3), 255, np.uint8)
    for index, picture in enumerate(pictures):
        fit = min(height_px / picture.shape[0], width_px / picture.shape[1])
        high, wide = (max(1, round(fit * side)) for side in picture.shape[:2])
        left = index * (width_px + GAP_PX)
        out[:high, left : left + wide] = images.resize(picture, width_px=wide, height_px=high)
    return out
