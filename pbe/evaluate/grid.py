"""The grid of edits beside their references, for MLflow."""

from collections.abc import Sequence

import numpy as np

from pbe.data.contact import sheet, with_hole
from pbe.evaluate.items import EditedItem


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
