"""Masks of objects: every form gives the same mask, every bad one its reason, and the box stays."""

import io
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from pbe.data import images
from pbe.data.boxes import Box
from pbe.data.boxfiles.findings import Findings
from pbe.data.boxfiles.mask_files import mask_files
from pbe.data.files import FileTree, SourceError
from pbe.data.frames import Frame
from pbe.data.ingest import PhotoLimits, read_shard
from pbe.data.object_masks import MaskRejected, ObjectMask, ends_of, read_mask
from pbe.data.schema import (
    ANNOTATIONS,
    BOXES,
    FLAGS,
    MASK_REASONS,
    PHOTOS,
    STATED,
    require,
    table_from_rows,
    with_optional,
)

WIDTH, HEIGHT = 40, 24
FRAME = Frame(WIDTH, HEIGHT, 1, upright=False)
OBJECT = np.zeros((HEIGHT, WIDTH), np.uint8)
OBJECT[6:18, 10:30] = 1
SQUARE = [10, 6, 30, 6, 30, 18, 10, 18]  # the same in COCO's pixels


def _png(array: np.ndarray, mode: str | None = None, **save: Any) -> bytes:
    out = io.BytesIO()
    picture = Image.fromarray(array)
    (picture.convert(mode) if mode else picture).save(out, "PNG", **save)
    return out.getvalue()


def _palette(indices: np.ndarray) -> bytes:
    picture = Image.fromarray(indices, "P")
    picture.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 9, 9, 9])
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def _runs(mask: np.ndarray) -> list[int]:
    flat = np.concatenate([[0], mask.T.ravel(), [2]])
    ends = np.flatnonzero(np.diff(flat))
    return np.diff([0, *ends]).tolist()


def _read(said: Any, frame: Frame = FRAME, file: bytes = b"", stated: tuple[float, float] | None = None) -> np.ndarray:
    def read(name: str) -> bytes:
        if not file:
            raise FileNotFoundError(2, "No such file or directory", name)
        return file

    return read_mask(json.dumps(said), stated=stated, frame=frame, read=read)


RGBA = np.dstack([np.full((HEIGHT, WIDTH, 3), 77, np.uint8), OBJECT * 255])
SOFT = OBJECT * 255
SOFT[5, 10:30] = 100  # an edge drawn with antialiasing


@pytest.mark.parametrize(
    ("said", "file"),
    [
        ([SQUARE], b""),
        (SQUARE, b""),
        ([[1, 1, 5, 5], SQUARE], b""),  # COCO has lines beside rings
        ({"size": [HEIGHT, WIDTH], "counts": _runs(OBJECT)}, b""),
        ({"size": [HEIGHT, WIDTH], "counts": coco_mask.encode(np.asfortranarray(OBJECT))["counts"].decode()}, b""),
        ({"file": "m.png"}, _png(OBJECT * 255)),
        ({"file": "m.png"}, _png(OBJECT)),
        ({"file": "m.png"}, _png(OBJECT * 255, "1")),
        ({"file": "m.png"}, _png(OBJECT.astype(np.uint16) * 65535)),
        ({"file": "m.png"}, _png(RGBA)),
        ({"file": "m.png"}, _png(SOFT)),
        ({"file": "m.png"}, _palette(OBJECT * 2)),
        ({"file": "m.png"}, _png(np.kron(OBJECT, np.ones((3, 3), np.uint8)) * 255)),  # OpenImages: another resolution
    ],
)  # fmt: skip
def test_every_form_gives_the_same_mask(said: Any, file: bytes) -> None:
    mask = _read(said, file=file)
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, OBJECT)


def test_a_polygon_is_drawn_at_the_photos_size_and_turned_with_it() -> None:
    np.testing.assert_array_equal(_read([[2 * x for x in SQUARE]], stated=(2 * WIDTH, 2 * HEIGHT)), OBJECT)
    lopsided = OBJECT.copy()
    lopsided[6:9, 10:20] = 0
    runs = {"size": [HEIGHT, WIDTH], "counts": _runs(lopsided)}
    ring = [20, 6, 30, 6, 30, 18, 10, 18, 10, 9, 20, 9]
    stored = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    for orientation in (5, 6, 7, 8):
        upright = images.decode(images.encode_png(stored + lopsided[..., None]), exif_orientation=orientation)[..., 0]
        frame = Frame(HEIGHT, WIDTH, orientation, upright=True)
        np.testing.assert_array_equal(_read([ring], frame, stated=(WIDTH, HEIGHT)), upright)
        np.testing.assert_array_equal(_read(runs, frame), upright)
        back = {"size": [WIDTH, HEIGHT], "counts": _runs(upright)}
        np.testing.assert_array_equal(_read(back, Frame(WIDTH, HEIGHT, orientation, upright=False)), lopsided)


