"""Masks of objects through the stages in this process: from COCO JSON, from pictures, from OpenImages' CSVs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pbe.data import images
from pbe.data.masks import hole_of, unpack_mask
from pbe.data.schema import BENCH, BOXES, require
from pbe.evaluate.bench.baselines import colour_transfer
from pbe.evaluate.bench.scopes import object_mask_of
from pbe.store import Manifest, Store, load_manifest
from pipelines.baseline import _fill
from pipelines.runtime.stage import Stage
from pipelines.sweep import _requests
from tests.pipelines.golden import in_this_process
from tests.profiles import profile

pytest.importorskip("skimage", reason="needs the sample extra")
WIDTH, HEIGHT = 96, 64
BOX = (0.25, 0.75, 0.25, 0.75)  # xmin, xmax, ymin, ymax
DIAMOND = [48, 16, 72, 32, 48, 48, 24, 32]


def _diamond() -> np.ndarray:
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    return (np.abs(x - 48) / 24 + np.abs(y - 32) / 16 <= 1).astype(np.uint8)


def _photos(root: Path) -> None:
    rng = np.random.default_rng(3)
    (root / "photos").mkdir()
    for name in "abcdef":
        picture = rng.integers(0, 255, (HEIGHT, WIDTH, 3)).astype(np.uint8)
        (root / "photos" / f"{name}.png").write_bytes(images.encode_png(picture))


def _coco(folder: Path) -> None:
    box = [BOX[0] * WIDTH, BOX[2] * HEIGHT, WIDTH / 2, HEIGHT / 2]
    entries = [
        {"id": n, "file_name": f"{name}.png", "width": WIDTH, "height": HEIGHT} for n, name in enumerate("abcdef")
    ]
    shapes: list[Any] = [[DIAMOND], [DIAMOND], [DIAMOND], [[1, 2]], None, [DIAMOND]]
    annotations = [
        {"id": 7 + n, "image_id": n, "category_id": 1, "bbox": box, "segmentation": shape, "iscrowd": 0}
        for n, shape in enumerate(shapes)
    ]
    categories = [{"id": 1, "name": "kite"}]
    (folder / "instances_train.json").write_text(
        json.dumps({"images": entries, "annotations": annotations, "categories": categories})
    )


def _pictures(folder: Path) -> None:
    lines = [f"{name},kite,{','.join(map(str, BOX))}" for name in "abcdef"]
    (folder / "train.csv").write_text("\n".join(["ImageID,LabelName,XMin,XMax,YMin,YMax", *lines, ""]))
    (folder / "masks").mkdir()
    for name in "abcf":
        (folder / "masks" / f"{name}_0.png").write_bytes(images.encode_png(_diamond()[..., None].repeat(3, 2) * 255))
    (folder / "masks" / "d_0.png").write_bytes(b"nothing")


def _openimages(folder: Path) -> None:
    _pictures(folder)
    lines = []
    for number, name in enumerate("abcfde"):
        target = f"{name}_kite_{number:08d}.png"
        if (source := folder / "masks" / f"{name}_0.png").exists():
            (folder / "masks" / "sub").mkdir(exist_ok=True)
            source.rename(folder / "masks" / "sub" / target)
        ends = (0.1, *BOX[1:]) if name == "e" else BOX  # of no box
        lines.append(f"{target},{name},kite,{number:08d},{','.join(map(str, ends))},0.9,")
    header = "MaskPath,ImageID,LabelName,BoxID,BoxXMin,BoxXMax,BoxYMin,BoxYMax,PredictedIoU,Clicks"
    (folder / "train-annotations-object-segmentation.csv").write_text("\n".join([header, *lines, ""]))


def _run(root: Path, masks: str, *stages: str, **ingest: Any) -> tuple[Store, dict[str, Manifest]]:
    params = profile("tiny")
    update = ingest | {"source": "folder", "images": str(root / "photos"), "boxes": str(root / "boxes"), "masks": masks}
    params = params.model_copy(update={"ingest": params.ingest.model_copy(update=update)})
    store, made = Store(str(root / f"store-{masks}")), {}
    with in_this_process():
        for name in stages:
            stage = Stage(name, None, params, store, root)
            __import__(f"pipelines.{name}", fromlist=["main"]).main(stage)
            made[name] = load_manifest(stage.outputs / "manifest.json")
    return store, made


@pytest.mark.parametrize(
    ("write", "reasons"),
    [
        (_coco, {"mask_unreadable": 1}),
        (_pictures, {"mask_unreadable": 1}),
        (_openimages, {"mask_unreadable": 1, "mask_without_box": 1}),
    ],
    ids=["COCO", "pictures", "OpenImages"],
)
def test_masks_become_holes_and_the_rows_without_stay(write: Any, reasons: dict[str, int], tmp_path: Path) -> None:
    _photos(tmp_path)
    (tmp_path / "boxes").mkdir()
    write(tmp_path / "boxes")
    store, made = _run(tmp_path, "read", "ingest", "filter", "materialize", "encode")
    rejects = [row for file in made["ingest"].files("rejects") for row in store.read_table(file).to_pylist()]
    assert {row["reason"]: sum(other["reason"] == row["reason"] for other in rejects) for row in rejects} == reasons
    assert (made["ingest"].counts["boxes_kept"], made["ingest"].counts["masks_kept"]) == (6, 4)
    assert all("mask" not in store.read_table(file).schema.names for file in made["filter"].files("boxes"))
    rows: dict[str, dict[str, Any]] = {}
    for file in made["materialize"].files("slot-0000"):
        rows |= {row["image_id"]: row for row in store.read_table(file).to_pylist()}
    holed = {name for name, row in rows.items() if row.get("segmentation_hole_mask") is not None}
    assert (set(rows), holed) == (set("abcdef"), set("abcf"))
    side_px = profile("tiny").materialize.image_px
    for name in holed:
        hole, box = (
            unpack_mask(rows[name][f"{kind}_hole_mask"], width_px=side_px, height_px=side_px) > 0
            for kind in ("segmentation", "box")
        )
        x0, y0, x1, y1 = (rows[name][f"box_{end}_px"] for end in ("x0", "y0", "x1", "y1"))
        assert hole[int((y0 + y1) / 2), int((x0 + x1) / 2)]
        assert 0.4 < hole.sum() / ((x1 - x0) * (y1 - y0)) < 0.9  # a diamond fills half of its box, and it is grown
        assert (hole & box).sum() > 0.8 * hole.sum()
    encoded = [store.read_table(file) for file in made["encode"].files("slot-0000")]
    having = sum(
        table.num_rows - table.column("segmentation_masked_mean").null_count
        for table in encoded
        if "segmentation_masked_mean" in table.schema.names
    )
    assert having == 4


def test_masks_count_boxes_in_the_files_order_whatever_a_caption_has(tmp_path: Path) -> None:
    """Rows with a comma in quotes, and rows that cannot be read, are read last."""
    root = tmp_path / "root"
    (root / "boxes" / "masks").mkdir(parents=True)
    _photos(root)
    whole, left, right = ",".join(map(str, BOX)), "0.25,0.5,0.25,0.75", "0.5,0.75,0.25,0.75"
    lines = [
        "ImageID,LabelName,XMin,XMax,YMin,YMax,Caption",
        f'a,kite,{whole},"a kite, red"',
        "a,kite,odd,1,0,1,its mask is number 1",
        f"a,half,{left},the left half",
        f'a,other,{right},"the right, too"',
        *(f"{name},kite,{whole},a kite" for name in "bcdef"),
    ]
    (root / "boxes" / "train.csv").write_text("\n".join([*lines, ""]))
    halves = _diamond() * (np.arange(WIDTH) < WIDTH // 2), _diamond() * (np.arange(WIDTH) >= WIDTH // 2)
    for number, mask in ((0, _diamond()), (2, halves[0]), (3, halves[1])):
        picture = images.encode_png(mask[..., None].repeat(3, 2).astype(np.uint8) * 255)
        (root / "boxes" / "masks" / f"a_{number}.png").write_bytes(picture)
    store, made = _run(root, "read", "ingest", max_reject_frac=1.0)
    rows = [row for file in made["ingest"].files("boxes") for row in store.read_table(file).to_pylist()]
    masked = {row["label"]: row["mask"] is not None for row in rows if row["image_id"] == "a"}
    assert masked == {"kite": True, "half": True, "other": True}
    assert "rejected_mask_outside_box" not in made["ingest"].counts


def test_references_of_the_bench_have_the_masks_of_their_objects(tmp_path: Path) -> None:
    """And colour transfer pastes the object alone."""
    _photos(tmp_path)
    (tmp_path / "boxes").mkdir()
    _coco(tmp_path / "boxes")
    store, made = _run(tmp_path, "read", "ingest", "filter", "bench")
    table = store.read_table(made["bench"].files("bench")[0])
    rows = require(table, BENCH, "bench").to_pylist()
    assert {row["image_id"] for row in rows if row["own_object_mask"] is not None} == set("abcf")
    of_photo = {row["image_id"]: row["own_object_mask"] for row in rows}
    for row in rows:
        assert row["exemplar_object_mask"] == of_photo[row["exemplar_image_id"]]
        mask = object_mask_of(row, "own", images.decode(row["own"]))
        if mask is None:
            continue
        # half of a box of 48 x 32 px, padded to 68 x 52
        assert mask.mean() == pytest.approx(0.5 * 48 * 32 / (68 * 52), rel=0.05) and mask[112, 112]
        source = images.decode(row["source"])
        given = source, hole_of(row, "box", source), images.decode(row["own"])
        edit = _fill("colour_transfer", *given, mask)
        np.testing.assert_array_equal(edit, colour_transfer(*given, mask))
        assert (edit != colour_transfer(*given)).any()
    store, made = _run(tmp_path, "ignore", "ingest", "filter", "bench")
    names = store.read_table(made["bench"].files("bench")[0]).schema.names
    assert "own" in names and not any(name.endswith("object_mask") for name in names)


def test_masks_that_are_not_asked_for_change_nothing(tmp_path: Path) -> None:
    _photos(tmp_path)
    (tmp_path / "boxes").mkdir()
    _coco(tmp_path / "boxes")
    store, made = _run(tmp_path, "ignore", "ingest", "filter", "materialize")
    for file in made["ingest"].files("boxes"):
        assert "mask" not in store.read_table(file).schema.names
        assert require(store.read_table(file), BOXES, file.path).column("mask").null_count == file.rows
    assert all(
        "segmentation" not in name for name in store.read_table(made["materialize"].files("slot-0000")[0]).schema.names
    )


def test_masks_of_classes_that_are_not_read_are_no_rejects(tmp_path: Path) -> None:
    _photos(tmp_path)
    (tmp_path / "boxes").mkdir()
    _openimages(tmp_path / "boxes")
    for name in ("train.csv", "train-annotations-object-segmentation.csv"):
        path = tmp_path / "boxes" / name
        lines = path.read_text().splitlines()
        others = [line.replace("kite,", "dog,") for line in lines[1:]]
        path.write_text("\n".join([*lines, *others, ""]))
    _, made = _run(tmp_path, "read", "ingest", classes=("kite",))
    counts = made["ingest"].counts
    assert (counts["boxes_kept"], counts["masks_in"], counts["masks_kept"]) == (6, 6, 4)


def test_a_sweep_of_segmentation_holes_takes_items_that_have_one() -> None:
    params = profile("tiny")
    params = params.model_copy(update={"edit": params.edit.model_copy(update={"holes": ("segmentation",)})})
    stage = Stage("sweep", None, params, Store("/nowhere"), Path())
    having = np.array([1, 4, 5, 9])
    requests = _requests(stage, having)
    assert {row for request in requests.values() for row in request.rows} == set(having)
    assert requests == _requests(stage, having) and all(
        request.cfg.holes == ("segmentation",) for request in requests.values()
    )
