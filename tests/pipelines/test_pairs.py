"""Pairs from a CSV of paths and from Parquet with bytes, through the stages in this process."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pbe.config import Params
from pbe.data import images
from pbe.data.files import FileTree
from pbe.data.pairs import PairsSource
from pbe.data.schema import BENCH, REFERENCE_KINDS, TRIPLETS, array_value, require
from pbe.store import Manifest, Store, load_manifest
from pipelines.runtime.stage import Stage
from tests.pipelines.golden import in_this_process
from tests.profiles import profile

pytest.importorskip("skimage", reason="needs the sample extra")
SIDE = 80
HEADER = ["ref_image", "ref_mask", "tar_image", "tar_mask", "label", "XMin", "XMax", "YMin", "YMax"]


def _picture(number: int, *, hue: int) -> tuple[bytes, bytes]:
    """A scene with one disc of a hue, and the disc's mask."""
    rng = np.random.default_rng([number, hue])
    scene = cv2.resize(rng.integers(0, 255, (6, 6, 3), np.uint8), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    centre, radius = tuple(map(int, rng.integers(28, 52, 2))), int(rng.integers(12, 22))
    cv2.circle(mask, centre, radius, 255, -1)
    colour = cv2.cvtColor(np.array([[[hue, 230, 220]]], np.uint8), cv2.COLOR_HSV2RGB)[0, 0]
    scene[mask > 0] = colour
    return images.encode_png(scene), images.encode_png(np.repeat(mask[..., None], 3, 2))


def _write_pairs(root: Path) -> None:
    """root/pictures, root/tables/latest.csv of paths, root/tables/val.parquet of bytes and Hugging Face's structs."""
    (root / "tables").mkdir(parents=True)
    for folder in ("pictures", "masks"):
        (root / "pictures" / folder).mkdir(parents=True)
    rows, val = [], []
    for number in range(20):
        for view in ("tar", "ref"):
            picture, mask = _picture(number + 100 * (view == "ref"), hue=9 * number)
            (root / "pictures" / f"{view}{number}.png").write_bytes(picture)
            (root / "pictures" / "masks" / f"{view}{number}.png").write_bytes(mask)
    for number in range(10):
        rows.append(
            [f"ref{number}.png", f"masks/ref{number}.png", f"tar{number}.png", f"masks/tar{number}.png", "disc"]
        )
    box = ["0.2", "0.7", "0.2", "0.7"]
    rows.append(["ref10.png", "", "tar10.png", "", "disc", *box])  # neither mask: a box, and the whole reference
    rows.append(["gone.png", "", "tar11.png", "masks/tar11.png", ""])  # no such reference: trains on itself
    rows.append(["tar12.png", "", "tar12.png", "masks/tar12.png", "disc"])  # a picture and itself
    rows.append(["ref13.png", "masks/none.png", "tar13.png", "masks/tar13.png", "disc"])
    rows.append(["ref14.png", "", "gone.png", "masks/tar14.png", "disc"])
    rows.append(["ref14.png", "", "tar14.png", "", "disc"])  # nothing says where the hole is
    with (root / "tables" / "latest.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([HEADER, *(row + [""] * (len(HEADER) - len(row)) for row in rows)])
    for number in range(15, 20):
        read = {name: (root / "pictures" / f"{name}{number}.png").read_bytes() for name in ("ref", "tar")}
        masks = {name: (root / "pictures" / "masks" / f"{name}{number}.png").read_bytes() for name in ("ref", "tar")}
        row: dict[str, Any] = {"ref_image": read["ref"], "ref_mask": masks["ref"], "label": "disc"}
        row |= {"tar_image": {"bytes": read["tar"], "path": f"val{number}.png"}, "tar_mask": masks["tar"]}
        val.append(row)
    val.append({**val[0], "ref_image": val[1]["ref_image"], "ref_mask": val[1]["ref_mask"]})  # another view
    first = {"bytes": (root / "pictures" / "tar0.png").read_bytes(), "path": "tar0.png"}
    val.append({**val[0], "tar_image": first})  # a target that trains
    pq.write_table(pa.Table.from_pylist(val), root / "tables" / "val.parquet", row_group_size=2)


def _params(root: Path) -> Params:
    params = profile("tiny")
    ingest = params.ingest.model_copy(
        update={
            "source": "pairs", "images": str(root / "pictures"), "boxes": str(root / "tables"), "max_reject_frac": 0.5
        }
    )  # fmt: skip
    edit = params.edit.model_copy(
        update={"holes": ("box", "segmentation"), "references": ("exemplar", "own", "foreign", "pair")}
    )
    return params.model_copy(
        update={
            "ingest": ingest,
            "edit": edit,
            "materialize": params.materialize.model_copy(update={"slots": 2, "reference_background": "white"}),
            "bench": params.bench.model_copy(update={"split": "validation"}),
        }
    )


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, dict[str, Manifest]]:
    root = tmp_path_factory.mktemp("pairs")
    _write_pairs(root)
    store, params = Store(str(root / "store")), _params(root)
    made = {}
    with in_this_process():
        for name in ("ingest", "filter", "materialize", "encode", "bench"):
            stage = Stage(name, None, params, store, root)
            __import__(f"pipelines.{name}", fromlist=["main"]).main(stage)
            made[name] = load_manifest(stage.outputs / "manifest.json")
        stage = Stage("baseline", "copy_paste", params, store, root)
        __import__("pipelines.baseline", fromlist=["main"]).main(stage)
        made["baseline"] = load_manifest(stage.outputs / "manifest.json")
    return store, made


def _rows(store: Store, manifest: Manifest, dataset: str) -> list[dict[str, Any]]:
    return [row for file in manifest.files(dataset) for row in store.read_table(file).to_pylist()]


def test_every_good_row_is_kept_and_every_bad_one_has_its_reason(project: tuple[Store, dict[str, Manifest]]) -> None:
    store, made = project
    rejects = {row["key"]: row["reason"] for row in _rows(store, made["ingest"], "rejects")}
    assert rejects == {
        "latest.csv:tar11#1": "pair_unreadable",
        "latest.csv:tar12#1": "pair_of_itself",
        "latest.csv:tar13#1": "pair_mask_unusable",
        "latest.csv:gone#1": "box_image_rejected",
        "gone.png": "image_unreadable",
        "latest.csv:17": "box_unparsable",
        "tar14.png": "image_without_box",
        "val.parquet:tar0#1": "box_in_other_split",
    }
    counts = made["ingest"].counts
    assert (counts["boxes_kept"], counts["pairs_in"], counts["pairs_kept"]) == (20, 20, 17)
    assert {row["image_id"] for row in _rows(store, made["ingest"], "images") if row["split"] == "validation"} == {
        f"val{number}" for number in range(15, 20)
    }


def test_targets_of_one_file_name_are_told_apart(tmp_path: Path) -> None:
    """As pair_001/tar.png and pair_002/tar.png; the same picture twice stays one photo of two pairs."""
    lines = [["ref_image", "ref_mask", "tar_image", "tar_mask"]]
    for number in range(3):
        folder = tmp_path / f"pair_{number}"
        folder.mkdir()
        for at, view in enumerate(("tar", "ref")):
            picture, mask = _picture(number + 10 * at, hue=40 * number)
            (folder / f"{view}.png").write_bytes(picture)
            (folder / f"{view}_mask.png").write_bytes(mask)
        lines.append([f"pair_{number}/{name}.png" for name in ("ref", "ref_mask", "tar", "tar_mask")])
    lines.append(["pair_0/ref.png", "", "pair_1/tar.png", "pair_1/tar_mask.png"])
    with (tmp_path / "pairs.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(lines)
    source = PairsSource(
        FileTree(str(tmp_path), "ingest.images"), FileTree(str(tmp_path / "pairs.csv"), "ingest.boxes")
    )
    photos = {row["address"]: row["image_id"] for table in source.photos() for row in table.to_pylist()}
    assert list(photos) == [f"pair_{number}/tar.png" for number in range(3)] and len(set(photos.values())) == 3
    boxes = [row["image_id"] for table in source.annotations() for row in table.to_pylist()]
    assert boxes == [*photos.values(), photos["pair_1/tar.png"]]


def test_the_reference_is_the_other_picture_without_its_background(project: tuple[Store, dict[str, Manifest]]) -> None:
    store, made = project
    tables = [require(store.read_table(file), TRIPLETS, file.path) for file in made["materialize"].files("slot-0000")]
    rows = {row["image_id"]: row for table in tables for row in table.to_pylist()}
    assert {name for name, row in rows.items() if row["pair_reference"] is None} == {"tar11", "tar12", "tar13"}
    assert rows["tar10"]["segmentation_hole_mask"] is None and rows["tar11"]["segmentation_hole_mask"] is not None
    for number in range(10):
        own, pair = (images.decode(rows[f"tar{number}"][name]) for name in ("reference", "pair_reference"))
        for picture in (own, pair):  # both show the disc on white
            assert (picture[0, 0] > 250).all()
            middle = cv2.cvtColor(picture[picture.shape[0] // 2 :][:1, 100:124], cv2.COLOR_RGB2HSV)[..., 0]
            assert abs(int(np.median(middle)) - 9 * number) <= 3
        assert not np.array_equal(own, pair)


def test_the_tokens_of_pairs_are_those_of_their_pictures(project: tuple[Store, dict[str, Manifest]]) -> None:
    store, made = project
    for file in made["encode"].files("slot-0001"):
        table = store.read_table(file)
        for row in table.to_pylist():
            if row.get("pair_tokens") is None:
                assert row["image_id"] in ("tar11", "tar12", "tar13")
                continue
            own, pair = (
                array_value(table.schema.field(name), row[name]) for name in ("exemplar_tokens", "pair_tokens")
            )
            assert own.shape == pair.shape and not np.array_equal(own[0], pair[0])


def test_held_out_pairs_are_scored_apart(project: tuple[Store, dict[str, Manifest]]) -> None:
    store, made = project
    (file,) = made["bench"].files("bench")
    bench = require(store.read_table(file), BENCH, file.path).to_pylist()
    assert len(bench) == 6 and all(row["pair"] and row["segmentation_hole_mask"] for row in bench)
    edits = _rows(store, made["baseline"], "edits")
    scopes = {(row["hole_kind"], row["reference_kind"]) for row in edits}
    assert scopes == {(hole, kind) for hole in ("box", "segmentation") for kind in REFERENCE_KINDS}
    item = bench[0]
    pasted = {row["reference_kind"]: row["edit"] for row in edits if row["bench_id"] == item["bench_id"]}
    assert pasted["pair"] != pasted["own"] and json.dumps(sorted(pasted)) == '["exemplar", "foreign", "own", "pair"]'
    assert images.decode(item["pair"]).shape == images.decode(item["own"]).shape
    assert io.BytesIO(item["pair"]).read(2) == b"\xff\xd8"
