"""Box files: every line becomes a row, typed or with a reason; OpenImages' real columns; COCO JSON."""

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pbe.data.annotations import box_files, class_names, read_annotations, with_names
from pbe.data.boxfiles.findings import Findings
from pbe.data.boxfiles.photo_names import invalid_ids
from pbe.data.files import FileTree, SourceError
from pbe.data.schema import ANNOTATIONS, SPLITS, without_empty

TRAIN_HEADER = (
    "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside,"
    "XClick1X,XClick2X,XClick3X,XClick4X,XClick1Y,XClick2Y,XClick3Y,XClick4Y"
)
TRAIN_ROW = "000002b66c9c498e,xclick,/m/01g317,1,0.012500,0.195312,0.148438,0.587500,0,1,0,0,0" + ",0.1" * 8
VALIDATION_HEADER = ",".join(TRAIN_HEADER.split(",")[:13])
VALIDATION_ROW = "0001eeaf4aed83f9,xclick,/m/0cmf2,1,0.022673031,0.9642005,0.07103825,0.80054647,0,0,0,0,-1"
HEADER = "ImageID,LabelName,XMin,XMax,YMin,YMax"
GOOD = "a,/m/1,0.1,0.5,0.2,0.6"


def _read(folder: Path, text: str | bytes, name: str = "train-boxes.csv") -> list[dict[str, Any]]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    tree = FileTree(str(folder), "ingest.boxes")
    out = []
    for file in box_files(tree):
        for table in read_annotations(tree, file):
            assert table.schema.equals(without_empty(ANNOTATIONS.empty_table()).schema)
            out += table.to_pylist()
    return sorted(out, key=lambda row: row["line"])


def test_the_21_columns_of_train_and_the_13_of_validation_are_read_by_name(tmp_path: Path) -> None:
    (train,) = _read(tmp_path / "a", f"{TRAIN_HEADER}\n{TRAIN_ROW}\n", "oidv6-train-annotations-bbox.csv")
    assert train == {
        "image_id": "000002b66c9c498e",
        "file": "oidv6-train-annotations-bbox.csv",
        "line": 2,
        "split": SPLITS.index("train"),
        "listed_split": SPLITS.index("train"),
        "label": "/m/01g317",
        "label_name": "/m/01g317",
        "xmin": 0.0125,
        "xmax": 0.195312,
        "ymin": 0.148438,
        "ymax": 0.5875,
        "is_occluded": 0,
        "is_truncated": 1,
        "is_group_of": 0,
        "is_depiction": 0,
        "is_inside": 0,
        "reason": None,
        "detail": None,
    }
    (other,) = _read(tmp_path / "b", f"{VALIDATION_HEADER}\n{VALIDATION_ROW}\n", "validation-annotations-bbox.csv")
    assert (other["split"], other["is_inside"], other["xmax"]) == (SPLITS.index("validation"), -1, 0.9642005)


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        ("a,/m/1,left,0.5,0.2,0.6", "box_unparsable", "XMin left is not a number"),
        ("a,/m/1,,0.5,0.2,0.6", "box_unparsable", "XMin  is not a number"),
        ("a,/m/1,0.1,nan,0.2,0.6", "box_unparsable", "XMax nan is not a number"),
        ("a,/m/1,0.1,inf,0.2,0.6", "box_unparsable", "XMax inf is not a number"),
        ("a,/m/1,0x1,0.5,0.2,0.6", "box_unparsable", "XMin 0x1 is not a number"),
        ("a,/m/1,0,1,0,5,0,2,0,6", "box_unparsable", "10 cells where the header has 6"),  # decimal commas
        ('a,/m/1,"0,100,5",0.5,0.2,0.6', "box_unparsable", "XMin 0,100,5 is not a number"),
        (b"a\xe9,/m/1,0.1,0.5,0.2,0.6", "box_unparsable", "byte 0xe9 is not UTF-8; save the file as UTF-8: a\ufffd,"),
        (b"a,Caf\xe9,0.1,0.5,0.2", "box_unparsable", "byte 0xe9 is not UTF-8"),
        ("a,/m/1,0.1,0.5", "box_unparsable", "4 cells where the header has 6"),  # the file was cut
        ("a,,0.1,0.5,0.2,0.6", "box_unparsable", "LabelName is empty"),
        ("a,/m/1,0.5,0.1,0.2,0.6", "box_outside_image", "x 0.5..0.1, y 0.2..0.6; fractions"),  # swapped
        ("a,/m/1,0.1,1.5,0.2,0.6", "box_outside_image", "x 0.1..1.5"),
        ("a,/m/1,-0.1,0.5,0.2,0.6", "box_outside_image", "x -0.1..0.5"),
        ("a,/m/1,0.1,0.5,0.6,0.6", "box_outside_image", "y 0.6..0.6"),
        ("a,/m/1,12,480,30,200", "box_outside_image", "x 12..480"),  # pixels instead of fractions
        (",/m/1,0.1,0.5,0.2,0.6", "box_image_id_invalid", "ImageID "),
        ("../../etc/passwd,/m/1,0.1,0.5,0.2,0.6", "box_image_id_invalid", "ImageID ../../etc/passwd"),
        ("/etc/passwd,/m/1,0.1,0.5,0.2,0.6", "box_image_id_invalid", "/etc/passwd"),
        ("..\\..\\x,/m/1,0.1,0.5,0.2,0.6", "box_image_id_invalid", ""),
        ("..,/m/1,0.1,0.5,0.2,0.6", "box_image_id_invalid", ".."),
    ],
)
def test_a_wrong_line_has_its_reason_and_costs_no_other_line(
    tmp_path: Path, line: str | bytes, reason: str, detail: str
) -> None:
    wrong_line = line.encode() if isinstance(line, str) else line
    before, wrong, after = _read(tmp_path, f"{HEADER}\n{GOOD}\n".encode() + wrong_line + f"\n{GOOD}\n".encode())
    assert (wrong["line"], wrong["reason"]) == (3, reason)
    assert detail in wrong["detail"]
    for row, number in ((before, 2), (after, 4)):
        assert (row["line"], row["reason"], row["xmin"], row["ymax"]) == (number, None, 0.1, 0.6)


