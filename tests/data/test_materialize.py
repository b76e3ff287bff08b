"""A photo's triplets depend on the photo, its boxes, the slot and the seed only; slots take all boxes in turn."""

import hashlib
import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pbe.data import images
from pbe.data.materialize import triplet_tables
from pbe.data.schema import BOXES, IMAGE_REASONS, IMAGES, REJECTS, TRIPLETS, require
from pbe.data.settings import MaterializeConfig
from pbe.data.slots import slot_name
from pbe.store import Store
from tests.icc import WIDE

CFG = MaterializeConfig(
    image_px=16,
    slots=5,
    reference_px=24,
    reference_pad_px=2,
    box_extend_frac=0.4,
    crop_shrink_frac=0.6,
    bezier_points_per_side=18,
    bezier_jitter_px=1,
)
BOX_COUNTS = {"apple": 3, "pear": 1, "plum": 5}


@pytest.fixture(scope="module")
def shard() -> dict[str, pa.Table]:
    """Three photos of the train split, one of each other split, one whose boxes the filter dropped; as ingest's."""
    rng, photos, boxes = np.random.default_rng(1), [], []
    for image_id, count in {**BOX_COUNTS, "quince": 2, "rowan": 1, "dropped": 1}.items():
        split = {"quince": "validation", "rowan": "test"}.get(image_id, "train")
        pixels = rng.integers(0, 256, (40, 60, 3)).astype(np.uint8)
        photos.append(_photo(image_id, split, images.encode_png(pixels)))
        edges = [(0.1 * (index + 1), 0.1 * (index + 4), 0.2, 0.6) for index in range(count)]
        boxes += [_box(image_id, split, index, *edge) for index, edge in enumerate(edges)]
    kept = [box for box in boxes if box["image_id"] != "dropped"]
    return {"images": pa.Table.from_pylist(photos, schema=IMAGES), "boxes": pa.Table.from_pylist(kept, schema=BOXES)}


def _photo(image_id: str, split: str, data: bytes, exif_orientation: int = 1) -> dict[str, Any]:
    return {
        "image_id": image_id,
        "split": split,
        "bytes": data,
        "width_px": 60,
        "height_px": 40,
        "sha256": hashlib.sha256(data).hexdigest(),
        "exif_orientation": exif_orientation,
    }


def _box(image_id: str, split: str, index: int, xmin: float, xmax: float, ymin: float, ymax: float) -> dict[str, Any]:
    flags = dict.fromkeys(("is_occluded", "is_truncated", "is_group_of", "is_depiction", "is_inside"), -1)
    names = {"image_id": image_id, "split": split, "box_index": index, "label": "/m/1", "label_name": "Cat"}
    return {**names, "xmin": xmin, "xmax": xmax, "ymin": ymin, "ymax": ymax, **flags}


def _tables(
    shard: dict[str, pa.Table], *, seed: int = 23, **changes: Any
) -> tuple[dict[str, pa.Table], dict[str, int]]:
    return triplet_tables(shard["images"], shard["boxes"], cfg=CFG.model_copy(update=changes), seed=seed)


def _rows(tables: dict[str, pa.Table]) -> dict[tuple[str, int], dict]:
    return {
        (row["image_id"], row["slot"]): row
        for name, table in tables.items()
        if name != "rejects"
        for row in table.to_pylist()
    }


def test_the_same_call_gives_the_same_bytes(shard: dict[str, pa.Table], store: Store) -> None:
    one, again = (store.write_unit("materialize", name, _tables(shard)[0], counts={}) for name in ("one", "again"))
    assert [file.sha256 for file in one.files] == [file.sha256 for file in again.files]
    other, _ = _tables(shard, seed=24)
    assert not any(other[slot_name(slot)].equals(_tables(shard)[0][slot_name(slot)]) for slot in range(5))


def test_only_the_train_split_becomes_triplets_and_nothing_is_lost(shard: dict[str, pa.Table]) -> None:
    tables, counts = _tables(shard)
    assert set(tables) == {*(slot_name(slot) for slot in range(5)), "rejects"}
    for name, table in tables.items():
        require(table, REJECTS if name == "rejects" else TRIPLETS, name)
    assert set(_rows(tables)) == {(image_id, slot) for image_id in BOX_COUNTS for slot in range(5)}
    assert counts == {"images_in": 4, "images_kept": 3, "images_rejected": 1, "triplets": 15}
    (reject,) = tables["rejects"].to_pylist()
    assert (reject["key"], reject["reason"]) == ("dropped", "image_without_kept_box")
    assert reject["reason"] in IMAGE_REASONS


