"""Which fills of a bench item there are: not every item has an object's mask, a true other view, or a caption."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pbe.data.masks import unpack_mask
from pbe.data.schema import CAPTION_FORMS, CaptionForm, HoleKind, ReferenceKind

Scope = tuple[HoleKind, ReferenceKind | CaptionForm]
WITH_OBJECT_MASKS: tuple[ReferenceKind, ...] = ("exemplar", "own", "foreign")


def scopes_of(
    row: Mapping[str, Any], holes: Sequence[HoleKind], references: Sequence[ReferenceKind | CaptionForm]
) -> list[Scope]:
    """The pairs of a hole and a reference that a row of BENCH has, of those that are asked for."""
    return [(hole, reference) for hole in holes for reference in references if has_scope(row, hole, reference)]


def has_scope(row: Mapping[str, Any], hole_kind: str, reference_kind: str) -> bool:
    """Whether a row of BENCH has this hole, and what fills it."""
    column = "exemplar_caption" if reference_kind == "caption" else picture_column(reference_kind)
    return row.get(f"{hole_kind}_hole_mask") is not None and row.get(column) is not None


def picture_column(reference_kind: str) -> str:
    """The column of BENCH with the picture that a fill is compared with: captions describe the exemplar."""
    return "exemplar" if reference_kind in CAPTION_FORMS else reference_kind


def object_mask_of(row: Mapping[str, Any], reference_kind: str, reference: np.ndarray) -> np.ndarray | None:
    """(h, w) uint8 of 0/1, 1 where the (h, w, 3) reference of a row of BENCH shows its object; None if unknown."""
    packed = row.get(f"{reference_kind}_object_mask")
    if packed is None:
        return None
    return unpack_mask(packed, width_px=reference.shape[1], height_px=reference.shape[0])