@pytest.mark.parametrize("flag", ["yes", "2", "300"])
def test_a_flag_is_1_0_or_minus_1(tmp_path: Path, flag: str) -> None:
    (row,) = _read(tmp_path, f"{HEADER},IsOccluded\n{GOOD},{flag}\n")
    assert (row["reason"], row["detail"]) == ("box_unparsable", f"IsOccluded {flag} is not 1, 0 or -1")


def test_a_column_of_captions_is_read_and_a_wrong_one_costs_its_own_row(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(f'{HEADER},caption\n{GOOD},"a red, old car "\n{GOOD}, \n{GOOD},{"x" * 401}\n')
    tree = FileTree(str(tmp_path), "ingest.boxes")
    rows = [row for table in read_annotations(tree, box_files(tree)[0]) for row in table.to_pylist()]
    said, empty, wrong = sorted(rows, key=lambda row: row["line"])
    assert (said["caption"], said["reason"]) == ("a red, old car", None)
    assert (empty.get("caption"), empty["reason"]) == (None, None)
    assert wrong["reason"] == "box_unparsable" and "the caption has 401 characters" in wrong["detail"]


def test_ids_lose_their_image_suffix_and_spaces(tmp_path: Path) -> None:
    ids = ["a.jpg", "b.JPEG", " c ", "d.png", "e.tar.jpg", "f.v2", "g"]
    rows = _read(tmp_path, f"{HEADER}\n" + "".join(f"{name},/m/1,0.1,0.5,0.2,0.6\n" for name in ids))
    assert [row["image_id"] for row in rows] == ["a", "b", "c", "d", "e.tar", "f.v2", "g"]


def test_a_byte_order_mark_extra_columns_windows_ends_and_another_order_are_fine(tmp_path: Path) -> None:
    text = "\ufeffYMax,Note,XMax,XMin,YMin,LabelName,ImageID\r\n0.6,hello,0.5,0.1,0.2,/m/1,a\r\n"
    (row,) = _read(tmp_path, text.encode("utf-8"))
    assert [row[key] for key in ("image_id", "label", "xmin", "xmax", "ymin", "ymax", "reason")] == [
        "a", "/m/1", 0.1, 0.5, 0.2, 0.6, None,
    ]  # fmt: skip


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
        ("instances_val2017.json.csv", "validation"),
        ("oidv6-test.csv", "test"),
        ("latest_boxes.csv", "train"),  # names no split: only whole words count
        ("interval_values.csv", "train"),
    ],
)
def test_the_split_is_in_the_files_name_train_before_val_before_test_and_the_folder_has_no_say(
    tmp_path: Path, name: str, split: str
) -> None:
    (row,) = _read(tmp_path / "test", f"{HEADER}\n{GOOD}\n", name)
    assert (SPLITS[row["split"]], row["file"]) == (split, name)


def test_all_box_files_of_a_folder_are_read_in_name_order_but_not_those_below_it(tmp_path: Path) -> None:
    for name in ("b_val.csv", "a_train.csv", "instances_test.json", ".hidden.csv", "notes.json", "deeper/c.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{HEADER}\n{GOOD}\n")
    files = box_files(FileTree(str(tmp_path), "ingest.boxes"))
    assert [(file.name, SPLITS[file.split]) for file in files] == [
        ("a_train.csv", "train"),
        ("b_val.csv", "validation"),
        ("instances_test.json", "test"),
    ]
    (only,) = box_files(FileTree(str(tmp_path / "b_val.csv"), "ingest.boxes"))
    assert only == files[1]


@pytest.mark.parametrize("missing", HEADER.split(","))
def test_a_missing_column_is_named_with_what_the_file_has(tmp_path: Path, missing: str) -> None:
    left = [name for name in HEADER.split(",") if name != missing]
    with pytest.raises(SourceError, match=rf"train-boxes\.csv: .* lacks {missing}; it has {', '.join(left)}$"):
        _read(tmp_path, ",".join(left) + "\na,b,0,1,0\n")


