"""The label converters: YOLO and VOC files give the same boxes as the CSV of the same photos."""

import csv
import io
import subprocess
import sys
from pathlib import Path

import pytest

from pbe.places import repo_root

ROOT = repo_root()
COCO256 = ROOT.parent / "shared" / "data" / "coco256"


def _run(script: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "infra" / "labels" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=check)


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
    rows = list(csv.reader(io.StringIO(_run("from_yolo.py", str(tmp_path), str(names)).stdout)))
    assert rows[1:] == [["a", "dog", "0.25", "0.75", "0.375", "0.625"], ["a", "cat", "0.1", "0.9", "0.2", "0.8"]]
    for text in ("names: [cat, dog]\n", "path: x\nnames:\n  0: cat\n  1: dog\n"):  # the dataset's own file
        (tmp_path / "data.yaml").write_text(text)
        again = _run("from_yolo.py", str(tmp_path), str(tmp_path / "data.yaml")).stdout
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
    assert rows[1:] == [["2008_000008", "horse", "0.0", "1.0", "0.1", "0.6", "1"]]
    (tmp_path / "bad.xml").write_text("<annotation>")
    failed = _run("from_voc.py", str(tmp_path), check=False)
    assert failed.returncode == 1 and "bad.xml" in failed.stderr and "Traceback" not in failed.stderr


@pytest.mark.parametrize("tool", ["from_yolo.py", "from_voc.py"])
def test_a_folder_without_labels_is_an_error(tool: str, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        failed = _run(tool, str(folder), check=False)
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
