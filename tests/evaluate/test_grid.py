"""Grids of edits: which picture stands where."""

import numpy as np

from pbe.data import images
from pbe.data.contact import TILE_PX
from pbe.data.masks import pack_mask
from pbe.evaluate.grid import DIVERSITY, edit_grid, fill_rows, sweep_fills

SIDE_PX = 8


def _flat(level: int) -> bytes:
    return images.encode_png(np.full((SIDE_PX, SIDE_PX, 3), level, np.uint8))


def _edit(bench_id: str, seed: int, level: int) -> dict[str, object]:
    return {"bench_id": bench_id, "seed": seed, "edit": _flat(level)}


def test_scales_stand_in_the_order_of_numbers_and_noises_in_that_of_seeds() -> None:
    """10 comes before 2 in the manifest's JSON."""
    edits = {"1": [_edit("a", 42, 1)], "10": [_edit("a", 42, 10)], "2": [_edit("a", 42, 2)]}
    found = sweep_fills(edits | {DIVERSITY: [_edit("a", 10, 4), _edit("a", 9, 3)]})
    assert list(found["guidance"]) == ["scale 1", "scale 2", "scale 10"]
    assert found["guidance"]["scale 10"] == {"a": _flat(10)}
    assert list(found[DIVERSITY]) == ["noise 9", "noise 10"] and found[DIVERSITY]["noise 9"] == {"a": _flat(3)}


def test_rows_are_photo_hole_reference_and_fills_and_a_missing_fill_is_none() -> None:
    hole = np.zeros((SIDE_PX, SIDE_PX), np.uint8)
    hole[:4] = 1
    items = [
        {"bench_id": name, "source": _flat(200), "box_hole_mask": pack_mask(hole), "exemplar": _flat(level)}
        for name, level in (("a", 50), ("b", 60))
    ]
    rows = fill_rows(items, {"ours": {"b": _flat(70)}}, hole_kind="box", reference_kind="exemplar")
    assert [label for label, _ in rows] == ["photo", "box hole", "exemplar", "ours"]
    photo, holed, reference, ours = (pictures for _, pictures in rows)
    assert photo[0] is not None and holed[0] is not None
    assert (photo[0] == 200).all() and (holed[0][4:] == 200).all() and (holed[0][:4] == 128).all()
    assert [int(picture[0, 0, 0]) for picture in reference if picture is not None] == [50, 60]
    assert ours[0] is None and ours[1] is not None and (ours[1] == 70).all()


def test_a_grid_of_two_references_shows_photo_and_hole_once() -> None:
    hole = np.zeros((SIDE_PX, SIDE_PX), np.uint8)
    hole[:4] = 1
    item = {"bench_id": "a", "source": _flat(200), "box_hole_mask": pack_mask(hole)}
    bench = [{**item, "exemplar": _flat(50), "own": _flat(60)}, {**item, "bench_id": "lacks one"}]
    edits = {("a", "exemplar"): _flat(70), ("a", "own"): _flat(80), ("lacks one", "own"): _flat(90)}
    grid = edit_grid(bench, edits, hole_kind="box", reference_kinds=("exemplar", "own"), columns=4)
    step = TILE_PX + 2
    assert grid.shape[:2] == (6 * step + 2, step + 2)
    assert [int(grid[row * step + step - 4, step // 2, 0]) for row in range(6)] == [200, 200, 50, 70, 60, 80]