@pytest.mark.parametrize(
    ("said", "file", "reason", "detail"),
    [
        ([[1, 1, 5, 5]], b"", "mask_unreadable", "no polygon of it has 3 points"),
        ([[float("nan"), 1, 5, 5, 1, 5]], b"", "mask_unreadable", "is no polygon"),
        ([[-20, 1, 5, 5, 1, 5]], b"", "mask_unreadable", "vertex -20, 1 is outside"),
        ([["a", "b"]], b"", "mask_unreadable", "is no polygon"),
        ({"size": [HEIGHT, WIDTH], "counts": [3, 4]}, b"", "mask_unreadable", "do not add up"),
        ({"size": [HEIGHT, WIDTH], "counts": "~~~"}, b"", "mask_unreadable", "do not add up"),
        ({"size": [HEIGHT, WIDTH], "counts": [2**63 - 1, 2**63 - 1, 962]}, b"", "mask_unreadable", "do not add up"),
        ({"size": [HEIGHT * 10**6, WIDTH * 10**6], "counts": [960 * 10**12]}, b"", "mask_unreadable", "more than"),
        ("a polygon", b"", "mask_unreadable", "no run-length encoded mask"),
        (7, b"", "mask_unreadable", "no run-length encoded mask"),
        ({"size": [10**6, 10**6], "counts": [10**12]}, b"", "mask_size_mismatch", "its size is 1e+06"),
        ({"size": [HEIGHT, HEIGHT], "counts": [HEIGHT**2]}, b"", "mask_size_mismatch", "the photo has 40 x 24"),
        ({"file": "m.png"}, b"", "mask_unreadable", "m.png: cannot be read (No such file"),
        ({"file": "m.png"}, b"GIF89a", "mask_unreadable", "m.png: "),
        ({"file": "m.png"}, _png(OBJECT.T * 255), "mask_size_mismatch", "m.png has 24 x 40"),
        ({"file": "m.png"}, _png(OBJECT * 0), "mask_empty", "marks no pixel"),
        ({"file": "m.png"}, _png(OBJECT * 0 + 255), "mask_full", "whole photo"),
        ({"file": "m.png"}, _png(OBJECT * 100), "mask_ambiguous", "largest value is 100"),
        ({"file": "m.png"}, _png(np.tile(np.arange(40, dtype=np.uint8) * 6, (24, 1))), "mask_ambiguous", "greys"),
        ({"file": "m.png"}, _palette(OBJECT + (np.arange(40) > 20)), "mask_ambiguous", "2 objects"),
    ],
)
def test_every_bad_mask_has_its_reason(said: Any, file: bytes, reason: str, detail: str) -> None:
    with pytest.raises(MaskRejected, match=detail.replace("(", r"\(").replace("+", r"\+")) as caught:
        _read(said, file=file)
    assert caught.value.reason == reason


def test_packed_and_unpacked_it_is_the_same() -> None:
    mask = ObjectMask.unpacked(ObjectMask.of(OBJECT).packed())
    np.testing.assert_array_equal(mask.whole(width_px=WIDTH, height_px=HEIGHT), OBJECT)
    assert ends_of(OBJECT) == (10 / WIDTH, 30 / WIDTH, 6 / HEIGHT, 18 / HEIGHT)


@pytest.mark.parametrize("size_px", [16, 64, 200])
def test_a_crop_of_a_mask_is_that_of_the_photo(size_px: int) -> None:
    """As the picture's own crop, but for the rounding of edges."""
    rng, whole = np.random.default_rng(5), np.zeros((150, 220), np.uint8)
    outline = np.array([[30, 20], [190, 40], [150, 130], [90, 70], [40, 120]], np.int32)
    mask = ObjectMask.of(cv2.fillPoly(whole, [outline], 1))
    for _ in range(20):
        x0, y0 = int(rng.integers(0, 120)), int(rng.integers(0, 80))
        area = Box(x0, y0, x0 + int(rng.integers(20, 100)), y0 + int(rng.integers(20, 70)))
        cropped = whole[area.y0 : area.y1, area.x0 : area.x1] * np.uint8(255)
        expected = (
            images.resize(np.repeat(cropped[..., None], 3, 2), width_px=size_px, height_px=size_px)[..., 0] >= 128
        )
        found = mask.cut(area, size_px) > 0
        assert np.count_nonzero(found != expected) <= 0.05 * max(1, expected.sum(), size_px)
    assert not mask.cut(Box(0, 0, 10, 10), size_px).any()


# -- a shard ----------------------------------------------------------------------------------------------------------


def _box(mask: str | None, xmin: float | None = 0.2, image_id: str = "a", **values: Any) -> dict[str, Any]:
    row = {"image_id": image_id, "file": "b.csv", "split": 0, "listed_split": 0, "label": "Cat", "label_name": "Cat"}
    ends = {"xmin": xmin, "xmax": 0.8, "ymin": 0.2, "ymax": 0.8} if xmin is not None else {}
    return row | dict.fromkeys(FLAGS, -1) | ends | {"mask": mask} | values