def test_slots_take_every_box_of_a_photo_in_turn(shard: dict[str, pa.Table]) -> None:
    """Any n consecutive slots show n different boxes; over 20 slots the counts differ by at most one."""
    rows = _rows(_tables(shard, slots=20)[0])
    for image_id, count in BOX_COUNTS.items():
        taken = [rows[image_id, slot]["box_index"] for slot in range(20)]
        for start in range(20 - count + 1):
            assert sorted(taken[start : start + count]) == list(range(count))
        shares = Counter(taken).values()
        assert max(shares) - min(shares) <= 1
    firsts = [_rows(_tables(shard, slots=1, seed=seed)[0])["plum", 0]["box_index"] for seed in range(30)]
    assert set(firsts) == set(range(5))  # the first box is random


def test_a_row_depends_on_its_own_photo_and_slot_alone(shard: dict[str, pa.Table]) -> None:
    """A triplet does not depend on other photos, their order, or the number of slots."""
    rows = _rows(_tables(shard)[0])
    reverse = {name: table.take(list(range(table.num_rows))[::-1]) for name, table in shard.items() if name == "images"}
    assert _rows(_tables({**shard, **reverse})[0]) == rows
    alone = {
        name: table.filter(pa.array([value == "plum" for value in table.column("image_id").to_pylist()]))
        for name, table in shard.items()
    }
    assert _rows(_tables(alone)[0]) == {key: row for key, row in rows.items() if key[0] == "plum"}
    assert {key: row for key, row in _rows(_tables(shard, slots=9)[0]).items() if key[1] < 5} == rows


def test_slots_of_one_box_differ_in_crop_and_holes(shard: dict[str, pa.Table]) -> None:
    rows = [row for (image_id, _), row in _rows(_tables(shard, slots=12)[0]).items() if image_id == "pear"]
    assert len({row["reference"] for row in rows}) == 1  # clean
    for name in ("source", "bezier_hole_mask", "box_hole_mask"):
        assert len({row[name] for row in rows}) > 4


def test_a_photo_is_cut_upright_when_ingest_says_so(shard: dict[str, pa.Table]) -> None:
    """The boxes then mean the upright picture: its triplets are those of a photo that was stored upright."""
    upright = np.random.default_rng(2).integers(0, 256, (60, 40, 3)).astype(np.uint8)
    stored = np.rot90(upright)  # rotated left; orientation 6 means: rotate right to view
    rows = []
    for data, orientation in ((images.encode_png(upright), 1), (images.encode_png(stored), 6)):
        photo = _photo("apple", "train", data, orientation)
        tables, _ = _tables({**shard, "images": pa.Table.from_pylist([photo], schema=IMAGES)})
        rows.append(_rows(tables))
    assert rows[0] == rows[1]


def test_triplets_are_srgb_whatever_profile_the_photo_has(shard: dict[str, pa.Table]) -> None:
    stored = np.random.default_rng(2).integers(0, 256, (40, 60, 3)).astype(np.uint8)
    with_profile = io.BytesIO()
    Image.fromarray(stored).save(with_profile, "PNG", icc_profile=WIDE)
    converted = images.decode(with_profile.getvalue())
    assert (converted != stored).mean() > 0.5
    rows = []
    for data in (with_profile.getvalue(), images.encode_png(converted)):
        photo = pa.Table.from_pylist([_photo("apple", "train", data)], schema=IMAGES)
        rows.append(_rows(_tables({**shard, "images": photo})[0]))
    assert rows[0] == rows[1]


def test_pictures_are_stored_as_asked_and_references_with_all_their_colours(shard: dict[str, pa.Table]) -> None:
    def stored(picture: str, quality: int, chroma: str) -> bytes:
        tables, _ = _tables(shard, jpeg_quality=quality, jpeg_chroma=chroma)
        return b"".join(row[picture] for row in _rows(tables).values())

    assert len(stored("source", 95, "444")) > len(stored("source", 95, "420")) > len(stored("source", 50, "420"))
    assert stored("reference", 95, "444") == stored("reference", 95, "420") != stored("reference", 50, "420")


def test_a_shard_without_train_photos_has_empty_tables(shard: dict[str, pa.Table], tmp_path: Path) -> None:
    none = shard["images"].filter(pa.array([split != "train" for split in shard["images"].column("split").to_pylist()]))
    tables, counts = _tables({"images": none, "boxes": shard["boxes"]}, slots=2)
    assert all(table.num_rows == 0 for table in tables.values()) and set(counts.values()) == {0}
    Store(str(tmp_path)).write_unit("materialize", "empty", tables, counts=counts)
