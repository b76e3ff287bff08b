"""Nothing is lost: kept + rejected = input whatever comes, every reject has a reason, and the tables can be stored."""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pbe.data import images
from pbe.data.ingest import read_bucket
from pbe.data.schema import BOXES, IMAGES, REJECT_REASONS, REJECTS, require
from pbe.data.sources import EXTRA_CELLS, BoxLine, ImageFile
from pbe.store import Store

INGEST_REASONS = set(REJECT_REASONS) - {"area_below_min", "area_above_max", "image_without_kept_box"}
GOOD = {"XMin": "0.1", "XMax": "0.5", "YMin": "0.2", "YMax": "0.75", "LabelName": "/m/1"}
OUTSIDE: list[dict[str, Any]] = [
    {"XMin": "-0.01"},
    {"XMax": "1.01"},
    {"YMin": "0.75"},  # min = max: no pixel
    {"XMin": "0.5"},
    {"YMin": "0.9"},  # min > max
    {"YMax": "nan"},
    {"XMax": "inf"},
]
UNPARSABLE: list[dict[str, Any]] = [
    {"XMin": "left"},
    {"YMax": ""},
    {"IsOccluded": "yes"},
    {"IsInside": "300"},  # a flag is 1, 0 or -1; a larger number does not even fit its column
    {"LabelName": ""},
    {EXTRA_CELLS: ["more"]},
]


def _line(number: int, image_id: str, split: str = "train", **cells: Any) -> BoxLine:
    return BoxLine("boxes.csv", number, split, {"ImageID": image_id, **GOOD, **cells})


def _image(folder: Path, image_id: str, size_px: tuple[int, int] = (20, 10), data: bytes | None = None) -> ImageFile:
    path = folder / f"{image_id}.png"
    path.write_bytes(images.encode_png(np.full((*size_px[::-1], 3), 9, np.uint8)) if data is None else data)
    return ImageFile(image_id, path, "CC0" if image_id < "m" else None)


def _check(files: list[ImageFile], lines: list[BoxLine], store: Store) -> tuple[dict[str, pa.Table], dict[str, int]]:
    """read_bucket, with all its laws asserted."""
    tables, counts = read_bucket(files, lines, {"/m/1": "Cat"})
    for name, schema in (("images", IMAGES), ("boxes", BOXES), ("rejects", REJECTS)):
        require(tables[name], schema, name)
    store.write_unit("ingest", "unit", tables, counts=counts)  # storable: nulls only where allowed
    reasons = Counter(tables["rejects"].column("reason").to_pylist())
    assert set(reasons) <= INGEST_REASONS
    assert {f"rejected_{reason}": count for reason, count in reasons.items()} == {
        key: count for key, count in counts.items() if key.startswith("rejected_")
    }
    for kind, total in (("images", files), ("boxes", lines)):
        assert counts[f"{kind}_in"] == len(total) == counts[f"{kind}_kept"] + counts[f"{kind}_rejected"]
        assert counts[f"{kind}_kept"] == tables[kind].num_rows
    keys = tables["rejects"].column("key").to_pylist()
    assert len(set(keys)) == len(keys), "two rejects of one key"
    image_ids = tables["images"].column("image_id").to_pylist()
    assert image_ids == sorted(set(image_ids))
    per_image: dict[str, list[int]] = {}
    for image_id, index in zip(
        *(tables["boxes"].column(n).to_pylist() for n in ("image_id", "box_index")), strict=True
    ):
        per_image.setdefault(image_id, []).append(index)
    assert list(per_image) == image_ids  # every kept photo has a box and every box a photo, in the same order
    assert all(indices == list(range(len(indices))) for indices in per_image.values())
    return tables, counts


def test_every_reason_occurs_and_nothing_is_lost(tmp_path: Path, store: Store) -> None:
    files = [
        _image(tmp_path, "good"),
        _image(tmp_path, "bad", data=b"no image"),
        _image(tmp_path, "lonely"),
        _image(tmp_path, "unusable"),
    ]
    lines = [
        _line(2, "good"),
        _line(3, "bad"),
        _line(4, "bad"),
        _line(5, "elsewhere"),
        _line(6, "unusable", **OUTSIDE[0]),
        _line(7, "good", **UNPARSABLE[0]),
    ]
    tables, counts = _check(files, lines, store)
    rejects = {row["key"]: row["reason"] for row in tables["rejects"].to_pylist()}
    assert rejects == {
        "bad": "image_unreadable",
        "bad#0": "box_image_rejected",
        "bad#1": "box_image_rejected",
        "boxes.csv:5": "image_missing",
        "boxes.csv:6": "box_outside_image",
        "boxes.csv:7": "box_unparsable",
        "lonely": "image_without_box",
        "unusable": "image_without_box",
    }
    assert set(rejects.values()) == INGEST_REASONS
    assert (counts["images_kept"], counts["boxes_kept"]) == (1, 1)
    assert {row["stage"] for row in tables["rejects"].to_pylist()} == {"ingest"}


