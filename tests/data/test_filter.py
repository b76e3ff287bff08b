"""The area filter: limits belong to the range, every dropped box has a reason, rows stay whole and in order."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from pbe.data.filter import filter_boxes
from pbe.data.schema import BOXES, REJECT_REASONS, REJECTS, require


def _boxes(sides: list[tuple[float, float]]) -> pa.Table:
    """One box of each width and height, from the top left corner."""
    flags = dict.fromkeys(("is_occluded", "is_truncated", "is_group_of", "is_depiction", "is_inside"), -1)
    rows = [
        {
            "image_id": f"image{index // 3}",
            "split": "train",
            "box_index": index % 3,
            "label": "/m/1",
            "label_name": "Cat",
            "xmin": 0.0,
            "xmax": width,
            "ymin": 0.0,
            "ymax": height,
            **flags,
        }
        for index, (width, height) in enumerate(sides)
    ]
    return pa.Table.from_pylist(rows, schema=BOXES)


@pytest.mark.parametrize(
    ("sides", "kept"),
    [
        ((0.25, 0.5), True),  # 0.125 exactly: the lower limit
        ((0.75, 1.0), True),  # 0.75 exactly: the upper limit
        ((np.nextafter(0.25, 0), 0.5), False),
        ((np.nextafter(0.75, 1), 1.0), False),
        ((0.5, 0.5), True),
        ((0.0001, 1.0), False),
        ((1.0, 1.0), False),
    ],
)
def test_limits_are_inclusive(sides: tuple[float, float], kept: bool) -> None:
    boxes, rejects = filter_boxes(_boxes([sides]), min_area_frac=0.125, max_area_frac=0.75)
    assert (boxes.num_rows, rejects.num_rows) == ((1, 0) if kept else (0, 1))


def test_kept_and_rejected_are_the_input_with_the_right_reasons() -> None:
    sides = [(float(w), float(h)) for w, h in np.random.default_rng(1).random((600, 2))]
    table = _boxes(sides)
    kept, rejects = filter_boxes(table, min_area_frac=0.02, max_area_frac=0.5)
    require(kept, BOXES, "kept")
    require(rejects, REJECTS, "rejects")
    wanted = [w * h < 0.02 or w * h > 0.5 for w, h in sides]
    assert kept.equals(table.filter(pa.array([not drop for drop in wanted])))  # rows untouched, in order
    names = [f"{row['image_id']}#{row['box_index']}" for row in table.to_pylist()]
    reasons = {row["key"]: row["reason"] for row in rejects.to_pylist()}
    assert list(reasons) == [name for name, drop in zip(names, wanted, strict=True) if drop]
    for name, (w, h) in zip(names, sides, strict=True):
        if name in reasons:
            assert reasons[name] == ("area_below_min" if w * h < 0.02 else "area_above_max")
    assert min(Counter(reasons.values()).values()) > 20 and len(set(reasons.values())) == 2
    assert set(reasons.values()) <= set(REJECT_REASONS)
    assert {row["stage"] for row in rejects.to_pylist()} == {"filter"}


def test_chunks_and_no_rows_at_all() -> None:
    table = _boxes([(0.5, 0.5), (0.01, 0.01), (1.0, 1.0), (0.3, 0.9)])
    chunked = pa.concat_tables([table.slice(start, 1) for start in range(4)])
    for limits in ((0.02, 0.8), (0.0, 1.0)):
        one, other = (filter_boxes(t, min_area_frac=limits[0], max_area_frac=limits[1]) for t in (table, chunked))
        assert one[0].equals(other[0]) and one[1].equals(other[1])
    kept, rejects = filter_boxes(table.slice(0, 0), min_area_frac=0.02, max_area_frac=0.8)
    assert (kept.num_rows, rejects.num_rows) == (0, 0) and kept.schema.equals(BOXES)
