"""Bench rows joined with their edits, decoded: what the metrics and the pictures work on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pbe.data import images
from pbe.data.masks import unpack_mask


@dataclass(frozen=True)
class EditedItem:
    """One bench item with its edits; images (h, w, 3) uint8, hole_mask (S, S) of 0/1."""

    bench_id: str
    image_id: str
    hole_kind: str
    source: np.ndarray
    hole_mask: np.ndarray
    own_reference: np.ndarray
    foreign_reference: np.ndarray
    own_edit: np.ndarray
    foreign_edit: np.ndarray


def edited_items(bench: Sequence[Mapping[str, Any]], edits: Sequence[Mapping[str, Any]]) -> list[EditedItem]:
    """Rows of BENCH and of EDITS, in the same order. Raises ValueError when they do not belong together."""
    out = []
    for row, edit in zip(bench, edits, strict=True):
        if row["bench_id"] != edit["bench_id"]:
            raise ValueError(f"edit of {edit['bench_id']} stands where the bench has {row['bench_id']}")
        source = images.decode(row["source"])
        out.append(
            EditedItem(
                bench_id=row["bench_id"],
                image_id=row["image_id"],
                hole_kind=row["hole_kind"],
                source=source,
                hole_mask=unpack_mask(row["hole_mask"], width_px=source.shape[1], height_px=source.shape[0]),
                own_reference=images.decode(row["own_reference"]),
                foreign_reference=images.decode(row["foreign_reference"]),
                own_edit=images.decode(edit["own_edit"]),
                foreign_edit=images.decode(edit["foreign_edit"]),
            )
        )
    return out
