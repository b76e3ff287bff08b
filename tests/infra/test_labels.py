"""The label converters: YOLO and VOC files give the same boxes as the CSV of the same photos, and their masks."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from pbe.data.annotations import box_files, read_annotations
from pbe.data.files import FileTree
from pbe.places import repo_root

ROOT = repo_root()
COCO256 = ROOT.parent / "shared" / "data" / "coco256"


def _run(script: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "infra" / "labels" / script), *arguments]
    here = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=check, env=here)


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def _rows(done: subprocess.CompletedProcess[str]) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(done.stdout)))


def _refused(script: str, *arguments: str) -> str:
    """The message, which is one line; nothing is on stdout."""
    failed = _run(script, *arguments, check=False)
    assert failed.returncode == 1 and failed.stdout == "", failed.stderr
    return failed.stderr.splitlines()[-1]


def _boxes(text: str) -> list[tuple[str, list[float]]]:
    rows = csv.DictReader(io.StringIO(text))
    return sorted((row["ImageID"], [float(row[key]) for key in ("XMin", "XMax", "YMin", "YMax")]) for row in rows)


def test_yolo_labels_of_coco256_give_the_boxes_of_its_csv() -> None:
    if not COCO256.is_dir():
        pytest.skip(f"needs the labels of coco256 at {COCO256}")
    got = _boxes(_run("from_yolo.py", str(COCO256 / "object_detection" / "labels" / "val2017")).stdout)
    expected = _boxes((COCO256 / "boxes_openimages_val.csv").read_text())
    assert [image_id for image_id, _ in got] == [image_id for image_id, _ in expected] and len(got) == 898
    for (_, ours), (_, theirs) in zip(got, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-6)


def test_yolo_names_polygons_and_a_wrong_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("1 0.5 0.5 0.5 0.25\n\n0 0.1 0.2 0.9 0.2 0.5 0.8\n")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")  # labelImg writes it beside the labels
    names = tmp_path / "classes.names"
    names.write_text("cat\ndog\n")
    bounds = ("--task", "obb")  # no photo is needed
    rows = list(csv.reader(io.StringIO(_run("from_yolo.py", str(tmp_path), str(names), *bounds).stdout)))
    assert rows[1:] == [["a", "dog", "0.25", "0.75", "0.375", "0.625"], ["a", "cat", "0.1", "0.9", "0.2", "0.8"]]
    for text in ("names: [cat, dog]\n", "path: x\nnames:\n  0: cat\n  1: dog\n"):  # the dataset's own file
        (tmp_path / "data.yaml").write_text(text)
        again = _run("from_yolo.py", str(tmp_path), str(tmp_path / "data.yaml"), *bounds).stdout
        assert list(csv.reader(io.StringIO(again))) == rows
    (tmp_path / "data.yaml").write_text("train: images\n")
    failed = _run("from_yolo.py", str(tmp_path), str(tmp_path / "data.yaml"), check=False)
    assert failed.returncode == 1 and "data.yaml: `names` is not a list of class names" in failed.stderr
    for line, word in (
        ("0 0.5 0.5 wide 0.25", "wide"),
        ("0 0.5 nan 0.2 0.2", "finite"),
        ("7 .5 .5 .2 .2", "class 7 has"),
    ):
        (tmp_path / "b.txt").write_text(f"{line}\n")
        failed = _run("from_yolo.py", str(tmp_path), str(names), check=False)
        assert failed.returncode == 1 and "b.txt:1" in failed.stderr and word in failed.stderr
        assert "Traceback" not in failed.stderr and failed.stdout == ""


def test_voc_pixels_start_at_1(tmp_path: Path) -> None:
    (tmp_path / "2008_000008.xml").write_text(
        "<annotation><size><width>200</width><height>100</height></size><object><name>horse</name><truncated>1</truncated>"
        "<bndbox><xmin>1</xmin><ymin>11</ymin><xmax>200</xmax><ymax>60</ymax></bndbox></object></annotation>"
    )
    rows = list(csv.reader(io.StringIO(_run("from_voc.py", str(tmp_path)).stdout)))
    assert rows[1:] == [["2008_000008", "horse", "0.0", "1.0", "0.1", "0.6", "1", "200", "100"]]
    (tmp_path / "bad.xml").write_text("<annotation>")
    failed = _run("from_voc.py", str(tmp_path), check=False)
    assert failed.returncode == 1 and "bad.xml" in failed.stderr and "Traceback" not in failed.stderr


@pytest.mark.parametrize("tool", ["from_yolo.py", "from_voc.py", "from_oidv4.py", "from_cutouts.py"])
def test_a_folder_without_labels_is_an_error(tool: str, tmp_path: Path) -> None:
    out = [str(tmp_path.parent / "out")] if tool == "from_cutouts.py" else []
    for folder in (tmp_path, tmp_path / "nowhere"):
        failed = _run(tool, str(folder), *out, check=False)
        assert failed.returncode == 1 and failed.stdout == "" and str(folder) in failed.stderr


@pytest.mark.parametrize("line", ["-1 0.5 0.5 0.5 0.25", "7 0.5 0.5 0.5 0.25"])
def test_a_class_that_has_no_name_stops_before_anything_is_written(tmp_path: Path, line: str) -> None:
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text("0 0.5 0.5 0.5 0.25\n")
    (tmp_path / "labels" / "b.txt").write_text(line)
    (tmp_path / "names").write_text("cat\ndog\n")
    failed = _run("from_yolo.py", str(tmp_path / "labels"), str(tmp_path / "names"), check=False)
    assert failed.returncode == 1 and failed.stdout == "" and "b.txt:1" in failed.stderr


def test_bytes_before_the_first_class_and_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("0 0.5 0.5 0.5 0.25\n", encoding="utf-8-sig")
    assert _run("from_yolo.py", str(tmp_path)).stdout.splitlines()[1].startswith("a,0,")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9 0.5 0.5 0.5 0.25\n")
    for arguments in ((str(tmp_path),), (str(tmp_path), str(tmp_path / "nowhere"))):
        failed = _run("from_yolo.py", *arguments, check=False)
        assert failed.returncode == 1 and "cannot be read" in failed.stderr and "Traceback" not in failed.stderr


PENTAGON = "0.5 0.5 0.6 0.5 0.6 0.6 0.5 0.65 0.45 0.6"  # its first four, as a box, have the other points in them
POSE_BOX = "0.67 0.58 0.12 0.02"
POSE = f"{POSE_BOX} 0.61 0.575 0.69 0.58 0.73 0.588"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("0 320 240 100 80", "not fractions of the photo: 320"),
        ("0 0.5 0.5 1.001 0.2", "not fractions of the photo: 1.001"),
        ("0 -0.01 0.5 0.2 0.2", "not fractions of the photo: -0.01"),
        ("0 1 30 200 30 200 90 1 90", "not fractions"),  # a polygon in pixels
        ("0 0.5 0.5 0.2", "3 numbers after the class"),
        ("0 0.5 0.5 0.2 0.2 1.5", "not fractions of the photo: 1.5"),  # as confidence
        ("0 0.1 0.1 0.2 0.1 0.2 0.2 0.9", "7 numbers after the class"),
        ("0 0.1 0.1 0.2 nan 0.2 0.2", "not finite"),
        ("Apple 12.5 30 100 90", "from_oidv4.py"),
        ("Coffee cup 12.5 30 100 90", "from_oidv4.py"),
        ("0.5 0.5 0.5 0.2 0.2", "class number"),
        (f"0 {POSE}", "--task"),
        (f"0 {PENTAGON}", "kpt_shape"),
    ],
)
def test_a_yolo_line_of_no_format_is_refused_by_file_and_line(tmp_path: Path, line: str, said: str) -> None:
    _write(tmp_path / "a.txt", f"\n{line}\n")
    message = _refused("from_yolo.py", str(tmp_path))
    assert "a.txt:2: " in message and said in message


@pytest.mark.parametrize(
    ("lines", "ends"),
    [
        (["0 0.99 0.5 0.1 0.5"], (0.94, 1.0, 0.25, 0.75)),  # an object at the edge may be cut off
        (["0 0.500001 0.5 1.000002 0.5"], (0.0, 1.0, 0.25, 0.75)),
        (["0 0.5 0.5 0.5 0.25 0.93"], (0.25, 0.75, 0.375, 0.625)),  # a prediction
        (["0 0.5 0.4 0.6 0.5 0.5 0.6 0.4 0.5"], (0.4, 0.6, 0.4, 0.6)),  # a rotated box
        ([f"0 {POSE_BOX} 0.61 0.575 2 0.69 0.58 1 0 0 0"], (0.61, 0.73, 0.57, 0.59)),
    ],
)
def test_yolo_formats_are_known_by_their_columns(tmp_path: Path, lines: list[str], ends: tuple[float, ...]) -> None:
    _write(tmp_path / "a.txt", "\n".join(lines))
    row = _rows(_run("from_yolo.py", str(tmp_path)))[0]
    assert [float(row[key]) for key in ("XMin", "XMax", "YMin", "YMax")] == pytest.approx(ends, abs=1e-6)


def test_yolo_keypoints_are_no_polygon_where_the_data_set_says_so(tmp_path: Path) -> None:
    _write(tmp_path / "labels" / "a.txt", f"0 {POSE}\n")
    _write(tmp_path / "data.yaml", "kpt_shape: [3, 2]\nnames: {0: hero}\n")
    for arguments in ((str(tmp_path / "labels"),), (str(tmp_path / "labels"), str(tmp_path / "data.yaml"))):
        (row,) = _rows(_run("from_yolo.py", *arguments))
        assert (row["LabelName"], float(row["XMin"]), float(row["YMax"])) == ("hero", 0.61, 0.59)
    _write(tmp_path / "data.yaml", "kpt_shape: [17, 3]\nnames: {0: hero}\n")
    assert "a.txt:1: 10 numbers after the class, kpt_shape makes 55" in _refused("from_yolo.py", str(tmp_path))
    (tmp_path / "data.yaml").unlink()
    xmins = {task: _rows(_run("from_yolo.py", str(tmp_path), "--task", task))[0]["XMin"] for task in ("pose", "obb")}
    assert xmins == {"pose": "0.61", "obb": "0.12"}


def _coco(done: subprocess.CompletedProcess[str]) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    coco = json.loads(done.stdout)
    return coco, {entry["id"]: entry for entry in coco["images"]}


def test_yolo_polygons_become_a_coco_json_in_pixels_of_the_upright_photo(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    for name, exif in (("train/images/[1].jpg", None), ("train/images/b.PNG", turned), ("valid/images/b.jpg", None)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (200, 100)).save(tmp_path / name, exif=exif or Image.Exif())
    labels = tmp_path / "train" / "labels"
    _write(labels / "[1].txt", f"0 {PENTAGON}\n1 0.5 0.5 0.5 0.25\n0 0.1 0.1 0.4 0.1 0.1 0.1\n1 0.9 0.9 0.4 0.8\n")
    _write(labels / "b.txt", "1 0 0 1.000009 0 0.5 0.25\n")
    _write(labels / "gone.txt", "1 0 0 1 0 0.5 0.25\n")
    _write(labels / "empty.txt", "")
    _write(tmp_path / "valid" / "labels" / "b.txt", "1 0 0 1 0 0.5 0.25\n")
    _write(tmp_path / "data.yaml", "names: [cat, dog]\n")
    for arguments in ((), ("--images", str(tmp_path))):
        done = _run("from_yolo.py", str(tmp_path), *arguments)
        coco, photos = _coco(done)
        assert [(photo["file_name"], photo["width"], photo["height"]) for photo in coco["images"]] == [
            ("[1].jpg", 200, 100),
            ("train/images/b.PNG", 100, 200),
            ("valid/images/b.jpg", 200, 100),
        ]
        assert [(photos[entry["image_id"]]["file_name"], entry["category_id"], entry["bbox"], entry["area"],
                 entry.get("segmentation")) for entry in coco["annotations"]] == [
            ("[1].jpg", 0, [90, 50, 30, 15], 325, [[100, 50, 120, 50, 120, 60, 100, 65, 90, 60]]),
            ("[1].jpg", 1, [50, 37.5, 100, 25], 2500, None),
            ("train/images/b.PNG", 1, [0, 0, 100, 50], 2500, [[0, 0, 100, 0, 50, 50]]),
            ("valid/images/b.jpg", 1, [0, 0, 200, 25], 2500, [[0, 0, 200, 0, 100, 25]]),
        ]  # fmt: skip
        assert coco["categories"] == [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]
        for said in ("polygons of fewer than 3 different points: ", "may be polygons of two points: "):
            (line,) = [line for line in done.stderr.splitlines() if said in line]
            assert line.startswith("1 left out, ") and "[1].txt:" in line
        assert "1 left out, labels without a photo: " in done.stderr and "3 polygons and 1 boxes" in done.stderr
    assert "--images" in _refused("from_yolo.py", str(tmp_path), "--images", str(tmp_path / "nowhere"))


def test_polygons_of_coco256_lie_on_the_boxes_of_their_class(tmp_path: Path) -> None:
    if not COCO256.is_dir():
        pytest.skip(f"needs the polygons of coco256 at {COCO256}")
    polygons, boxes, photos = (
        COCO256 / "instance_segmentation",
        COCO256 / "object_detection",
        COCO256 / "images/val2017",
    )
    # the two number their classes differently
    labels = [(str(folder / "labels" / "val2017"), str(folder / "config.yaml")) for folder in (polygons, boxes)]
    done = _run("from_yolo.py", *labels[0], "--images", str(photos))
    (tmp_path / "instances_val.json").write_text(done.stdout)
    coco, _ = _coco(done)
    assert len(coco["images"]) == 100 and all("segmentation" in entry for entry in coco["annotations"])
    for photo in coco["images"]:
        with Image.open(photos / photo["file_name"], formats=["JPEG"]) as picture:
            assert picture.size == (photo["width"], photo["height"])
    reference: dict[tuple[str, str], list[np.ndarray]] = {}
    for row in _rows(_run("from_yolo.py", *labels[1])):
        ends = np.array([float(row[end]) for end in ("XMin", "XMax", "YMin", "YMax")])
        reference.setdefault((row["ImageID"], row["LabelName"]), []).append(ends)
    tree = FileTree(str(tmp_path), "ingest.boxes")
    (read,) = read_annotations(tree, box_files(tree)[0])  # as ingest does
    ious = []
    for row in read.to_pylist():
        assert row["reason"] is None
        ends = np.array([row[end] for end in ("xmin", "xmax", "ymin", "ymax")])
        ious.append(max(_iou(ends, box) for box in reference[row["image_id"], row["label"]]))
    assert len(ious) == 712 and np.mean(np.array(ious) > 0.5) > 0.98 and np.median(ious) > 0.9  # coarse polygons


def _iou(one: np.ndarray, other: np.ndarray) -> float:
    low, high = np.maximum(one, other)[::2], np.minimum(one, other)[1::2]
    common = float(np.prod(np.clip(high - low, 0, None)))
    return common / (sum(float(np.prod(box[1::2] - box[::2])) for box in (one, other)) - common)


def test_a_yolo_data_set_of_roboflow_is_read_as_it_lies(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        _write(tmp_path / split / "labels" / "cat_jpg.rf.1a.txt", "0 0.5 0.5 0.5 0.5\n")
    _write(tmp_path / "train" / "labels" / "dog_jpg.rf.2b.txt", "1 0.5 0.5 0.5 0.5\n")
    _write(tmp_path / "README.roboflow.txt", "pets - v1\n")
    _write(tmp_path / "data.yaml", "names: [cat, dog]\nnc: 2\n")
    rows = _rows(_run("from_yolo.py", str(tmp_path)))
    assert {(row["ImageID"], row["LabelName"]) for row in rows} == {
        ("train/images/cat_jpg.rf.1a", "cat"),
        ("valid/images/cat_jpg.rf.1a", "cat"),
        ("dog_jpg.rf.2b", "dog"),
    }


def test_lists_of_photos_are_no_labels(tmp_path: Path) -> None:
    _write(tmp_path / "obj_train_data" / "a.txt", "0 0.5 0.5 0.5 0.5\n")
    _write(tmp_path / "train.txt", "data/obj_train_data/a.jpg\ndata/obj_train_data/b.PNG\n")
    assert [row["ImageID"] for row in _rows(_run("from_yolo.py", str(tmp_path)))] == ["a"]


def _voc(box: tuple[object, ...], size: tuple[object, ...] = (160, 120)) -> str:
    sides = "".join(f"<{n}>{v}</{n}>" for n, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    width, height = size
    return (
        f"<annotation><size><width>{width}</width><height>{height}</height></size>"
        f"<object><name>cup</name><bndbox>{sides}</bndbox></object></annotation>"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (_voc((41, 31, 110, 90), (0, 0)), "its size is 0 x 0"),
        (_voc((41, 31, 110, 90), (-160, 120)), "its size is -160 x 120"),
        (_voc((41, 31, 110, 90), ("", 120)), "size/width is '', not a number"),
        (_voc((41, 31, 110, 150)), "object 1 (cup): x 40..110, y 30..150 px is not inside a photo of 160 x 120"),
        (_voc((0.25, 0.25, 0.7, 0.75)), "is not in pixels"),
        (_voc((41, 31, "nan", 90)), "bndbox/xmax is 'nan', not a number"),
        (_voc((41, 31, 110, 90)).replace("cup", " "), "object 1 has no name"),
        ("<annotations/>", "not a VOC annotation"),
    ],
)
def test_a_voc_file_that_does_not_fit_its_photo_is_refused(tmp_path: Path, text: str, said: str) -> None:
    _write(tmp_path / "a.xml", text)
    assert said in _refused("from_voc.py", str(tmp_path))


def test_voc_pixels_may_start_at_0_and_end_a_pixel_outside(tmp_path: Path) -> None:
    _write(tmp_path / "a.xml", _voc((0, 0, 161, 121)))
    (row,) = _rows(_run("from_voc.py", str(tmp_path)))
    assert [float(row[key]) for key in ("XMin", "XMax", "YMin", "YMax")] == [0, 1, 0, 1]
    assert (row["ImageWidth"], row["ImageHeight"]) == ("160", "120")


def _voc_photo(folder: Path, name: str, boxes: list[tuple[int, int, int, int]], regions: np.ndarray | None) -> None:
    """boxes: x0, x1, y0, y1, half-open, from 0."""
    objects = "".join(
        f"<object><name>cup</name><bndbox><xmin>{x0 + 1}</xmin><xmax>{x1}</xmax><ymin>{y0 + 1}</ymin><ymax>{y1}</ymax>"
        "</bndbox></object>"
        for x0, x1, y0, y1 in boxes
    )
    size = "<size><width>60</width><height>40</height></size>"
    _write(folder / "Annotations" / f"{name}.xml", f"<annotation>{size}{objects}</annotation>")
    if regions is not None:
        picture = Image.fromarray(regions)
        if picture.mode == "L":
            picture.putpalette([(3 * value) % 256 for value in range(768)])
        (folder / "SegmentationObject").mkdir(exist_ok=True)
        picture.save(folder / "SegmentationObject" / f"{name}.png")


def _regions(*rows: tuple[int, tuple[int, int, int, int]]) -> np.ndarray:
    """Objects with a void border of 2 px inside their box."""
    regions = np.zeros((40, 60), np.uint8)
    for number, (x0, x1, y0, y1) in rows:
        regions[y0:y1, x0:x1] = 255
        regions[y0 + 2 : y1 - 2, x0 + 2 : x1 - 2] = number
    return regions


LEFT, RIGHT, SMALL = (2, 22, 4, 34), (24, 48, 4, 34), (50, 60, 0, 10)


def test_objects_of_voc_become_the_masks_of_their_boxes(tmp_path: Path) -> None:
    _voc_photo(tmp_path, "a", [RIGHT, LEFT, SMALL], _regions((1, LEFT), (2, RIGHT), (7, SMALL)))  # in another order
    _voc_photo(tmp_path, "b", [LEFT, RIGHT], _regions((2, RIGHT), (3, (2, 12, 30, 40))))  # one missing, one too many
    _voc_photo(tmp_path, "c", [LEFT], None)
    _voc_photo(tmp_path, "void", [LEFT], _regions((255, LEFT)))
    _voc_photo(tmp_path, "size", [LEFT], _regions((1, LEFT))[:, :50])
    _voc_photo(tmp_path, "colour", [LEFT], np.zeros((40, 60, 3), np.uint8))
    _voc_photo(tmp_path, "broken", [LEFT], None)
    (tmp_path / "SegmentationObject" / "broken.png").write_bytes(b"\x89PNG\r\n")
    _voc_photo(tmp_path, "empty", [], None)
    out = tmp_path / "masks"
    done = _run("from_voc.py", str(tmp_path / "Annotations"), "--masks", str(out))
    assert done.stdout == _run("from_voc.py", str(tmp_path)).stdout
    masks = {path.name: np.asarray(Image.open(path, formats=["PNG"])) for path in out.iterdir()}
    expected = {"a_0": RIGHT, "a_1": LEFT, "a_2": SMALL, "b_1": RIGHT}
    assert sorted(masks) == [f"{name}.png" for name in expected]
    for name, (x0, x1, y0, y1) in expected.items():
        mask = np.zeros((40, 60), np.uint8)
        mask[y0 + 2 : y1 - 2, x0 + 2 : x1 - 2] = 255
        assert np.array_equal(masks[f"{name}.png"], mask), name
    for said in (
        "1 left out, boxes without a region: b box 0",
        "1 left out, photos without a PNG in SegmentationObject: c",
        "1 left out, pictures without an object: ",
        "it is 50 x 40 px, its annotation says 60 x 40",
        "it is RGB, not a palette",
        "it cannot be read",
        "1 left out, regions without a box: ",
        "4 masks for 10 boxes, in 2 of 8 photos",
    ):
        assert said in done.stderr, said
    for path in (tmp_path / "SegmentationObject").iterdir():
        path.unlink()
    assert "no mask for any of 10 boxes" in _refused("from_voc.py", str(tmp_path), "--masks", str(out))
    _voc_photo(tmp_path / "other", "a", [LEFT], _regions((1, LEFT)))
    assert "another photo is also called a;" in _refused("from_voc.py", str(tmp_path), "--masks", str(out))


def test_cut_outs_become_photos_masks_and_boxes(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    alpha = np.zeros((40, 60), np.uint8)
    alpha[10:30, 15:45], alpha[10, 15] = 128, 127
    layers = {
        "cup/1": alpha,
        "cat/1": np.fliplr(alpha),
        "top": alpha,
        "cup/none": alpha * 0,
        "cup/full": alpha * 0 + 255,
        "cup/faint": alpha // 2,
        "cup/thick": alpha // 2 + 190,
    }
    for name, layer in layers.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.dstack([colours, layer])).save(tmp_path / "in" / f"{name}.png")
    (tmp_path / "in" / "cup" / "broken.png").write_bytes(b"no picture")
    done = _run("from_cutouts.py", str(tmp_path / "in"), str(tmp_path / "out"))
    rows = _rows(done)
    assert [(row["ImageID"], row["LabelName"]) for row in rows] == [
        ("cat__1", "cat"), ("cup__1", "cup"), ("top", "object")
    ]  # fmt: skip
    assert [float(rows[1][end]) for end in ("XMin", "XMax", "YMin", "YMax")] == [0.25, 0.75, 0.25, 0.75]
    for row in rows:
        photo = Image.open(tmp_path / "out" / "images" / f"{row['ImageID']}.png", formats=["PNG"])
        assert photo.mode == "RGB" and np.array_equal(np.asarray(photo), colours)  # also what is transparent
        mask = Image.open(tmp_path / "out" / "masks" / row["LabelName"] / f"{row['ImageID']}_0.png", formats=["PNG"])
        assert mask.mode == "L" and set(np.unique(np.asarray(mask))) == {0, 255}
    assert np.array_equal(np.asarray(mask), np.where(alpha >= 128, 255, 0))
    for said in (
        "2 left out, alpha is below 128 everywhere: ",
        "2 left out, alpha is 128 or more everywhere: ",
        "1 left out, unreadable: ",
    ):
        assert said in done.stderr, done.stderr
    again = _run("from_cutouts.py", str(tmp_path / "in"), str(tmp_path / "out"))  # the same pictures: no complaint
    assert again.stdout == done.stdout
    Image.fromarray(np.dstack([255 - colours, alpha])).save(tmp_path / "in" / "top.png")
    assert "another picture is there" in _refused("from_cutouts.py", str(tmp_path / "in"), str(tmp_path / "out"))
    assert "another folder" in _refused("from_cutouts.py", str(tmp_path / "in"), str(tmp_path / "in" / "out"))
    for path in (tmp_path / "in" / "cup").glob("[1t]*.png"):
        path.unlink()
    assert "no cut-out is left" in _refused("from_cutouts.py", str(tmp_path / "in" / "cup"), str(tmp_path / "out"))


def test_labels_of_oidv4_are_pixels_of_the_photo_above_them(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6  # the toolkit's OpenCV had it upright
    for name, exif in (("Apple/a.jpg", None), ("Coffee cup/a.jpg", None), ("Coffee cup/b.jpg", turned)):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (160, 120)).save(tmp_path / "train" / name, exif=exif or Image.Exif())
    _write(tmp_path / "train" / "Apple" / "Label" / "a.txt", "Apple 40.0 30.0 110.0 90.0\n")
    _write(tmp_path / "train" / "Coffee cup" / "Label" / "a.txt", "Coffee cup 0 0 160.4 120\n")
    last = _write(tmp_path / "train" / "Coffee cup" / "Label" / "b.txt", "Coffee cup 30 40 60 160\n")
    rows = _rows(_run("from_oidv4.py", str(tmp_path)))
    ends = ("XMin", "XMax", "YMin", "YMax")
    assert [(row["ImageID"], row["LabelName"], *(float(row[end]) for end in ends)) for row in rows] == [
        ("a", "Apple", 0.25, 0.6875, 0.25, 0.75),
        ("a", "Coffee cup", 0, 1, 0, 1),
        ("b", "Coffee cup", 0.25, 0.5, 0.25, 1),
    ]
    for text, said in (("Cup 0 0 200 120\n", "not inside"), ("1 2 3 4\n", "4 words"), ("Cup 0 0 .5 .5", "in pixels")):
        last.write_text(text)
        message = _refused("from_oidv4.py", str(tmp_path))
        assert "b.txt:1: " in message and said in message
    (tmp_path / "train" / "Coffee cup" / "b.jpg").unlink()
    assert "0 photos" in _refused("from_oidv4.py", str(tmp_path))
