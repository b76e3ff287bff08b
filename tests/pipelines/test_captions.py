"""Captions of box files through the stages in this process, to the triplets and the bench."""

from pathlib import Path

import numpy as np
import pytest

from pbe.data import images
from pbe.evaluate.bench.scopes import scopes_of
from pbe.store import Manifest, Store, load_manifest
from pipelines import bench, filter, ingest, materialize
from pipelines.edit import _reference
from pipelines.runtime.stage import Stage, StageError
from pipelines.train_preflight import refuse_no_captions
from tests.pipelines.golden import in_this_process
from tests.profiles import profile

pytest.importorskip("skimage", reason="needs the sample extra")
STAGES = {"ingest": ingest, "filter": filter, "materialize": materialize, "bench": bench}
PHOTOS = "abcdefgh"
SAID = {name: f"kite {name} in the wind" for name in PHOTOS[:-2]}


def _run(root: Path, header: str, *, captions: bool) -> tuple[Stage, dict[str, Manifest]]:
    (root / "photos").mkdir(parents=True)
    rng = np.random.default_rng(3)
    for name in PHOTOS:
        (root / "photos" / f"{name}.png").write_bytes(images.encode_png(rng.integers(0, 255, (64, 96, 3), np.uint8)))
    lines = [f"{name},kite,0.25,0.75,0.25,0.75{f',{SAID.get(name, str())}' if captions else ''}" for name in PHOTOS]
    (root / "train.csv").write_text("\n".join([header, *lines, ""]))
    params = profile("tiny")
    update = {"source": "folder", "images": str(root / "photos"), "boxes": str(root / "train.csv")}
    params = params.model_copy(update={"ingest": params.ingest.model_copy(update=update)})
    store, made = Store(str(root / "store")), {}
    with in_this_process():
        for name, module in STAGES.items():
            stage = Stage(name, None, params, store, root)
            module.main(stage)
            made[name] = load_manifest(stage.outputs / "manifest.json")
    return Stage("train", "text", params, store, root), made


HEADER = "ImageID,LabelName,XMin,XMax,YMin,YMax"


def test_captions_reach_triplets_and_the_bench_has_those_of_its_exemplars(tmp_path: Path) -> None:
    stage, made = _run(tmp_path, f"{HEADER},Caption", captions=True)
    triplets = [
        row for file in made["materialize"].files("slot-0000") for row in stage.store.read_table(file).to_pylist()
    ]
    assert {row["image_id"]: row.get("caption") for row in triplets} == {name: SAID.get(name) for name in PHOTOS}
    refuse_no_captions(stage, made["materialize"])

    table = stage.store.read_table(made["bench"].files("bench")[0])
    asked = []
    for row in table.to_pylist():
        said = SAID.get(row["exemplar_image_id"])
        assert row["exemplar_caption"] == said
        scopes = scopes_of(row, ["box"], ["label", "caption"])
        asked.append(("box", "caption") in scopes)
        assert ("box", "label") in scopes and asked[-1] == (said is not None)
        assert said is None or _reference(row, "caption") == said
    assert set(asked) == {True, False}  # so that both are tried


def test_without_captions_no_part_has_the_column_and_who_asks_for_them_is_told(tmp_path: Path) -> None:
    stage, made = _run(tmp_path, HEADER, captions=False)
    for manifest in made.values():
        for file in (file for unit in manifest.units for file in unit.files):
            assert not any("caption" in name for name in stage.store.read_table(file).schema.names), file.path
    with pytest.raises(StageError, match=r"train@text: train\.text\.captions: caption: no row has one; leave it out"):
        refuse_no_captions(stage, made["materialize"])
