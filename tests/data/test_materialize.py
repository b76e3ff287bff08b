"""A photo's triplets depend on the photo, its boxes, the slot and the seed alone; slots take all boxes in turn."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pbe.data import images
from pbe.data.ingest import read_bucket
from pbe.data.masks import unpack_mask
from pbe.data.materialize import triplet_tables
from pbe.data.schema import REJECT_REASONS, REJECTS, TRIPLETS, require
from pbe.data.slots import slot_name
from pbe.data.sources import BoxLine, ImageFile
from pbe.data.triplets import CutConfig
from pbe.store import Store

CFG = CutConfig(
    image_px=16,
    reference_px=24,
    reference_pad_px=2,
    box_extend_frac=0.4,
    crop_shrink_frac=0.6,
    bezier_points_per_side=18,
    bezier_jitter_px=1,
)
BOX_COUNTS = {"apple": 3, "pear": 1, "plum": 5}


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pa.Table]:
    """Three photos of the train split, one of each other split, one whose boxes the filter dropped."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(1)
    files, lines = [], []
    for image_id, count in {**BOX_COUNTS, "quince": 2, "rowan": 1, "dropped": 1}.items():
        path = folder / f"{image_id}.png"
        path.write_bytes(images.encode_png(rng.integers(0, 256, (40, 60, 3)).astype(np.uint8)))
        files.append(ImageFile(image_id, path, None))
        split = {"quince": "validation", "rowan": "test"}.get(image_id, "train")
        for index in range(count):
            edges = {"XMin": f"0.{index + 1}", "XMax": f"0.{index + 4}", "YMin": "0.2", "YMax": "0.6"}
            lines.append(BoxLine("b.csv", len(lines) + 2, split, {"ImageID": image_id, "LabelName": "/m/1", **edges}))
    tables = read_bucket(files, lines, {})[0]
    keep = [image_id != "dropped" for image_id in tables["boxes"].column("image_id").to_pylist()]
    return {"images": tables["images"], "boxes": tables["boxes"].filter(pa.array(keep))}


def _tables(bucket: dict[str, pa.Table], slots: int = 5, seed: int = 23) -> tuple[dict[str, pa.Table], dict[str, int]]:
    return triplet_tables(bucket["images"], bucket["boxes"], cfg=CFG, slots=slots, jpeg_quality=95, seed=seed)


def _rows(tables: dict[str, pa.Table]) -> dict[tuple[str, int], dict]:
    return {
        (row["image_id"], row["slot"]): row
        for name, table in tables.items()
        if name != "rejects"
        for row in table.to_pylist()
    }


def test_the_same_call_gives_the_same_bytes(bucket: dict[str, pa.Table], store: Store) -> None:
    one, again = (store.write_unit("materialize", name, _tables(bucket)[0], counts={}) for name in ("one", "again"))
    assert [file.sha256 for file in one.files] == [file.sha256 for file in again.files]
    other, _ = _tables(bucket, seed=24)
    assert not any(other[slot_name(slot)].equals(_tables(bucket)[0][slot_name(slot)]) for slot in range(5))


def test_only_the_train_split_becomes_triplets_and_nothing_is_lost(bucket: dict[str, pa.Table]) -> None:
    tables, counts = _tables(bucket)
    assert set(tables) == {*(slot_name(slot) for slot in range(5)), "rejects"}
    for name, table in tables.items():
        require(table, REJECTS if name == "rejects" else TRIPLETS, name)
    assert set(_rows(tables)) == {(image_id, slot) for image_id in BOX_COUNTS for slot in range(5)}
    assert counts == {"images_in": 4, "images_kept": 3, "images_rejected": 1, "triplets": 15}
    (reject,) = tables["rejects"].to_pylist()
    assert (reject["key"], reject["reason"]) == ("dropped", "image_without_kept_box")
    assert reject["reason"] in REJECT_REASONS


def test_slots_take_every_box_of_a_photo_in_turn(bucket: dict[str, pa.Table]) -> None:
    """Any n slots in a row show n different boxes, and over 20 slots no box comes more often than another by two."""
    rows = _rows(_tables(bucket, slots=20)[0])
    for image_id, count in BOX_COUNTS.items():
        taken = [rows[image_id, slot]["box_index"] for slot in range(20)]
        for start in range(20 - count + 1):
            assert sorted(taken[start : start + count]) == list(range(count))
        shares = Counter(taken).values()
        assert max(shares) - min(shares) <= 1
    firsts = [_rows(_tables(bucket, slots=1, seed=seed)[0])["plum", 0]["box_index"] for seed in range(30)]
    assert set(firsts) == set(range(5))  # which box comes first is drawn


def test_a_row_depends_on_its_own_photo_and_slot_alone(bucket: dict[str, pa.Table]) -> None:
    """Not on the other photos, their order, or how many slots are made."""
    rows = _rows(_tables(bucket)[0])
    reverse = {
        name: table.take(list(range(table.num_rows))[::-1]) for name, table in bucket.items() if name == "images"
    }
    assert _rows(_tables({**bucket, **reverse})[0]) == rows
    alone = {
        name: table.filter(pa.array([value == "plum" for value in table.column("image_id").to_pylist()]))
        for name, table in bucket.items()
    }
    assert _rows(_tables(alone)[0]) == {key: row for key, row in rows.items() if key[0] == "plum"}
    assert {key: row for key, row in _rows(_tables(bucket, slots=9)[0]).items() if key[1] < 5} == rows


def test_slots_of_one_box_differ_in_crop_and_holes(bucket: dict[str, pa.Table]) -> None:
    rows = [row for (image_id, _), row in _rows(_tables(bucket, slots=12)[0]).items() if image_id == "pear"]
    assert len({row["reference"] for row in rows}) == 1  # clean
    for name in ("source", "bezier_hole_mask", "box_hole_mask"):
        assert len({row[name] for row in rows}) > 4


def test_every_row_can_be_read_back(bucket: dict[str, pa.Table]) -> None:
    for row in _rows(_tables(bucket)[0]).values():
        assert images.decode(row["source"]).shape == (16, 16, 3)
        assert images.decode(row["reference"]).shape == (24, 24, 3)
        for kind in ("box", "bezier"):
            assert unpack_mask(row[f"{kind}_hole_mask"], width_px=16, height_px=16).any()
        assert 0 <= row["box_x0_px"] < row["box_x1_px"] <= 16 and 0 <= row["box_y0_px"] < row["box_y1_px"] <= 16


def test_a_bucket_without_train_photos_has_empty_tables(bucket: dict[str, pa.Table], tmp_path: Path) -> None:
    none = bucket["images"].filter(
        pa.array([split != "train" for split in bucket["images"].column("split").to_pylist()])
    )
    tables, counts = _tables({"images": none, "boxes": bucket["boxes"]}, slots=2)
    assert all(table.num_rows == 0 for table in tables.values()) and set(counts.values()) == {0}
    Store(str(tmp_path)).write_unit("materialize", "empty", tables, counts=counts)