@pytest.mark.parametrize("cells", OUTSIDE, ids=str)
def test_a_box_outside_the_photo_is_rejected(cells: dict[str, Any], tmp_path: Path, store: Store) -> None:
    _, counts = _check([_image(tmp_path, "a")], [_line(2, "a"), _line(3, "a", **cells)], store)
    assert (counts["boxes_kept"], counts["rejected_box_outside_image"]) == (1, 1)


@pytest.mark.parametrize("cells", UNPARSABLE, ids=str)
def test_a_line_with_a_wrong_cell_is_rejected(cells: dict[str, Any], tmp_path: Path, store: Store) -> None:
    _, counts = _check([_image(tmp_path, "a")], [_line(2, "a"), _line(3, "a", **cells)], store)
    assert (counts["boxes_kept"], counts["rejected_box_unparsable"]) == (1, 1)


def test_a_box_may_touch_the_border(tmp_path: Path, store: Store) -> None:
    whole = {"XMin": "0", "XMax": "1", "YMin": "0", "YMax": "1.0"}
    tables, _ = _check([_image(tmp_path, "a")], [_line(2, "a", **whole)], store)
    (box,) = tables["boxes"].to_pylist()
    assert (box["xmin"], box["xmax"], box["ymin"], box["ymax"]) == (0, 1, 0, 1)


def test_what_is_kept_is_as_stored(tmp_path: Path, store: Store) -> None:
    files = [_image(tmp_path, "z", (7, 5)), _image(tmp_path, "a", (1, 1))]
    lines = [_line(2, "z", "validation", IsGroupOf="1", IsInside="-1", LabelName="/m/9"), _line(3, "a")]
    tables, _ = _check(files, lines, store)
    first, second = tables["images"].to_pylist()
    assert (first["image_id"], first["split"], first["license"]) == ("a", "train", "CC0")
    assert (second["split"], second["width_px"], second["height_px"], second["license"]) == ("validation", 7, 5, None)
    assert second["bytes"] == files[0].path.read_bytes()
    assert second["sha256"] == hashlib.sha256(second["bytes"]).hexdigest() == files[0].sha256()
    cat, other = tables["boxes"].to_pylist()
    assert (cat["label"], cat["label_name"], other["label_name"]) == ("/m/1", "Cat", "/m/9")
    assert (cat["xmin"], cat["xmax"], cat["ymin"], cat["ymax"]) == (0.1, 0.5, 0.2, 0.75)
    numbered = [_line(number, "a", XMin=f"0.{number}", XMax="0.9") for number in range(2, 7)]
    again, _ = _check(files, [*numbered, lines[0]], store)
    assert again["boxes"].column("xmin").to_pylist()[:5] == [0.2, 0.3, 0.4, 0.5, 0.6]  # in the order of the lines
    flags = ("is_occluded", "is_truncated", "is_group_of", "is_depiction", "is_inside")
    assert [other[flag] for flag in flags] == [-1, -1, 1, -1, -1]  # a missing flag is unknown


def test_an_image_that_is_gone_when_it_is_read_is_unreadable(tmp_path: Path, store: Store) -> None:
    gone = _image(tmp_path, "gone")
    gone.path.unlink()
    _, counts = _check([gone, _image(tmp_path, "a")], [_line(2, "gone"), _line(3, "a")], store)
    assert (counts["images_kept"], counts["rejected_image_unreadable"]) == (1, 1)


def test_an_empty_bucket_is_an_empty_bucket(store: Store) -> None:
    _, counts = _check([], [], store)
    assert set(counts.values()) == {0}


def test_any_mixture_adds_up_and_the_order_of_the_files_does_not_matter(tmp_path: Path, store: Store) -> None:
    rng = np.random.default_rng(1)
    files = [
        _image(tmp_path, f"image{index}", data=None if index % 3 else rng.bytes(20 * index)) for index in range(12)
    ]
    variants: list[dict[str, Any]] = [{}, {}, {}, *OUTSIDE, *UNPARSABLE]
    for _ in range(15):
        some = [files[index] for index in rng.permutation(12)[: rng.integers(13)]]
        lines = [
            _line(number + 2, f"image{rng.integers(14)}", **variants[rng.integers(len(variants))])
            for number in range(rng.integers(40))
        ]
        tables, _ = _check(some, lines, store)
        again, _ = _check(some[::-1], lines, store)
        assert tables["images"].equals(again["images"]) and tables["boxes"].equals(again["boxes"])
