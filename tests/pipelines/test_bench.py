"""The bench stage on a split that is larger than what it needs."""

from pathlib import Path

import pytest

from pbe.data.schema import BENCH, REAL_IMAGES, require
from pbe.evaluate.settings import EfficientNetExtractorConfig
from pbe.store import PartError, Store, load_manifest
from pipelines import bench
from pipelines.runtime.stage import Stage
from tests.benchmarks.bench import make_split
from tests.pipelines import golden
from tests.profiles import profile


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """The bench of 40 photos with two boxes each in 8 shards, made without Ray."""
    monkeypatch.setattr(bench, "run_units", golden._run_units)
    store, params = Store(str(tmp_path / "store")), profile("tiny")
    make_split(store, tmp_path, photos=40, shards=8, width_px=64, height_px=48)
    changes = {"split": "validation", "max_items": 8, "matcher": EfficientNetExtractorConfig(kind="efficientnet_lite0")}
    changed = params.model_copy(update={"bench": params.bench.model_copy(update=changes)})
    return Stage("bench", None, changed, store, tmp_path)


def test_shards_beyond_the_candidates_are_not_read(stage: Stage) -> None:
    few = stage.params.bench.model_copy(update={"candidates": 20})
    params = stage.params.model_copy(update={"bench": few})
    boxes = [unit.file("boxes").rows for unit in load_manifest(stage.input("filter")).units]
    needed = next(count for count in range(8) if sum(boxes[:count]) >= 20)
    assert 1 < needed < 5
    for unit in load_manifest(stage.input("ingest")).units[needed:]:
        stage.store.delete_unit(f"parts/ingest/{unit.unit}")

    bench.main(Stage("bench", None, params, stage.store, stage.root))
    manifest = load_manifest(stage.outputs / "manifest.json")
    made = require(stage.store.read_table(manifest.files("bench")[0]), BENCH, "bench")
    require(stage.store.read_table(manifest.files("real")[0]), REAL_IMAGES, "real")
    assert made.num_rows == manifest.counts["items"] == 8
    with pytest.raises(PartError, match="this part is gone"):  # with all boxes as candidates they are
        bench.main(stage)


def test_the_shard_of_more_items_is_read_even_for_few_candidates(stage: Stage) -> None:
    """max_items is what the user asks for."""
    cfg = stage.params.bench.model_copy(update={"candidates": 1, "max_items": 30})
    bench.main(Stage("bench", None, stage.params.model_copy(update={"bench": cfg}), stage.store, stage.root))
    assert load_manifest(stage.outputs / "manifest.json").counts["items"] == 30


def test_coco_ee_is_read_where_its_folder_is_and_held_out_photos_on_the_cluster(stage: Stage) -> None:
    assert stage.is_heavy
    cfg = stage.params.bench.model_copy(update={"source": "cocoee", "cocoee": "/photos/test_bench"})
    assert not Stage("bench", None, stage.params.model_copy(update={"bench": cfg}), stage.store, stage.root).is_heavy
