"""The grid of edits beside their references, for MLflow."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pbe.data import images
from pbe.data.contact import sheet, with_hole
from pbe.evaluate.views import hole_of


def edit_grid(
    bench: Sequence[Mapping[str, Any]],
    edits: Mapping[tuple[str, str], bytes],
    *,
    hole_kind: str,
    reference_kinds: Sequence[str],
    columns: int,
) -> np.ndarray:
    """(H, W, 3) uint8. Rows: photo, hole, and for every kind of reference the reference and its edit. Items evenly
    spaced, none chosen.

    bench: rows of BENCH. edits: encoded pictures by bench id and reference kind; items that lack one are left out.
    """
    whole = [row for row in bench if all((row["bench_id"], kind) in edits for kind in reference_kinds)]
    chosen = [whole[index] for index in np.linspace(0, len(whole) - 1, min(columns, len(whole))).round().astype(int)]
    sources = [images.decode(row["source"]) for row in chosen]
    holes = [hole_of(row, hole_kind, source) for row, source in zip(chosen, sources, strict=True)]
    rows = [sources, [with_hole(source, hole) for source, hole in zip(sources, holes, strict=True)]]
    for kind in reference_kinds:
        rows.append([images.decode(row[kind]) for row in chosen])
        rows.append([images.decode(edits[row["bench_id"], kind]) for row in chosen])
    return sheet(rows)
