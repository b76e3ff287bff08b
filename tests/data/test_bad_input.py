"""One row in a hundred is bad, in every way we know: all others are kept, and each bad one has exactly its reason."""

import hashlib
import io
import json
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pbe.data import images
from pbe.data.annotations import box_files, class_names, read_annotations, with_names
from pbe.data.files import FileTree
from pbe.data.index import by_shard
from pbe.data.ingest import PhotoLimits, read_shard
from pbe.data.schema import ANNOTATIONS, PHOTOS
from pbe.data.sources import FolderSource
from pbe.store import Store

SHARDS = 4
MAX_BYTES, LIMITS = 30_000, PhotoLimits(exif="ignore", max_pixels=100_000_000)
GOOD_PER_CASE = 100
CELLS = {"LabelName": "/m/1", "XMin": "0.1", "XMax": "0.5", "YMin": "0.2", "YMax": "0.75"}

# changes of CELLS, and the reason for which the line is rejected; None: it is kept
Line = tuple[dict[str, str], str | None]


@dataclass(frozen=True)
class Case:
    """photos: name and bytes. boxes, later: lines of the train and of the validation file, as changes of CELLS.

    Each with the reason for which it is rejected; None: it is kept.
    """

    name: str
    photos: list[tuple[str, bytes, str | None]] = field(default_factory=list)
    boxes: list[Line] = field(default_factory=list)
    later: list[Line] = field(default_factory=list)