def test_blank_lines_are_no_lines_but_they_count(tmp_path: Path) -> None:
    """A reject names the line that an editor shows."""
    rows = _read(tmp_path, f"{HEADER}\n{GOOD}\n\n{GOOD}\n\n\na,too,few\n{GOOD}\n")
    assert [row["line"] for row in rows] == [2, 4, 7, 8]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "the file is empty"),
        (HEADER.encode() + b"\n", "no box in it"),
        (b"ImageID,LabelName,XMin,XMax,YMin\na,b,0,1,0\n", "its header lacks YMax"),
        (b"ImageID:LabelName:XMin:XMax:YMin:YMax\n", "its header lacks ImageID"),
        (HEADER.encode() + b",XMin\n", "contains 'XMin' more than once"),
        (HEADER.lower().encode() + b",x_min\n", "contains 'XMin' more than once"),
        (b"PK\x03\x04\x14\x00\x06\x00", "an Excel workbook or a zip file, not a CSV; save it as CSV in UTF-8"),
    ],
)
def test_a_file_that_is_no_box_csv_is_one_message_that_names_it(tmp_path: Path, text: bytes, message: str) -> None:
    with pytest.raises(SourceError) as caught:
        _read(tmp_path, text)
    assert str(tmp_path / "train-boxes.csv") in str(caught.value) and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_line_numbers_hold_across_blocks_with_odd_lines_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pbe.data.annotations.BLOCK_BYTES", 400)
    lines = [f"i{n},/m/1,0.1,0.5,0.2,0.{n % 4 + 5}" if n % 7 else f"odd{n},too,few" for n in range(2, 402)]
    rows = _read(tmp_path, HEADER + "\n" + "\n".join(lines) + "\n")
    assert [row["line"] for row in rows] == list(range(2, 402))
    for row in rows:
        number = row["line"]
        assert row["image_id"] == (f"i{number}" if number % 7 else f"odd{number}")
        assert (row["reason"] is None) == bool(number % 7)


@pytest.mark.parametrize("line", ["b,too,few", 'b,"Cat, big",0.1,0.5,0.2,0.6'])
def test_odd_lines_do_not_wait_in_memory_for_the_end_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    """Decimal commas between commas, or captions with a comma, may be in every line of millions."""
    monkeypatch.setattr("pbe.data.annotations.BLOCK_BYTES", 400)
    (tmp_path / "train.csv").write_text("\n".join([HEADER, *[line] * 400]))
    tree = FileTree(str(tmp_path), "ingest.boxes")
    rows = [table.num_rows for table in read_annotations(tree, box_files(tree)[0])]
    assert sum(rows) == 400 and max(rows) <= 400 // len(line) + 2


def test_class_names_with_and_without_header_and_only_they_are_no_box_files(tmp_path: Path) -> None:
    (tmp_path / "class-descriptions-boxable.csv").write_text('/m/1,Cat\n/m/2,"Bat, flying"\n')
    (tmp_path / "oidv7-class-descriptions-boxable.csv").write_text("LabelName,DisplayName\n/m/3,Dog\n")
    (tmp_path / "validation-images-with-rotation.csv").write_text("ImageID,Subset\n")
    (tmp_path / "val.csv").write_text(f"{HEADER}\n{GOOD}\n")
    tree = FileTree(str(tmp_path), "ingest.boxes")
    assert [file.name for file in box_files(tree)] == ["val.csv"]
    names = class_names(tree)
    assert (names["/m/1"], names["/m/2"], names["/m/3"]) == ("Cat", "Bat, flying", "Dog")
    (table,) = read_annotations(tree, box_files(tree)[0])
    assert with_names(table, names).column("label_name").to_pylist() == ["Cat"]
    assert with_names(table, {}).column("label_name").to_pylist() == ["/m/1"]
    assert class_names(FileTree(str(tmp_path / "val.csv"), "ingest.boxes")) == names  # beside a single file too


def test_class_names_may_have_a_byte_order_mark_and_any_letters(tmp_path: Path) -> None:
    (tmp_path / "class-descriptions.csv").write_bytes("\ufeff/m/1,Bär\n".encode())
    assert class_names(FileTree(str(tmp_path), "ingest.boxes")) == {"/m/1": "Bär"}


def test_class_names_that_are_no_utf8_are_one_message_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "class-descriptions.csv").write_bytes(b"/m/1,B\xe4r\n")
    with pytest.raises(SourceError, match=r"class-descriptions\.csv: not a CSV in UTF-8") as caught:
        class_names(FileTree(str(tmp_path), "ingest.boxes"))
    assert "\n" not in str(caught.value)


def _coco(**changes: Any) -> dict[str, Any]:
    return {
        "images": [{"id": 9, "file_name": "train2017/000000000009.jpg", "width": 200, "height": 100}],
        "categories": [{"id": 51, "name": "bowl"}],
        "annotations": [{"id": 7, "image_id": 9, "category_id": 51, "bbox": [20, 10, 100, 50], "iscrowd": 0}],
    } | changes


def test_coco_boxes_become_fractions_ids_lose_folder_and_suffix_and_crowds_are_groups(tmp_path: Path) -> None:
    entry = _coco()["annotations"][0]
    crowd = entry | {"id": 8, "iscrowd": 1, "bbox": [-0.5, 0, 200.9, 100.4]}  # COCO's own end up to a pixel outside
    rows = _read(tmp_path, json.dumps(_coco(annotations=[entry, crowd])), "instances_val2017.json")
    assert [row["line"] for row in rows] == [7, 8]
    first, second = rows
    assert (first["image_id"], first["label"], first["label_name"]) == ("000000000009", "bowl", "bowl")
    assert [first[key] for key in ("xmin", "xmax", "ymin", "ymax")] == [0.1, 0.6, 0.1, 0.6]
    assert (first["is_group_of"], second["is_group_of"], first["split"]) == (0, 1, SPLITS.index("validation"))
    assert [second[key] for key in ("xmin", "xmax", "ymin", "ymax")] == [0, 1, 0, 1]
    assert first["reason"] is None and second["reason"] is None


