"""Grids of edits beside their references, for MLflow and the report."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pbe.data import images
from pbe.data.contact import sheet, with_hole
from pbe.data.masks import hole_of
from pbe.evaluate.bench.scopes import picture_column

DIVERSITY = "diversity"  # key beside the guidance scales of a sweep
INPUT_PX = 64, 128  # side of each input beside an edit, at least and at most


def edit_grid(
    bench: Sequence[Mapping[str, Any]],
    edits: Mapping[tuple[str, str], bytes],
    *,
    hole_kind: str,
    reference_kinds: Sequence[str],
    columns: int,
) -> np.ndarray:
    """Return an (H, W, 3) uint8 grid of evenly spaced items: photo, hole, then each reference and its edit.

    bench: rows of BENCH. edits: encoded pictures by bench id and reference kind; items without all edits are skipped.
    """
    whole = [row for row in bench if all((row["bench_id"], kind) in edits for kind in reference_kinds)]
    items = [whole[index] for index in evenly_spaced(len(whole), columns)]
    rows: list[list[np.ndarray]] = []
    for kind in reference_kinds:
        fills = {kind: {item["bench_id"]: edits[item["bench_id"], kind] for item in items}}
        start, *found = fill_rows(items, fills, hole_kind=hole_kind, reference_kind=kind)
        shown = found[1:] if rows else [start, *found]  # show photo and hole only once
        rows += [[picture for picture in pictures if picture is not None] for _, pictures in shown]
    return sheet(rows)


def evenly_spaced(count: int, most: int) -> np.ndarray:
    """Return (N,) int indices of at most `most` of `count` things, the first and the last among them."""
    return np.linspace(0, count - 1, min(most, count)).round().astype(int)


def edit_beside_inputs(item: Mapping[str, Any], edit: bytes, *, hole_kind: str) -> np.ndarray:
    """Return a (3 s, 4 s, 3) uint8 picture: photo, hole and exemplar in a column, and the edit three times their size.

    item: a row of BENCH. s: a third of the edit's width, within INPUT_PX.
    """
    shown, source = images.decode(edit), images.decode(item["source"])
    side_px = int(np.clip(round(shown.shape[1] / 3), *INPUT_PX))

    def scaled(picture: np.ndarray, px: int) -> np.ndarray:
        return images.resize(picture, width_px=px, height_px=px)

    inputs = [source, with_hole(source, hole_of(item, hole_kind, source)), images.decode(item["exemplar"])]
    column = np.concatenate([scaled(picture, side_px) for picture in inputs])
    return np.concatenate([column, scaled(shown, 3 * side_px)], axis=1)


def fill_rows(
    items: Sequence[Mapping[str, Any]],
    fills: Mapping[str, Mapping[str, bytes]],
    *,
    hole_kind: str,
    reference_kind: str,
) -> list[tuple[str, list[np.ndarray | None]]]:
    """Return labelled rows of pictures, one column per item: photo, hole, reference, then one row per entry of `fills`.

    items: rows of BENCH. fills: row label -> bench id -> encoded picture; a missing picture becomes None.
    """
    shown = picture_column(reference_kind)
    sources = [images.decode(item["source"]) for item in items]
    holes = [with_hole(source, hole_of(item, hole_kind, source)) for item, source in zip(items, sources, strict=True)]
    rows: list[tuple[str, list[np.ndarray | None]]] = [
        ("photo", [*sources]),
        (f"{hole_kind} hole", [*holes]),
        (shown, [images.decode(item[shown]) for item in items]),
    ]
    for label, found in fills.items():
        encoded = [found.get(item["bench_id"]) for item in items]
        rows.append((label, [images.decode(data) if data is not None else None for data in encoded]))
    return rows


def fills_by_seed(edits: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, bytes]]:
    """Group rows of EDITS: seed as text, ascending -> bench id -> encoded picture."""
    out: dict[int, dict[str, bytes]] = {}
    for row in edits:
        out.setdefault(row["seed"], {})[row["bench_id"]] = row["edit"]
    return {str(seed): out[seed] for seed in sorted(out)}


def sweep_fills(edits: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, dict[str, bytes]]]:
    """Return the fills of the sweep's two grids, `guidance` and `diversity`: row label -> bench id -> encoded picture.

    edits: rows of EDITS by guidance scale (one seed each); those under DIVERSITY have several seeds.
    """
    scales = {}
    for name in sorted(edits.keys() - {DIVERSITY}, key=float):  # manifests sort them as text
        [scales[f"scale {name}"]] = fills_by_seed(edits[name]).values()
    return {
        "guidance": scales,
        DIVERSITY: {f"noise {seed}": fills for seed, fills in fills_by_seed(edits[DIVERSITY]).items()},
    }