def _shard(
    rows: list[dict[str, Any]], stated: list[dict[str, Any]] | None = None
) -> tuple[dict[str, pa.Table], dict[str, int]]:
    photo = images.encode_png(np.full((HEIGHT, WIDTH, 3), 90, np.uint8))
    return read_shard(
        table_from_rows(rows, ANNOTATIONS),
        pa.Table.from_pylist([{"image_id": "a", "address": "a.png", "version": ""}], schema=PHOTOS),
        read=lambda image_id, address: photo,
        address_without_photo=lambda image_id, split: None,
        lists_all=True,
        limits=PhotoLimits(exif="ignore", max_pixels=10**6),
        threads=1,
        stated=pa.Table.from_pylist(stated or [], schema=STATED),
        read_file=lambda name: _png(OBJECT * 255),
    )


def test_a_bad_mask_costs_its_box_nothing_and_a_box_follows_from_a_mask() -> None:
    far = json.dumps([[0, 0, 39, 0, 39, 2, 0, 2]])
    file = json.dumps({"file": "masks/a_0.png"})
    rows = [
        _box(json.dumps([SQUARE])),
        _box(far),
        _box(json.dumps([[1, 2]])),
        _box(None),
        _box(file, None),
        _box(json.dumps([[1, 2]]), None),
        _box(None, reason="mask_without_box", detail="masks/a_9.png: ..."),
    ]
    tables, counts = _shard(rows)
    boxes = require(tables["boxes"], BOXES, "boxes").to_pylist()
    assert [row["mask"] is not None for row in boxes] == [True, False, False, False, True]
    assert (boxes[4]["xmin"], boxes[4]["ymax"]) == (10 / WIDTH, 18 / HEIGHT)
    assert boxes[0]["mask"] == boxes[4]["mask"] == ObjectMask.of(OBJECT).packed()
    reasons = sorted(row["reason"] for row in tables["rejects"].to_pylist())
    assert reasons == ["box_without_mask", *sorted(["mask_unreadable"] * 2 + ["mask_outside_box", "mask_without_box"])]
    assert (counts["masks_in"], counts["masks_kept"], counts["masks_rejected"]) == (6, 2, 4)
    assert (counts["boxes_in"], counts["boxes_kept"], counts["boxes_rejected"]) == (6, 5, 1)
    assert set(reasons) <= {*MASK_REASONS, "box_without_mask"}


def test_the_mask_of_a_box_that_is_not_on_its_photo_is_not_counted() -> None:
    stated = [{"image_id": "a", "file": "b.csv", "width_px": 10.0, "height_px": 10.0}]
    rows = [_box(json.dumps([SQUARE])), _box(None, file="c.csv")]
    tables, counts = _shard(rows, stated)
    assert (counts["boxes_rejected"], counts["rejected_box_size_mismatch"], counts["boxes_kept"]) == (1, 1, 1)
    assert "masks_in" not in counts and "mask" not in tables["boxes"].schema.names


def test_without_any_mask_the_tables_have_no_column_for_it() -> None:
    tables, counts = _shard([_box(None)])
    assert "mask" not in tables["boxes"].schema.names and "masks_in" not in counts
    assert "mask" in require(tables["boxes"], BOXES, "boxes").schema.names


def test_pictures_are_found_by_photo_and_number_and_what_is_left_says_so(tmp_path: Path) -> None:
    for name in ("a_1.png", "a_7.png", "dog/b_2_0.png", "c.png", "a_2.jpg", f"d_{10**20}.png"):
        path = tmp_path / "masks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_png(OBJECT * 255))
    findings = Findings()
    found = mask_files(FileTree(str(tmp_path), "ingest.boxes"), findings)
    others = f"masks/a_2.jpg, masks/c.png, masks/d_{10**20}.png"
    assert findings.remarks == [f"{others}: passed over, a mask is called ID_N.png"]
    boxes = with_optional(table_from_rows([_box(None), _box(None), _box(None, image_id="z")], ANNOTATIONS), ANNOTATIONS)
    masks = found.added_to(boxes).column("mask").to_pylist()
    assert masks[0] is masks[2] is None and json.loads(masks[1])["file"] == "masks/a_1.png"
    left = {row["image_id"]: row for row in found.left(0).to_pylist()}
    assert (
        left["a"]["reason"] == "mask_without_box"
        and "masks/a_7.png: the box files have 2 boxes of a" in left["a"]["detail"]
    )
    assert (left["b_2"]["label"], left["b_2"]["xmin"]) == ("dog", None) and json.loads(left["b_2"]["mask"])
    assert set(left) == {"a", "b_2"}


def test_two_folders_may_count_a_photos_masks_from_0_unless_boxes_are_meant(tmp_path: Path) -> None:
    for name in ("masks/cat/a_0.png", "masks/dog/a_0.png", "masks/dog/._a_0.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_png(OBJECT * 255))
    tree = FileTree(str(tmp_path), "ingest.boxes")
    assert [row["label"] for row in mask_files(tree, Findings()).left(0).to_pylist()] == ["cat", "dog"]
    boxes = with_optional(table_from_rows([_box(None)], ANNOTATIONS), ANNOTATIONS)
    with pytest.raises(SourceError, match=r"masks/cat/a_0\.png and masks/dog/a_0\.png are both mask 0 of a; number"):
        mask_files(tree, Findings()).added_to(boxes)