def test_ids_that_hide_something_are_refused_and_scripts_that_need_joiners_are_not(tmp_path: Path) -> None:
    """C1 controls are escape sequences of terminals; direction marks show "gpj.exe" as another name."""
    hidden = "\x7f\x80\x9b\x9f\xad\u061c\u200b\u200e\u200f\u2028\u202e\u2060\u2066\ufeff\U000e0041"
    good = ["café", "\u0645\u06cc\u200c\u0631\u0648\u0645", "\U0001f468\u200d\U0001f4bb", "\u5199\u771f", "a b"]
    ids = [f"a{mark}b" for mark in hidden] + good
    found = invalid_ids(pa.array(ids)).to_pylist()
    assert found == [True] * len(hidden) + [False] * len(good)


@pytest.mark.parametrize("entry", [None, [], 3, {"id": 2**70, "image_id": 9}, {"id": 1e400, "image_id": 9}], ids=str)
def test_a_coco_annotation_that_is_no_annotation_costs_no_other(tmp_path: Path, entry: Any) -> None:
    good = _coco()["annotations"][0]
    rows = _read(tmp_path, json.dumps(_coco(annotations=[good, entry])), "instances.json")
    assert sorted(row["reason"] or "" for row in rows) == ["", "box_unparsable"]


def test_a_coco_photo_without_a_name_is_an_invalid_id(tmp_path: Path) -> None:
    photo = _coco()["images"][0] | {"file_name": ""}
    (row,) = _read(tmp_path, json.dumps(_coco(images=[photo])), "instances.json")
    assert row["reason"] == "box_image_id_invalid"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"images": []}', json.dumps(_coco(annotations=[])), json.dumps(_coco(annotations=None))]
)
def test_a_json_that_is_no_coco_file_is_one_message(tmp_path: Path, text: str) -> None:
    with pytest.raises(SourceError, match=r"instances\.json") as caught:
        _read(tmp_path, text, "instances.json")
    assert "\n" not in str(caught.value)