def _picture(number: int) -> np.ndarray:
    out = np.full((12, 16, 3), 128, np.uint8)
    out[:4, :4] = (number % 256, number // 256 % 256, 50)
    return out


def _saved(kind: str, **more: Any) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
    Image.fromarray(noise).save(buffer, kind, **more)
    return buffer.getvalue()


def _bomb(side_px: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side_px, side_px, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def _claiming(side_px: int) -> bytes:
    """A JPEG whose frame header says side_px x side_px."""
    at = JPEG.index(b"\xff\xc0") + 5
    return JPEG[:at] + struct.pack(">HH", side_px, side_px) + JPEG[at + 4 :]


def _photo(name: str, data: bytes, reason: str | None) -> Case:
    """A photo with one box, which is kept or rejected with it."""
    image_id = name.rpartition("/")[2].rpartition(".")[0]
    box = {"ImageID": image_id}
    return Case(name, photos=[(name, data, reason)], boxes=[(box, reason and "box_image_rejected")])


def _box(name: str, reason: str | None, **cells: str) -> Case:
    """A line about a good photo that also has a good line."""
    image_id = name.replace(" ", "_")
    lines = [({"ImageID": image_id}, None), ({"ImageID": image_id} | cells, reason)]
    return Case(name, photos=[(f"{image_id}.jpg", JPEG, None)], boxes=lines)


JPEG, PNG = _saved("JPEG", quality=90), _saved("PNG")
HTML = b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head></html>"
# bytes, cells and ids are tested alone in test_images.py and test_annotations.py, one shard in test_ingest.py
CASES = [
    _photo("half.jpg", JPEG[: len(JPEG) // 2], "image_unreadable"),
    _photo("almost_png.png", PNG[: int(0.98 * len(PNG))], "image_unreadable"),
    _photo("empty.jpg", b"", "image_unreadable"),
    _photo("page.jpg", HTML, "image_unreadable"),
    _photo("heavy.jpg", JPEG + bytes(MAX_BYTES), "image_too_large"),
    _photo("bomb_12000.png", _bomb(12_000), "image_too_large"),
    _photo("bomb_jpeg_60000.jpg", _claiming(60_000), "image_too_large"),
    _photo("trailing.jpg", JPEG + b"garbage" * 20, None),
    _photo("really_a_png.jpg", PNG, None),
    _photo("SHOUTING.JPEG", JPEG, None),
    _photo("deep/er/in.webp", _saved("WEBP"), None),
    _photo("v1.2 (copy).gif", _saved("GIF"), None),
    _photo("ünï.bmp", _saved("BMP"), None),
    Case("missing image", boxes=[({"ImageID": "nowhere"}, "image_missing")] * 2),
    Case("missing image, wrong box", boxes=[({"ImageID": "nowhere", "XMin": "x"}, "box_unparsable")]),
    Case("no box", photos=[("lonely.jpg", JPEG, "image_without_box")]),
    Case(
        "in two splits",
        photos=[("both.jpg", JPEG, None)],
        boxes=[({"ImageID": "both"}, None)] * 2,
        later=[({"ImageID": "both"}, "box_in_other_split")],
    ),
    Case(
        "in two splits, the first line is wrong",
        photos=[("later.jpg", JPEG, None)],
        boxes=[({"ImageID": "later", "XMax": "7"}, "box_outside_image")],
        later=[({"ImageID": "later"}, None)],
    ),
    Case(
        "different bytes",
        photos=[("1/mix.jpg", JPEG, "image_id_duplicated"), ("2/mix.png", PNG, "image_id_duplicated")],
        boxes=[({"ImageID": "mix"}, "box_image_rejected")],
    ),
    Case(
        "one cannot be read",
        photos=[("1/broken.jpg", JPEG[:500], "image_unreadable"), ("2/broken.jpg", JPEG, None)],
        boxes=[({"ImageID": "broken"}, None)],
    ),
    Case(
        "nobody asks",
        photos=[("1/unasked.jpg", JPEG, "image_without_box"), ("2/unasked.jpg", PNG, "image_without_box")],
    ),
    _box("with a suffix", None, ImageID="with_a_suffix.jpg"),
    _box("with quotes", None, ImageID='"with_quotes"'),
    _box("spaces only", "box_image_id_invalid", ImageID="   "),
    _box("suffix only", "box_image_id_invalid", ImageID=".jpg"),
    _box("relative path", "box_image_id_invalid", ImageID="../../../etc/passwd"),
    _box("too long", "box_image_id_invalid", ImageID="x" * 201),
    _box("control character", "box_image_id_invalid", ImageID="a\tb"),
    _box("other case", "image_missing", ImageID="OTHER_CASE"),
    _box("swapped", "box_outside_image", XMin="0.5", XMax="0.1"),
    _box("above 1", "box_outside_image", YMax="1.0001"),
    _box("overflow", "box_outside_image", XMax="1e400"),
    _box("decimal commas", "box_unparsable", XMin="0,1", XMax="0,5", YMin="0,2", YMax="0,75"),
    _box("quoted decimal comma", None, XMin='"0,1"'),
    _box("null", "box_unparsable", XMin="null"),
    _box("whole photo", None, XMin="0", XMax="1", YMin="0.0", YMax="1.000"),
    _box("exponents and spaces", None, XMin=" 1e-1", XMax="5E-1 ", YMin="+.2"),
]


@dataclass
class Input:
    """A folder and the expected result of each photo and box; boxes are identified by their line."""

    root: Path
    photos: dict[str, str | None] = field(default_factory=dict)
    boxes: dict[str, str | None] = field(default_factory=dict)


def _header(layout: str) -> list[str]:
    plain = ["ImageID", *CELLS]
    return {"plain": plain, "odd": ["Note", *reversed(plain), "Source"]}[layout]


def _write_csv(made: Input, name: str, lines: list[Line], layout: str) -> None:
    """layout: "odd" has a byte order mark, unknown columns, another order and Windows line ends."""
    header = _header(layout)
    rows = [",".join({**CELLS, **cells}.get(column, "x") for column in header) for cells, _ in lines]
    text = [",".join(header), *rows, ""]
    data = "\n".join(text).encode() if layout == "plain" else b"\xef\xbb\xbf" + "\r\n".join(text).encode()
    (made.root / "boxes" / name).write_bytes(data)
    made.boxes |= {f"{name}:{number}": reason for number, (_, reason) in enumerate(lines, start=2)}


def _make(root: Path, cases: list[Case], layout: str, *, backwards: bool = False) -> Input:
    """The cases among GOOD_PER_CASE times as many good photos; `backwards` writes the photos in another order."""
    made = Input(root)
    (root / "boxes").mkdir(parents=True)
    good = [f"good{number:05d}" for number in range(GOOD_PER_CASE * len(cases))]
    files = {f"some/{image_id}.jpg": images.encode_jpeg(_picture(n), 90) for n, image_id in enumerate(good)}
    files |= {name: data for case in cases for name, data, _ in case.photos}
    for name, data in sorted(files.items(), reverse=backwards):
        (root / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "photos" / name).write_bytes(data)
    made.photos |= dict.fromkeys(files) | {name: reason for case in cases for name, _, reason in case.photos}

    rng = np.random.default_rng(len(cases))
    blocks: list[list[Line]] = [[({"ImageID": image_id, "XMin": f"{rng.random() / 3:.6f}"}, None)] for image_id in good]
    blocks += [case.boxes for case in cases]
    train = [line for index in rng.permutation(len(blocks)) for line in blocks[index]]
    _write_csv(made, "train.csv", train, layout)
    later = [line for case in cases for line in case.later]
    _write_csv(made, "val.csv", [*later, ({"ImageID": "good00000"}, "box_in_other_split")], layout)
    (root / "boxes" / "class-descriptions.csv").write_text("/m/1,Cat\n")
    return made


def _ingest(root: Path, store: Store) -> tuple[list[dict[str, pa.Table]], Counter[str], dict[str, str]]:
    """Tables of each shard, summed counts, and the sha256 of every file that the store then holds."""
    source = FolderSource(FileTree(str(root / "photos"), "ingest.images"))
    tree = FileTree(str(root / "boxes"), "ingest.boxes")
    names = class_names(tree)

    def annotations() -> Iterator[pa.Table]:
        for file in box_files(tree):
            for table in read_annotations(tree, file):
                yield with_names(table, names)

    shards, total = [], Counter[str]()
    hashes: dict[str, str] = {}
    with (
        by_shard(annotations(), ANNOTATIONS, SHARDS) as boxes,
        by_shard(source.photos(), PHOTOS, SHARDS) as photos,
    ):
        for number, (mine, known) in enumerate(zip(boxes, photos, strict=True)):
            index = store.write_unit_by_content("index", f"b{number:04d}", {"annotations": mine, "photos": known})
            tables, counts = read_shard(
                mine,
                known,
                read=lambda image_id, address: source.read(address, MAX_BYTES),
                address_without_photo=source.address_without_photo,
                lists_all=source.lists_all,
                limits=LIMITS,
                threads=8,
            )
            record = store.write_unit("ingest", f"b{number:04d}", tables, counts=counts)
            hashes |= {file.path: file.sha256 for file in (*index.files, *record.files)}
            shards.append(tables)
            total.update(counts)
    return shards, total, hashes


def _rows(shards: list[dict[str, pa.Table]], dataset: str) -> list[dict[str, Any]]:
    return [row for tables in shards for row in tables[dataset].to_pylist()]


@pytest.mark.parametrize("layout", ["plain", "odd"])
def test_every_good_row_is_kept_and_every_bad_one_has_its_reason(layout: str, tmp_path: Path) -> None:
    """The same photos and boxes in another folder, written in another order, give the same bytes."""
    made = _make(tmp_path / "one", CASES, layout)
    _check(made, _make(tmp_path / "two", CASES, layout, backwards=True), tmp_path)


def _check(made: Input, again: Input, tmp_path: Path) -> None:
    """again: the same input in another folder."""
    shards, counts, hashes = _ingest(made.root, Store(str(tmp_path / "store")))
    wanted = {key: reason for key, reason in {**made.photos, **made.boxes}.items() if reason}
    rejects = _rows(shards, "rejects")
    assert {row["key"]: row["reason"] for row in rejects} == wanted
    assert len(rejects) == len(wanted), "each bad row once"
    assert all(row["detail"] and "\n" not in row["detail"] for row in rejects)
    assert 0 < len(wanted) < 0.025 * (len(made.photos) + len(made.boxes))

    for kind, rows in (("images", made.photos), ("boxes", made.boxes)):
        kept = sum(reason is None for reason in rows.values())
        assert (counts[f"{kind}_in"], counts[f"{kind}_kept"]) == (len(rows), kept)
        assert counts[f"{kind}_rejected"] == len(rows) - kept
        assert len(_rows(shards, kind)) == kept
    good = [made.root / "photos" / name for name, reason in made.photos.items() if reason is None]
    hashed = {hashlib.sha256(path.read_bytes()).hexdigest() for path in good}
    assert {row["sha256"] for row in _rows(shards, "images")} == hashed
    boxes = _rows(shards, "boxes")
    assert {box["image_id"] for box in boxes} == {row["image_id"] for row in _rows(shards, "images")}
    assert all(0 <= box["xmin"] < box["xmax"] <= 1 and 0 <= box["ymin"] < box["ymax"] <= 1 for box in boxes)

    assert _ingest(again.root, Store(str(tmp_path / "other store")))[2] == hashes


COCO_CASES: list[tuple[dict[str, Any], str | None]] = [
    ({"iscrowd": 1, "segmentation": {"counts": [1], "size": [12, 16]}}, None),
    ({"bbox": [-0.5, 0, 16.9, 12.5]}, None),  # up to a pixel outside, as COCO's own
    ({"bbox": [0, 0, 16, 12]}, None),
    ({"category_id": 99}, None),  # a class without a name keeps its number
    ({"bbox": [4, 3, 0, 3]}, "box_outside_image"),
    ({"bbox": [4, 3, 8, -3]}, "box_outside_image"),
    ({"bbox": [12, 3, 9, 3]}, "box_outside_image"),
    ({"bbox": [-4, 3, 8, 3]}, "box_outside_image"),
    ({"bbox": [4, 3, 8]}, "box_unparsable"),
    ({"bbox": ["left", 3, 8, 3]}, "box_unparsable"),
    ({"bbox": None}, "box_unparsable"),
    ({"bbox": ...}, "box_unparsable"),
    ({"category_id": ...}, "box_unparsable"),
    ({"image_id": ...}, "box_unparsable"),
    ({"image_id": 10**9}, "image_missing"),  # not in the file's list
    ({"image_id": -1}, "image_missing"),  # in the list, not in the folder
    ({"image_id": -2}, "box_image_rejected"),  # in both, but truncated
]


def _make_coco(root: Path) -> Input:
    """As instances JSON: every case on a photo that also has a good box."""
    made = Input(root)
    for folder in ("photos/train2017", "boxes"):
        (root / folder).mkdir(parents=True)
    count = GOOD_PER_CASE * len(COCO_CASES)
    listed: list[dict[str, Any]] = []
    entries: list[tuple[dict[str, Any], str | None]] = []
    for number in range(count):
        name = f"train2017/{number:012d}.jpg"
        (root / "photos" / name).write_bytes(images.encode_jpeg(_picture(number), 90))
        made.photos[name] = None
        listed.append({"id": number, "file_name": name, "width": 16, "height": 12})
        entries.append(({"id": number, "image_id": number}, None))
    (root / "photos" / "half.jpg").write_bytes(JPEG[: len(JPEG) // 2])
    made.photos["half.jpg"] = "image_unreadable"
    for number, name in ((-1, "gone.jpg"), (-2, "half.jpg")):
        listed.append({"id": number, "file_name": name, "width": 60, "height": 40})
    for number, (changes, reason) in enumerate(COCO_CASES):
        entries.insert(7 * number, ({"id": count + number, "image_id": 3 * number} | changes, reason))
    annotations = []
    for entry, reason in entries:
        full = {"category_id": 51, "bbox": [4, 3, 8, 3], "iscrowd": 0} | entry
        annotations.append({key: value for key, value in full.items() if value is not ...})
        made.boxes[f"instances_train.json:{entry['id']}"] = reason
    coco = {"images": listed, "categories": [{"id": 51, "name": "bowl"}], "annotations": annotations}
    (root / "boxes" / "instances_train.json").write_text(json.dumps(coco))
    (root / "boxes" / "captions_train.json").write_text("{}")
    return made


def test_the_same_holds_for_coco(tmp_path: Path) -> None:
    made = _make_coco(tmp_path / "one")
    _check(made, _make_coco(tmp_path / "two"), tmp_path)
    store = Store(str(tmp_path / "crowds"))
    boxes = _rows(_ingest(made.root, store)[0], "boxes")
    crowds = [box for box in boxes if box["is_group_of"]]
    assert [(box["image_id"], box["is_group_of"]) for box in crowds] == [("000000000000", 1)]
    assert Counter(box["label_name"] for box in boxes)["99"] == 1
    assert {(box["is_occluded"], box["is_truncated"], box["is_inside"]) for box in boxes} == {(-1, -1, -1)}
    clipped = [box for box in boxes if (box["xmin"], box["xmax"], box["ymin"], box["ymax"]) == (0, 1, 0, 1)]
    assert len(clipped) == 2
