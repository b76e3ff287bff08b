"""The filter stage across shards: training photos that show what a held-out photo of another shard shows."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from pbe.data import images
from pbe.data.descriptor import descriptor
from pbe.data.schema import BOXES, FLAGS, IMAGES, table_from_rows
from pbe.store import Store, load_manifest, make_manifest, save_manifest
from pipelines import filter as filter_stage
from pipelines.runtime.stage import Stage
from tests.profiles import profile


def _picture(seed: int) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 16, 3)).astype(np.uint8)
    return cv2.resize(coarse, (160, 120), interpolation=cv2.INTER_CUBIC)


# by shard: id, split, picture. "burst" is the held-out one once more, brighter; "copy" is held out itself
SHARDS = (
    [("held", "validation", _picture(1)), ("alone", "train", _picture(2)), ("copy", "test", _picture(1))],
    [("burst", "train", np.clip(_picture(1) * 1.1, 0, 255).astype(np.uint8)), ("other", "train", _picture(3))],
)


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    store, records = Store(str(tmp_path / "store")), []
    for shard, photos in enumerate(SHARDS):
        rows = [
            {
                "image_id": image_id,
                "split": split,
                "bytes": images.encode_jpeg(picture, 90),
                "width_px": 160,
                "height_px": 120,
                "sha256": "",
                "exif_orientation": 1,
                "descriptor": descriptor(picture),
            }
            for image_id, split, picture in photos
        ]
        box = dict.fromkeys(FLAGS, 0) | {"label": "a", "label_name": "a", "xmin": 0.1, "xmax": 0.6}
        boxes = [
            box | {"image_id": image_id, "split": split, "box_index": index, "ymin": 0.1, "ymax": 0.6}
            for image_id, split, _ in photos
            for index in range(2)
        ]
        tables = {"images": table_from_rows(rows, IMAGES), "boxes": table_from_rows(boxes, BOXES)}
        records.append(store.write_unit("ingest", f"s{shard:04d}-made", tables, counts={}))
    stage = Stage("filter", None, profile("tiny"), store, tmp_path)
    save_manifest(stage.input("ingest"), make_manifest("ingest", config={}, version=1, units=records))
    return stage


def _kept(stage: Stage) -> set[str]:
    filter_stage.main(stage)
    units = load_manifest(stage.outputs / "manifest.json").units
    return {
        image_id for unit in units for image_id in stage.store.read_table(unit.file("boxes"))["image_id"].to_pylist()
    }


def test_a_training_photo_like_a_held_out_one_is_dropped_and_counted(stage: Stage) -> None:
    assert _kept(stage) == {"held", "alone", "copy", "other"}
    counts = json.loads((stage.outputs / "counts.json").read_text())
    assert (counts["rejected_image_like_heldout"], counts["images_like_heldout"]) == (2, 1)
    again = load_manifest(stage.outputs / "manifest.json")
    _kept(stage)
    assert load_manifest(stage.outputs / "manifest.json").units == again.units


def test_without_the_limit_it_stays(stage: Stage) -> None:
    cfg = stage.params.filter.model_copy(update={"max_heldout_similarity": None})
    params = stage.params.model_copy(update={"filter": cfg})
    assert "burst" in _kept(Stage("filter", None, params, stage.store, stage.root))