def test_no_box_file_at_all(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no box CSV or COCO JSON"):
        box_files(FileTree(str(tmp_path), "ingest.boxes"))
    with pytest.raises(SourceError, match=r"ingest\.boxes: .*nowhere does not exist"):
        box_files(FileTree(str(tmp_path / "nowhere"), "ingest.boxes"))


@pytest.mark.parametrize(
    ("bad", "image_ids"),
    [
        ('"b,/m/1,0.1,0.5,0.2,0.6', ["a", '"b', "c", "d"]),
        ('b,"/m/1,0.1,0.5,0.2,0.6', ["a", "b", "c", "d"]),
        ('b,/m/1",0.1,0.5,0.2,0.6', ["a", "b", "c", "d"]),
    ],
)
def test_a_stray_quote_costs_no_other_row(tmp_path: Path, bad: str, image_ids: list[str]) -> None:
    """A parser that honours quotes would read on to the next quote, or to the end of its block of megabytes."""
    lines = [HEADER, GOOD, bad, GOOD.replace("a,", "c,", 1), GOOD.replace("a,", "d,", 1)]
    rows = _read(tmp_path, "\n".join(lines) + "\n")
    assert [(row["line"], row["image_id"]) for row in rows] == list(zip((2, 3, 4, 5), image_ids, strict=True))
    assert [row["reason"] for row in rows if row["line"] != 3] == [None] * 3


def test_a_comma_inside_quotes_is_part_of_its_cell(tmp_path: Path) -> None:
    cells = ('"Cat, domestic"', '"Cat ""big"""', '"Cat, ""big"""', '6""')
    lines = [HEADER, GOOD, *(f"b,{cell},0.1,0.5,0.2,0.6" for cell in cells), "d,x,0,1,0.1"]
    *rows, wrong = _read(tmp_path, "\n".join(lines) + "\n")
    labels = ["/m/1", "Cat, domestic", 'Cat "big"', 'Cat, "big"', '6""']
    assert [(row["label"], row["xmax"], row["reason"]) for row in rows] == [(label, 0.5, None) for label in labels]
    assert wrong["reason"] == "box_unparsable"


def test_an_endless_cell_of_an_odd_row_costs_no_other_row(tmp_path: Path) -> None:
    rows = _read(tmp_path, "\n".join([HEADER, GOOD, "b," + "x" * 200_000, GOOD]) + "\n")
    assert [(row["line"], row["reason"]) for row in rows] == [(2, None), (3, "box_unparsable"), (4, None)]


@pytest.mark.parametrize("what", ["images", "categories"])
def test_a_coco_id_of_two_things_is_one_message_that_names_it(tmp_path: Path, what: str) -> None:
    """The last entry would win, and boxes could belong to the other."""
    (first,) = _coco()[what]
    name = {"images": "file_name", "categories": "name"}[what]
    same = _read(tmp_path / "same", json.dumps(_coco(**{what: [first, first]})), "instances.json")
    assert [row["reason"] for row in same] == [None]
    text = json.dumps(_coco(**{what: [first, first | {name: "other.jpg"}]}))
    with pytest.raises(SourceError, match=rf"{what}: id {first['id']} is both '{first[name]}' and 'other.jpg'"):
        _read(tmp_path, text, "instances.json")


@pytest.mark.parametrize("own", ["abc-1", None, 2**70, 1.5])
def test_a_coco_annotations_own_id_may_be_anything(tmp_path: Path, own: Any) -> None:
    (entry,) = _coco()["annotations"]
    (row,) = _read(tmp_path, json.dumps(_coco(annotations=[entry | {"id": own}])), "instances.json")
    assert (row["reason"], row["line"]) == (None, 0)


def test_nested_brackets_without_end_are_one_message(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="not a JSON file"):
        _read(tmp_path, "[" * 100_000, "instances.json")


# -- CSVs of other tools ----------------------------------------------------------------------------------------------


def _boxes(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [tuple(row[key] for key in ("line", "image_id", "label", "xmin", "xmax", "ymin", "ymax")) for row in rows]


TWO = [(2, "a", "Café", 0.1, 0.5, 0.2, 0.6), (3, "b", "Cup", 0.25, 1.0, 0.0, 0.75)]
PLAIN = f"{HEADER}\na,Café,0.1,0.5,0.2,0.6\nb,Cup,0.25,1,0,0.75\n"
OTHER_FORMS = {
    "semicolons": PLAIN.replace(",", ";"),
    "decimal commas": PLAIN.replace(",", ";").replace(".", ","),
    "decimal commas in quotes": f'{HEADER}\na,Café,"0,1","0,5","0,2","0,6"\nb,Cup,"0,25",1,0,"0,75"\n',
    "tabs": PLAIN.replace(",", "\t"),
    "bars": PLAIN.replace(",", " | "),
    "names in lower case": PLAIN.replace(HEADER, HEADER.lower()),
    "names in snake case": PLAIN.replace(HEADER, "Image ID,label_name,x_min,x-max,YMIN, ymax "),
    "quoted names": PLAIN.replace(HEADER, ",".join(f'"{name}"' for name in HEADER.split(","))),
    "unnamed columns": PLAIN.replace("\n", ",,\n"),
    "columns twice that are not read": "\n".join(
        line + end for line, end in zip(PLAIN.splitlines(), [",Note,Note", ",x,", ",,y"], strict=True)
    ),
    "more cells than names": PLAIN.replace("0.6\n", "0.6,\n").replace("0.75\n", "0.75,, \n"),
    "an index column": "\n".join(f"{mark},{line}" for mark, line in zip(["", 0, 1], PLAIN.splitlines(), strict=True)),
    "Windows ends": PLAIN.replace("\n", "\r\n"),
    "carriage returns": PLAIN.replace("\n", "\r"),
    "no last end": PLAIN.rstrip("\n"),
    "empty rows of a spreadsheet": PLAIN + ",,,,,\n",
}  # fmt: skip


@pytest.mark.parametrize("form", OTHER_FORMS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_forms_of_a_csv_give_the_same_boxes(tmp_path: Path, form: str, encoding: str) -> None:
    assert _boxes(_read(tmp_path, OTHER_FORMS[form].encode(encoding))) == TWO


@pytest.mark.parametrize("block_bytes", [7, 64, 300])
def test_the_form_holds_over_all_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    monkeypatch.setattr("pbe.data.annotations.BLOCK_BYTES", block_bytes)
    lines = [f"i{n};Bär;0,{n + 100};0,9;0,25;0,75" for n in range(50)]
    text = "\ufeffsep=;\r\n" + "\r\n".join([HEADER.replace(",", ";"), *lines])
    rows = _read(tmp_path, text.encode("utf-16-le"))
    assert [row["line"] for row in rows] == list(range(3, 53))  # Excel's own line is the first
    assert [row["xmin"] for row in rows] == [float(f"0.{n + 100}") for n in range(50)]
    assert {(row["label"], row["reason"]) for row in rows} == {("Bär", None)}


def test_how_a_file_was_read_is_told(tmp_path: Path) -> None:
    findings = Findings()
    (tmp_path / "boxes.csv").write_bytes(OTHER_FORMS["semicolons"].encode("utf-16"))
    tree = FileTree(str(tmp_path), "ingest.boxes")
    list(read_annotations(tree, box_files(tree)[0], findings=findings))
    assert findings.remarks == ["boxes.csv: read with UTF-16, semicolons between cells"]


def test_one_bad_byte_costs_its_own_row_and_none_in_a_column_that_is_not_read(tmp_path: Path) -> None:
    lines = [
        HEADER + ",Note",
        GOOD + ",ok",
        "b\xe9,/m/1,0.1,0.5,0.2,0.6,x",
        "c,/m/1,0.1,0.5,0.2,0.6,\xe9",
        "d,\xe9",
        GOOD,
    ]
    rows = _read(tmp_path, "\n".join(lines).encode("latin-1"))
    assert [(row["line"], row["reason"]) for row in rows] == [
        (2, None), (3, "box_unparsable"), (4, None), (5, "box_unparsable"), (6, "box_unparsable"),
    ]  # fmt: skip
    assert "byte 0xe9 is not UTF-8; save the file as UTF-8" in rows[1]["detail"]
    assert "6 cells where the header has 7" in rows[4]["detail"]


def test_a_zero_byte_costs_its_own_row_and_makes_no_utf16_of_the_file(tmp_path: Path) -> None:
    rows = _read(tmp_path, f"{HEADER}\nb\0,/m/1,0.1,0.5,0.2,0.6\n{GOOD}\n")
    assert [(row["line"], row["reason"]) for row in rows] == [(2, "box_image_id_invalid"), (3, None)]
    (tmp_path / "class-descriptions.csv").write_bytes(b"/m/1,Cat\n/m/2,D\0og\n")
    assert class_names(FileTree(str(tmp_path), "ingest.boxes"))["/m/1"] == "Cat"


def test_half_a_character_of_utf16_costs_its_own_row(tmp_path: Path) -> None:
    bad = "b,X,0.1,0.5,0.2,0.6".encode("utf-16-le").replace(b"X\0", b"\0\xd8")
    data = f"{HEADER}\n{GOOD}\n".encode("utf-16") + bad + f"\n{GOOD}\n".encode("utf-16-le")
    assert [(row["line"], row["reason"]) for row in _read(tmp_path, data)] == [
        (2, None), (3, "box_unparsable"), (4, None),
    ]  # fmt: skip


@pytest.mark.parametrize("length", [9 << 20, 17 << 20, 40 << 20])
def test_a_row_without_end_costs_no_other_row(tmp_path: Path, length: int) -> None:
    rows = _read(tmp_path, f"{HEADER}\n{GOOD}\nb,".encode() + b"x" * length + f"\n{GOOD}\n".encode())
    assert [(row["line"], row["reason"]) for row in rows] == [(2, None), (3, "box_unparsable"), (4, None)]
    assert ("a row of more than 16 MB" in rows[1]["detail"]) == (length > 16 << 20)
    assert len(rows[1]["detail"]) < 300


@pytest.mark.parametrize(
    ("cells", "ends"),
    [
        ("0.25,1.0000001,-1e-09,0.75", (0.25, 1, 0, 0.75)),
        ("-0.00001,1.00001,0,1", (0, 1, 0, 1)),
        ("0.25,1.000011,0,0.75", None),
        ("-0.00002,0.5,0,0.75", None),
        ("1.000001,1.000002,0,0.75", None),  # nothing is left of it
    ],
)
def test_a_box_that_ends_outside_by_rounding_is_clipped_and_counted(
    tmp_path: Path, cells: str, ends: tuple[float, ...] | None
) -> None:
    (tmp_path / "boxes.csv").write_text(f"{HEADER}\na,/m/1,{cells}\n{GOOD}\n")
    tree, findings = FileTree(str(tmp_path), "ingest.boxes"), Findings()
    (table,) = read_annotations(tree, box_files(tree)[0], findings=findings)
    row, good = table.to_pylist()
    assert row["reason"] == (None if ends else "box_outside_image") and good["xmin"] == 0.1
    assert findings.counts["boxes_clipped"] == bool(ends)
    if ends:
        assert tuple(row[key] for key in ("xmin", "xmax", "ymin", "ymax")) == ends


@pytest.mark.parametrize(("flag", "value"), [("1.0", 1), ("0.0", 0), ("-1.0", -1), ("TRUE", 1), ("False", 0), ("", -1)])
def test_flags_of_spreadsheets_are_flags(tmp_path: Path, flag: str, value: int) -> None:
    rows = _read(tmp_path, f"{HEADER},IsOccluded\n{GOOD},{flag}\n{GOOD},1\n")
    assert [(row["is_occluded"], row["reason"]) for row in rows] == [(value, None), (1, None)]


def test_files_without_boxes_beside_box_files_are_passed_over_and_fiftyones_class_names_are_read(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "labels"
    for name, text in (
        ("labels/detections.csv", f"{HEADER}\n{GOOD}\n"),
        ("labels/classifications.csv", "ImageID,Source,LabelName,Confidence\na,verification,/m/1,1\n"),
        ("labels/segmentations.csv", "MaskPath,ImageID,LabelName,BoxID,BoxXMin,BoxXMax,BoxYMin,BoxYMax\n"),
        ("metadata/classes.csv", "/m/1,Cup\n"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    tree, findings = FileTree(str(folder), "ingest.boxes"), Findings()
    assert [file.name for file in box_files(tree, findings)] == ["detections.csv"]
    assert [remark.partition(":")[0] for remark in findings.remarks] == ["classifications.csv", "segmentations.csv"]
    assert class_names(tree) == {"/m/1": "Cup"}
    (folder / "detections.csv").unlink()
    with pytest.raises(SourceError, match=r"classifications\.csv: not an OpenImages box CSV"):
        list(read_annotations(tree, box_files(tree)[0]))


@pytest.mark.parametrize(
    "text", ["/m/1;Cat, big\n/m/2;Dog\n", "/m/1\tCat, big\n/m/2\tDog\n", '/m/1,"Cat, big"\n/m/2,Dog\n']
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_class_names_between_other_delimiters_are_not_lost(tmp_path: Path, text: str, encoding: str) -> None:
    (tmp_path / "class-descriptions.csv").write_bytes(text.encode(encoding))
    assert class_names(FileTree(str(tmp_path), "ingest.boxes")) == {"/m/1": "Cat, big", "/m/2": "Dog"}


# -- COCO of other tools ----------------------------------------------------------------------------------------------


def _coco_row(folder: Path, findings: Findings | None = None, **changes: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    text = json.dumps(_coco(**changes))
    (folder / "instances.json").write_text(text)
    tree = FileTree(str(folder), "ingest.boxes")
    (table,) = read_annotations(tree, box_files(tree)[0], findings=findings)
    (row,) = table.to_pylist()
    return row


def _ends(row: dict[str, Any]) -> list[float]:
    return [row[key] for key in ("xmin", "xmax", "ymin", "ymax")]


@pytest.mark.parametrize(("listed", "named"), [(9, "9"), ("9", 9), (9, 9.0), ("009", 9), (" 9", "9"), ("x1", "x1 ")])
def test_coco_ids_may_be_numbers_or_text(tmp_path: Path, listed: Any, named: Any) -> None:
    coco = _coco()
    (image,), (category,), (entry,) = coco["images"], coco["categories"], coco["annotations"]
    row = _coco_row(
        tmp_path,
        images=[image | {"id": listed}],
        categories=[category | {"id": listed}],
        annotations=[entry | {"image_id": named, "category_id": named}],
    )
    assert (row["image_id"], row["label"], row["reason"]) == ("000000000009", "bowl", None)


def test_coco_ids_that_read_alike_are_those_of_their_own_type(tmp_path: Path) -> None:
    (entry,) = _coco()["annotations"]
    categories = [{"id": 1, "name": "cup"}, {"id": "1", "name": "cat"}]
    for own, label in ((1, "cup"), ("1", "cat")):
        row = _coco_row(tmp_path, categories=categories, annotations=[entry | {"category_id": own}])
        assert row["label"] == label
    row = _coco_row(tmp_path, categories=categories, annotations=[entry | {"category_id": "01"}])
    assert row["reason"] == "box_unparsable" and "category_id '01'" in row["detail"]


@pytest.mark.parametrize("sides", [{}, {"width": 0, "height": 0}, {"width": None, "height": 100}, {"width": "wide"}])
def test_a_coco_photo_without_a_size_has_boxes_in_pixels(tmp_path: Path, sides: dict[str, Any]) -> None:
    findings = Findings()
    row = _coco_row(tmp_path, findings, images=[{"id": 9, "file_name": "a.jpg", **sides}])
    assert (row["reason"], _ends(row)) == (None, [20, 120, 10, 60])
    assert findings.sizes == {("a", "instances.json"): None}
    findings = Findings()
    _coco_row(tmp_path, findings, images=[{"id": 9, "file_name": "a.jpg", "width": "200", "height": 100.0}])
    assert findings.sizes == {("a", "instances.json"): (200, 100)}


def test_a_coco_id_with_two_sizes_is_ambiguous(tmp_path: Path) -> None:
    """The first size would count, and scale boxes that were drawn on the other."""
    (image,) = _coco()["images"]
    problem = "instances.json states two sizes of it: 200 x 100 px and 400 x 200 px"
    for again, problems in (({"width": "200", "height": 100.0}, []), ({"width": 400, "height": 200}, [problem])):
        findings = Findings()
        _coco_row(tmp_path, findings, images=[image, image | again])
        assert list(findings.problems.values()) == problems


# in 100 rows and 200 columns: rows 10 to 12 of columns 20 and 21; and compressed, by the rule of cocoapi's maskApi.c
RUNS, COMPRESSED_RUNS = [2010, 3, 97, 3, 17887], "jn13Q30n[a0"


@pytest.mark.parametrize(
    ("shape", "ends"),
    [
        ({"segmentation": [[20, 10, 120, 10, 120, 60, 20, 60]]}, [0.1, 0.6, 0.1, 0.6]),
        ({"segmentation": [[20, 10, 60, 10, 60, 60], [70, 20, 120, 20, 120, 50]]}, [0.1, 0.6, 0.1, 0.6]),
        ({"segmentation": [20, 10, 120, 10, 120, 60]}, [0.1, 0.6, 0.1, 0.6]),
        ({"segmentation": [[20, 10], [120, 10], [120, 60]]}, [0.1, 0.6, 0.1, 0.6]),
        ({"segmentation": {"size": [100, 200], "counts": RUNS}}, [0.1, 0.11, 0.1, 0.13]),
        ({"segmentation": {"size": [100, 200], "counts": COMPRESSED_RUNS}}, [0.1, 0.11, 0.1, 0.13]),
        ({"segmentation": {"size": [100, 200], "counts": [2010, 200, 17790]}}, [0.1, 0.115, 0, 1]),
        ({"bbox": [], "segmentation": [[20, 10, 120, 10, 120, 60]]}, [0.1, 0.6, 0.1, 0.6]),
        ({"bbox": [None] * 4, "segmentation": [[20, 10, 120, 10, 120, 60]]}, [0.1, 0.6, 0.1, 0.6]),
        ({"bbox": ["20", "10.0", 100, "50"]}, [0.1, 0.6, 0.1, 0.6]),
    ],
    ids=str,
)
def test_coco_boxes_without_a_bbox_are_the_bounds_of_their_shape(
    tmp_path: Path, shape: dict[str, Any], ends: list[float]
) -> None:
    row = _coco_row(tmp_path, annotations=[{"image_id": 9, "category_id": 51, **shape}])
    assert row["reason"] is None and _ends(row) == pytest.approx(ends)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({}, "it has neither bbox nor segmentation"),
        ({"bbox": [1, 2, 3]}, "bbox [1, 2, 3] is not [x, y, width, height]"),
        ({"bbox": {"x": 1}}, "bbox {'x': 1} is not"),
        ({"bbox": [1, 2, float("nan"), 3]}, "nan is not a number"),
        ({"bbox": [1, 2, None, 3]}, "None is not a number"),
        ({"bbox": [1, 2, True, 3]}, "True is not a number"),
        ({"bbox": [1, 2, 10**400, 3]}, "is not a number"),
        ({"bbox": [1, 2, 3, 4], "category_id": None}, "category_id None is no id"),
        ({"bbox": [1, 2, 3, 4], "category_id": [1]}, "category_id [1] is no id"),
        ({"segmentation": [[1, 2, 3, 4]]}, "fewer than 3 points"),
        ({"segmentation": [[1, 2, 3, 4, "x", 6]]}, "'x' is not a number"),
        ({"segmentation": [[1, 2, 3]]}, "is no polygon"),
        ({"segmentation": {"counts": "??", "size": [4, 4]}}, "no run-length encoded mask"),
        ({"segmentation": {"counts": [16], "size": [4, 4]}}, "its segmentation is empty"),
        ({"segmentation": {"counts": [1, 2], "size": [4, 4]}}, "no run-length encoded mask"),
        ({"segmentation": {}}, "no run-length encoded mask"),
        ({"bbox": [1, 2, 3, 4], "caption": ["a car"]}, "caption ['a car'] is no text"),
        ({"bbox": [1, 2, 3, 4], "caption": "x" * 401}, "the caption has 401 characters"),
    ],
)
def test_an_unusable_coco_annotation_says_why_in_words(tmp_path: Path, entry: dict[str, Any], said: str) -> None:
    row = _coco_row(tmp_path, annotations=[{"id": 7, "image_id": 9, "category_id": 51, **entry}])
    assert row["reason"] == "box_unparsable" and said in row["detail"] and "Error" not in row["detail"]
    assert row["detail"].startswith("annotation 7: ")


@pytest.mark.parametrize(("said", "read"), [("a bowl\n", "a bowl"), (" ", None), (None, None)])
def test_a_coco_annotation_may_have_a_caption(tmp_path: Path, said: Any, read: str | None) -> None:
    row = _coco_row(tmp_path, annotations=[_coco()["annotations"][0] | {"caption": said}])
    assert (row.get("caption"), row["reason"]) == (read, None)


def test_a_coco_segmentation_opens_no_file(tmp_path: Path) -> None:
    entry = _coco()["annotations"][0] | {"segmentation": {"file": "/etc/logo.png"}}
    (tmp_path / "instances.json").write_text(json.dumps(_coco(annotations=[entry])))
    tree = FileTree(str(tmp_path), "ingest.boxes")
    (table,) = read_annotations(tree, box_files(tree)[0], with_masks=True)
    assert table.column("mask").to_pylist() == ["{}"]  # which says that it is no mask


NAMELESS = {"id": 8, "file_name": None}
NAN = {"id": 8, "file_name": math.nan, "name": math.nan}


@pytest.mark.parametrize(
    "odd",
    [
        None,
        3,
        [],
        {},
        {"id": None},
        {"id": [1]},
        {"id": True},
        {"id": "\ud800"},
        {"id": 10**400},
        NAMELESS,
        NAMELESS | {"name": math.nan},
    ],
)
def test_odd_coco_entries_of_images_and_categories_cost_only_their_own_boxes(tmp_path: Path, odd: Any) -> None:
    (entry,), coco = _coco()["annotations"], _coco()
    text = json.dumps(
        coco
        | {"images": [odd, *coco["images"]], "categories": [odd, *coco["categories"]]}
        | {"annotations": [entry, entry | {"id": 8, "image_id": 8}]}
    )
    good, other = _read(tmp_path, text, "instances.json")
    assert (good["reason"], good["label"]) == (None, "bowl")
    assert other["reason"] == (
        "box_image_id_invalid" if isinstance(odd, dict) and odd.get("id") == 8 else "image_missing"
    )


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_coco_text_that_is_no_unicode_costs_only_its_own_boxes(tmp_path: Path, mark: bytes) -> None:
    coco = _coco()
    (image,), (entry,) = coco["images"], coco["annotations"]
    coco["images"] = [image, {"id": 10, "file_name": "XX.jpg", "width": 200, "height": 100}]
    coco["categories"] += [{"id": 52, "name": "\ud800"}]
    coco["annotations"] = [entry, entry | {"id": 8, "category_id": 52}, entry | {"id": 9, "image_id": 10}]
    rows = _read(tmp_path, mark + json.dumps(coco).encode().replace(b"XX", b"\xe9"), "instances.json")
    assert [row["reason"] for row in rows] == [None, "box_unparsable", "box_image_id_invalid"]
    (row,) = _read(tmp_path, json.dumps(_coco()).replace("bowl", "bo\nwl"), "instances.json")
    assert (row["label"], row["reason"]) == ("bo\nwl", None)


def test_a_last_row_of_bad_bytes_alone_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pbe.data.annotations.BLOCK_BYTES", len(HEADER) + 1)
    for end in ("", "\n", "\r\n"):
        (row,) = _read(tmp_path, f"{HEADER}\n".encode() + b"\xff" + end.encode())
        assert (row["line"], row["reason"]) == (2, "box_unparsable") and row["detail"].endswith(": \ufffd")


def test_coco_boxes_in_fractions_are_one_message(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"every box ends within the first pixel; bbox is .* in pixels"):
        _coco_row(tmp_path, annotations=[{"image_id": 9, "category_id": 51, "bbox": [0.1, 0.1, 0.5, 0.5]}])


@pytest.mark.parametrize(("crowd", "group"), [(1, 1), ("1", 1), (True, 1), (0, 0), ("0", 0), (None, 0)])
def test_a_crowd_may_be_text(tmp_path: Path, crowd: Any, group: int) -> None:
    (entry,) = _coco()["annotations"]
    assert _coco_row(tmp_path, annotations=[entry | {"iscrowd": crowd}])["is_group_of"] == group
