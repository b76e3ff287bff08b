"""The index: every row lands in its shard, in file order, spilled or not; selections count what they drop."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pbe.data import index
from pbe.data.index import Selection, Selector, by_shard, shards_of
from pbe.data.rng import shard_of, unit_interval
from pbe.data.schema import ANNOTATIONS, SPLITS, table_from_rows, with_optional

ALL = Selection(splits=SPLITS, limit=None, classes=None, image_ids=None, val_frac=0.0)


def _table(image_ids: list[str], *, split: str = "train", labels: list[str] | None = None, first: int = 0) -> pa.Table:
    flags = dict.fromkeys(("is_occluded", "is_truncated", "is_group_of", "is_depiction", "is_inside"), -1)
    rows = [
        {
            "image_id": image_id,
            "file": "boxes.csv",
            "line": first + number,
            "split": SPLITS.index(split),
            "label": (labels or ["/m/1"] * len(image_ids))[number],
            "label_name": "x",
            **flags,
        }
        for number, image_id in enumerate(image_ids)
    ]
    return with_optional(table_from_rows(rows, ANNOTATIONS), ANNOTATIONS)


@pytest.mark.parametrize("spill_bytes", [1, 3000, 1 << 28])
def test_every_row_lands_in_its_shard_in_the_order_it_came(monkeypatch: pytest.MonkeyPatch, spill_bytes: int) -> None:
    monkeypatch.setattr(index, "SPILL_BYTES", spill_bytes)
    rng = np.random.default_rng(0)
    blocks = [_table([f"i{n}" for n in rng.integers(0, 90, 40)], first=40 * block) for block in range(12)]
    with by_shard(blocks, ANNOTATIONS, 7) as tables:
        got = list(tables)
    assert len(got) == 7 and sum(table.num_rows for table in got) == 480
    for shard, table in enumerate(got):
        assert table.schema.equals(ANNOTATIONS)
        assert {shard_of(image_id, 7) for image_id in table.column("image_id").to_pylist()} <= {shard}
        lines = table.column("line").to_pylist()
        assert lines == sorted(lines)


def test_empty_input_gives_empty_shards() -> None:
    with by_shard([_table([])], ANNOTATIONS, 3) as tables:
        assert [table.num_rows for table in tables] == [0, 0, 0]
    assert shards_of(pa.array([], pa.string()), 3).tolist() == []


def test_the_limit_takes_the_first_photos_of_each_split_with_all_their_rows_across_blocks() -> None:
    selector = Selector(Selection(SPLITS, 2, None, None, 0.0), None)
    blocks = [_table(["a", "b", "a", "c"]), _table(["b", "d", "a"]), _table(["e", "f", "g"], split="validation")]
    kept = [selector(block).column("image_id").to_pylist() for block in blocks]
    assert kept == [["a", "b", "a"], ["b", "a"], ["e", "f"]]
    assert selector.left_out == 3


def test_val_frac_splits_by_the_photo_not_by_the_line_or_the_file() -> None:
    ids = [f"photo{n}" for n in range(2000)] * 2
    got = Selector(Selection(("train", "validation"), None, None, None, 0.25), None)(_table(ids, split="test"))
    by_id: dict[str, set[int]] = {}
    for row in got.select(["image_id", "split"]).to_pylist():
        by_id.setdefault(row["image_id"], set()).add(row["split"])
    assert len(by_id) == 2000 and all(len(splits) == 1 for splits in by_id.values())
    share = np.mean([splits == {SPLITS.index("validation")} for splits in by_id.values()])
    assert share == pytest.approx(0.25, abs=0.03)
    for image_id in ("photo1", "photo2"):
        assert by_id[image_id] == {SPLITS.index("validation" if unit_interval(image_id) < 0.25 else "train")}


def test_an_odd_line_survives_a_class_selection(tmp_path: Path) -> None:
    table = _table(["a"], labels=[""])
    column = table.schema.get_field_index("reason")
    table = table.set_column(column, ANNOTATIONS.field("reason"), pa.array(["box_unparsable"]))
    assert Selector(Selection(SPLITS, None, ("Cat",), None, 0.0), {"/m/1"})(table).num_rows == 1
