"""Segmentation CSVs of OpenImages: every line is a mask or says why not, and each mask finds its box."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from pbe.data.boxfiles.openimages_masks import MASK_ROWS, TOLERANCE, mask_rows, places_of_boxes
from pbe.data.boxfiles.photo_names import PhotoNames
from pbe.data.files import FileTree, SourceError
from pbe.data.schema import PHOTOS

HEADER = "MaskPath,ImageID,LabelName,BoxID,BoxXMin,BoxXMax,BoxYMin,BoxYMax,PredictedIoU,Clicks"
CLICKS = "0.86864,0.95498 0.65197 1;0.89370 0.56579 1;0.94701 0.48968 0"


def _line(path: str = "a_m04_b0.png", image: str = "a", label: str = "/m/04", ends: str = "0.1,0.5,0.2,0.6") -> str:
    return f"{path},{image},{label},b0,{ends},{CLICKS}"


def _read(
    folder: Path,
    *lines: str,
    header: str = HEADER,
    photos: PhotoNames | None = None,
    block_bytes: int = 1 << 20,
) -> pa.Table:
    name, tree = "train-annotations-object-segmentation.csv", FileTree(str(folder), "ingest.masks")
    (folder / name).write_text("\n".join([header, *lines, ""]))
    tables = list(mask_rows(tree, name, photos or PhotoNames(), block_bytes=block_bytes))
    assert all(table.schema == MASK_ROWS for table in tables)
    return pa.concat_tables([MASK_ROWS.empty_table(), *tables])


def test_every_line_is_a_mask_or_says_why_not(tmp_path: Path) -> None:
    lines = [
        _line(),
        _line(ends="0.1,wide,0.2,0.6"),
        "a.png,a",
        "",
        _line(path="../a.png"),
        _line(label=" "),
        _line(image="../y"),
        _line(ends="0.5,0.5,0.2,0.6"),
        _line(ends="0.1,0.5,0.2,nan"),
        _line(image="c.jpg", ends="-0.000001,1.000001,0,1"),
    ]
    for block_bytes in (64, 1 << 20):
        rows = _read(tmp_path, *lines, block_bytes=block_bytes).sort_by("line")
        good = rows.filter(pc.is_null(rows.column("problem"))).drop_columns(["problem"]).to_pylist()
        assert [tuple(row.values()) for row in good] == [
            ("a", "/m/04", 0.1, 0.5, 0.2, 0.6, "a_m04_b0.png", 2),
            ("c", "/m/04", 0.0, 1.0, 0.0, 1.0, "a_m04_b0.png", 11),
        ]
        bad = {row["line"]: row["problem"] for row in rows.to_pylist() if row["problem"]}
        for line, said in {
            3: "BoxXMax wide is not a number",
            4: "2 cells where the header has 10: a.png,a",
            6: "MaskPath ../a.png is no plain name",
            7: "LabelName is empty",
            8: "ImageID ../y is no plain name",
            9: "box 0.5 0.5 0.2 0.6 (x x y y)",
            10: "BoxYMax nan is not a number",
        }.items():
            assert bad.pop(line).startswith(said)
        assert not bad and rows.num_rows == 9  # line 5 is empty


def test_photos_may_be_named_as_in_box_files(tmp_path: Path) -> None:
    listed = [{"image_id": "a", "address": f"{folder}/a.jpg", "version": ""} for folder in ("train", "val")]
    photos = PhotoNames(pa.Table.from_pylist(listed, schema=PHOTOS))
    rows = _read(tmp_path, _line(image="train/a.jpg"), _line(image="/me/val/a"), "a.png,val/a.jpg", photos=photos)
    assert rows.column("image_id").to_pylist() == ["train__a", "val__a", "val__a"]


def test_a_file_of_other_columns_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"object-segmentation\.csv: .* lacks MaskPath, BoxXMin"):
        _read(tmp_path, "a,/m/04,1,2,3,4", header="ImageID,LabelName,XMin,BoxXMax,BoxYMin,BoxYMax")


def _boxes(*rows: tuple[str, tuple[float, ...]]) -> pa.Table:
    columns = [[label for label, _ in rows], *([ends[side] for _, ends in rows] for side in range(4))]
    return pa.table(columns, names=["label", "xmin", "xmax", "ymin", "ymax"])


def test_a_mask_finds_its_box_by_label_and_coordinates_that_are_rounded() -> None:
    exact = (0.022673031, 0.9642005, 0.07103825, 0.80054647)
    beside = (0.022673031 + 1 / 1024, *exact[1:])
    boxes = _boxes(("cup", beside), ("cat", exact), ("cup", exact), ("cup", exact))
    rounded = tuple(round(end, 6) for end in exact)
    cut = tuple(int(end * 1e6) / 1e6 for end in exact)
    masks = _boxes(("cup", rounded), ("cat", cut), ("dog", rounded), ("cup", cut), ("cup", rounded))
    assert places_of_boxes(masks, boxes) == [2, 1, None, None, 3]  # the nearest first, and no box has two
    near = tuple(end + 2 * TOLERANCE for end in exact)
    assert places_of_boxes(_boxes(("cup", near)), boxes) == [None]
    nothing = boxes.slice(0, 0)
    assert places_of_boxes(nothing, boxes) == [] and places_of_boxes(masks.slice(0, 1), nothing) == [None]


def test_all_masks_of_a_crowded_photo_find_the_boxes_that_the_box_file_rounds() -> None:
    rng = np.random.default_rng(0)
    pixels = np.sort(rng.integers(0, 1024, (300, 2, 2)), axis=2) + np.array([0, 1])
    ends = [tuple((row / 1024).ravel().tolist()) for row in np.unique(pixels, axis=0)]
    order = rng.permutation(len(ends)).tolist()
    masks = _boxes(*(("cup", tuple(round(end, 6) for end in ends[place])) for place in order))
    boxes = _boxes(*(("cup", tuple(float(np.float32(end)) for end in row)) for row in ends))
    assert places_of_boxes(masks, boxes) == order
