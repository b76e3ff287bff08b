"""Nothing is lost: kept + rejected = input, every reject has a reason, and the tables can be stored."""

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import ExifTags, Image

from pbe.data import images
from pbe.data.annotations import box_files, read_annotations, with_names
from pbe.data.download import PhotoError
from pbe.data.files import FileTree
from pbe.data.ingest import PhotoLimits, read_shard
from pbe.data.schema import (
    ANNOTATIONS,
    BOXES,
    IMAGE_REASONS,
    IMAGES,
    INGEST_BOX_REASONS,
    PHOTOS,
    REJECTS,
    SPLITS,
    STATED,
    require,
    with_optional,
)
from pbe.data.sources import FolderSource
from pbe.store import Store
from tests.icc import SRGB, WIDE

REASONS = {*IMAGE_REASONS, *INGEST_BOX_REASONS} - {"image_without_kept_box"}  # that one is materialize's
LIMITS = PhotoLimits(exif="ignore", max_pixels=10_000)
HEADER = "ImageID,LabelName,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
GOOD = {"XMin": "0.1", "XMax": "0.5", "YMin": "0.2", "YMax": "0.75", "LabelName": "/m/1"}
OUTSIDE: list[dict[str, str]] = [{"XMin": "-0.01"}, {"YMin": "0.75"}]  # the second is empty
UNPARSABLE: list[dict[str, str]] = [{"XMin": "left"}, {"IsInside": "300"}, {"LabelName": ""}, {"IsInside": "0,more"}]


@dataclass(frozen=True)
class Place:
    """A folder of photos and one of box files, which the tests below fill; `check` reads them as one shard."""

    folder: Path
    store: Store

    def photo(
        self, name: str, size_px: tuple[int, int] = (20, 10), *, data: bytes | None = None, grey: int = 9
    ) -> Path:
        path = self.folder / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(images.encode_png(np.full((*size_px[::-1], 3), grey, np.uint8)) if data is None else data)
        return path

    def boxes(self, *lines: str, name: str = "train.csv") -> None:
        (self.folder / "boxes").mkdir(exist_ok=True)
        (self.folder / "boxes" / name).write_text("\n".join([HEADER, *lines, ""]))

    def photos(self) -> pa.Table:
        tree = FileTree(str(self.folder / "photos"), "ingest.images")
        return next(FolderSource(tree).photos()) if any(self.folder.glob("photos/**/*.*")) else PHOTOS.empty_table()

    def annotations(self) -> pa.Table:
        tree = FileTree(str(self.folder / "boxes"), "ingest.boxes")
        files = box_files(tree) if (self.folder / "boxes").is_dir() else []
        tables = [with_names(table, {"/m/1": "Cat"}) for file in files for table in read_annotations(tree, file)]
        return pa.concat_tables([ANNOTATIONS.empty_table(), *(with_optional(table, ANNOTATIONS) for table in tables)])

    def read(self, image_id: str, address: str) -> bytes:
        return FolderSource(FileTree(str(self.folder / "photos"), "ingest.images")).read(address, 10_000)

    def check(
        self,
        *,
        photos: pa.Table | None = None,
        read: Callable[[str, str], bytes] | None = None,
        address_without_photo: Callable[[str, str], str | None] = lambda image_id, split: None,
        lists_all: bool = True,
        limits: PhotoLimits = LIMITS,
        threads: int = 3,
        stated: list[dict[str, Any]] | None = None,
    ) -> tuple[dict[str, pa.Table], dict[str, int]]:
        """read_shard, with all its laws asserted."""
        photos, annotations = self.photos() if photos is None else photos, self.annotations()
        tables, counts = read_shard(
            annotations,
            photos,
            read=read or self.read,
            address_without_photo=address_without_photo,
            lists_all=lists_all,
            limits=limits,
            threads=threads,
            stated=pa.Table.from_pylist(stated or [], schema=STATED),
        )
        for name, schema in (("images", IMAGES), ("boxes", BOXES), ("rejects", REJECTS)):
            require(tables[name], schema, name)
        self.store.write_unit("ingest", "unit", tables, counts=counts)  # storable: nulls only where allowed
        rejects = tables["rejects"].to_pylist()
        reasons = Counter(row["reason"] for row in rejects)
        assert set(reasons) <= REASONS and {row["stage"] for row in rejects} <= {"ingest"}
        assert all(row["detail"] and "\n" not in row["detail"] for row in rejects)
        assert {f"rejected_{reason}": count for reason, count in reasons.items()} == {
            key: count for key, count in counts.items() if key.startswith("rejected_")
        }
        if lists_all:
            assert counts["images_in"] == photos.num_rows
        assert counts["boxes_in"] == annotations.num_rows
        for kind in ("images", "boxes"):
            assert counts[f"{kind}_in"] == counts[f"{kind}_kept"] + counts[f"{kind}_rejected"]
            assert counts[f"{kind}_kept"] == tables[kind].num_rows
        keys = [row["key"] for row in rejects]
        assert len(set(keys)) == len(keys), "two rejects of one key"
        image_ids = tables["images"].column("image_id").to_pylist()
        assert image_ids == sorted(set(image_ids))
        per_image: dict[str, list[int]] = {}
        for box in tables["boxes"].to_pylist():
            per_image.setdefault(box["image_id"], []).append(box["box_index"])
        assert list(per_image) == image_ids  # every kept photo has a box and every box a photo, in the same order
        assert all(indices == list(range(len(indices))) for indices in per_image.values())
        splits = dict(zip(image_ids, tables["images"].column("split").to_pylist(), strict=True))
        assert all(box["split"] == splits[box["image_id"]] for box in tables["boxes"].to_pylist())
        return tables, counts


@pytest.fixture
def place(tmp_path: Path, store: Store) -> Place:
    return Place(tmp_path, store)


def _line(image_id: str, **cells: str) -> str:
    values = {"ImageID": image_id, **GOOD, **cells}
    return ",".join(values.get(name, "") for name in HEADER.split(","))


def _rejects(tables: dict[str, pa.Table]) -> dict[str, str]:
    return {row["key"]: row["reason"] for row in tables["rejects"].to_pylist()}


def test_every_reason_occurs_and_nothing_is_lost(place: Place) -> None:
    place.photo("good.png")
    place.photo("bad.png", data=b"no image")
    place.photo("lonely.png")
    place.photo("unusable.png")
    place.photo("nameless/.png")
    place.photo("large.png", (200, 100))
    place.photo("x/twice.png", grey=1)
    place.photo("y/twice.png", grey=2)
    place.boxes(
        _line("good"),
        _line("bad"),
        _line("bad"),
        _line("elsewhere"),
        _line("unusable", **OUTSIDE[0]),
        _line("good", **UNPARSABLE[0]),
        _line("large"),
        _line("twice"),
        _line("../good"),
    )
    place.photo("cropped.png")
    place.photo("two.png")
    place.boxes(_line("cropped"), _line("two"), name="stated.csv")
    place.photo("other.png")
    place.boxes(_line("good"), name="val.csv")
    place.boxes(_line("other"), name="z.csv")
    place.boxes(_line("s404"), _line("s503"), name="web.csv")

    def read(image_id: str, address: str) -> bytes:
        if image_id.startswith("s"):
            raise PhotoError("image_unpublished" if image_id == "s404" else "download_failed", f"{address}: HTTP")
        data = place.read(image_id, address)
        return data + b"x" if image_id == "other" else data

    tables, counts = place.check(
        photos=pa.concat_tables(
            [
                place.photos(),
                pa.Table.from_pylist(
                    [{"image_id": name, "address": name, "version": ""} for name in ("s404", "s503")], schema=PHOTOS
                ),
            ]
        ),
        read=read,
        stated=[
            {"image_id": "cropped", "file": "stated.csv", "width_px": 20, "height_px": 20},  # it is 20 x 10
            {"image_id": "two", "file": "", "problem": "box files call it 1/two and 2/two"},
        ],
    )
    rejects = _rejects(tables)
    assert rejects == {
        "bad.png": "image_unreadable",
        "train.csv:3": "box_image_rejected",
        "train.csv:4": "box_image_rejected",
        "train.csv:5": "image_missing",
        "train.csv:6": "box_outside_image",
        "unusable.png": "image_without_box",
        "nameless/.png": "image_id_invalid",
        "train.csv:7": "box_unparsable",
        "large.png": "image_too_large",
        "train.csv:8": "box_image_rejected",
        "x/twice.png": "image_id_duplicated",
        "y/twice.png": "image_id_duplicated",
        "train.csv:9": "box_image_rejected",
        "train.csv:10": "box_image_id_invalid",
        "val.csv:2": "box_in_other_split",
        "lonely.png": "image_without_box",
        "s404": "image_unpublished",
        "s503": "download_failed",
        "other.png": "image_changed",
        "z.csv:2": "box_image_rejected",
        "stated.csv:2": "box_size_mismatch",
        "stated.csv:3": "box_image_ambiguous",
        "cropped.png": "image_without_box",
        "two.png": "image_without_box",
        "web.csv:2": "box_image_rejected",
        "web.csv:3": "box_image_rejected",
    }
    assert set(rejects.values()) == REASONS - {"box_without_mask"}  # that is in test_object_masks.py
    assert (counts["images_kept"], counts["boxes_kept"]) == (1, 1)


def test_what_is_kept_is_as_the_source_has_it(place: Place) -> None:
    z, _ = place.photo("z.png", (7, 5)), place.photo("a.png", (1, 1))
    place.boxes(*(_line("a", XMin=f"0.{number}", XMax="0.9") for number in range(2, 7)))
    place.boxes(_line("z", IsGroupOf="1", IsInside="-1", LabelName="/m/9"), name="val.csv")
    known = {"license": "CC0", "author": "Ann", "source_url": "https://photo.example/z", "rotation": 90}
    photos = pa.Table.from_pylist(
        [row | (known if row["image_id"] == "z" else {}) for row in place.photos().to_pylist()], schema=PHOTOS
    )
    tables, _ = place.check(photos=photos)
    first, second = tables["images"].to_pylist()
    assert (first["image_id"], first["split"]) == ("a", "train")
    assert [first[key] for key in known] == [None] * 4
    assert {key: second[key] for key in known} == known
    assert (second["split"], second["width_px"], second["height_px"]) == ("validation", 7, 5)
    assert second["exif_orientation"] == 1  # OpenImages' rotation is a statement, not an instruction
    assert second["bytes"] == z.read_bytes()
    assert second["sha256"] == hashlib.sha256(second["bytes"]).hexdigest()
    *cats, other = tables["boxes"].to_pylist()
    assert [cat["xmin"] for cat in cats] == [0.2, 0.3, 0.4, 0.5, 0.6]  # in the order of the lines
    assert {(cat["label"], cat["label_name"]) for cat in cats} == {("/m/1", "Cat")}
    assert (other["label"], other["label_name"]) == ("/m/9", "/m/9")
    assert (other["xmin"], other["xmax"], other["ymin"], other["ymax"]) == (0.1, 0.5, 0.2, 0.75)
    flags = ("is_occluded", "is_truncated", "is_group_of", "is_depiction", "is_inside")
    assert [other[flag] for flag in flags] == [-1, -1, 1, -1, -1]  # a missing flag is unknown


def test_an_image_that_is_gone_or_another_when_it_is_read_may_be_tried_again(place: Place) -> None:
    gone, _ = place.photo("gone.png"), place.photo("a.png")
    place.boxes(_line("gone"), _line("a"))
    photos = place.photos()
    gone.unlink()
    tables, counts = place.check(photos=photos)
    assert (counts["images_kept"], _rejects(tables)["gone.png"]) == (1, "image_changed")
    place.photo("gone.png", grey=200)  # the index hashed another file: the part must not contain this one
    tables, counts = place.check(photos=photos)
    assert (counts["images_kept"], _rejects(tables)["gone.png"]) == (1, "image_changed")
    place.photo("gone.png")
    assert place.check(photos=photos)[1]["images_kept"] == 2


def test_a_picture_with_too_many_pixels_is_refused_before_it_is_decoded(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.photo("fits.png", (100, 100))
    place.photo("over.png", (100, 101))
    place.photo("heavy.png", data=place.photo("fits.png", (100, 100)).read_bytes() + b"x" * 10_000)
    place.boxes(_line("fits"), _line("over"), _line("heavy"))
    decoded: list[bytes] = []
    decode = images.decode

    def noted_decode(data: bytes, **more: Any) -> np.ndarray:
        decoded.append(data)
        return decode(data, **more)

    monkeypatch.setattr(images, "decode", noted_decode)
    tables, _ = place.check()
    assert tables["images"].column("image_id").to_pylist() == ["fits"] and len(decoded) == 1
    details = {row["key"]: (row["reason"], row["detail"]) for row in tables["rejects"].to_pylist()}
    assert details["over.png"] == ("image_too_large", "over.png: 100 x 101 px, more than 10000 pixels")
    assert details["heavy.png"] == ("image_too_large", "heavy.png: more than 10000 bytes")


@pytest.mark.parametrize(("exif", "size_px", "orientation"), [("ignore", (20, 10), 1), ("apply", (10, 20), 6)])
def test_size_and_orientation_are_those_of_the_picture_that_the_boxes_mean(
    place: Place, exif: Any, size_px: tuple[int, int], orientation: int
) -> None:
    tag, buffer = Image.Exif(), BytesIO()
    tag[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (20, 10)).save(buffer, "JPEG", exif=tag)
    place.photo("a.jpg", data=buffer.getvalue())
    place.boxes(_line("a"))
    (row,) = place.check(limits=replace(LIMITS, exif=exif))[0]["images"].to_pylist()
    assert (row["width_px"], row["height_px"], row["exif_orientation"]) == (*size_px, orientation)
    assert row["bytes"] == buffer.getvalue()


def test_files_of_one_id_count_as_one_photo_when_they_are_the_same_and_as_none_when_they_differ(place: Place) -> None:
    for name, grey in (("1/same.png", 1), ("2/same.png", 1), ("3/same.png", 1), ("1/mixed.png", 1), ("2/mixed.png", 2)):
        place.photo(name, grey=grey)
    place.photo("1/half.png", data=b"no image")  # an unreadable copy causes no ambiguity
    place.photo("2/half.png")
    place.boxes(_line("same"), _line("mixed"), _line("half"))
    tables, _ = place.check()
    assert tables["images"].column("image_id").to_pylist() == ["half", "same"]
    details = {row["key"]: row["detail"] for row in tables["rejects"].to_pylist()}
    assert _rejects(tables) == {
        "2/same.png": "image_id_duplicated",
        "3/same.png": "image_id_duplicated",
        "1/mixed.png": "image_id_duplicated",
        "2/mixed.png": "image_id_duplicated",
        "1/half.png": "image_unreadable",
        "train.csv:3": "box_image_rejected",
    }
    assert "1/same.png" in details["3/same.png"] and "the first is kept" in details["3/same.png"]
    assert "2/mixed.png" in details["1/mixed.png"] and "differ" in details["1/mixed.png"]


def test_the_first_line_of_a_photo_says_its_split_and_lines_of_other_splits_are_rejected(place: Place) -> None:
    place.photo("a.png")
    place.photo("b.png")
    place.boxes(_line("a"), _line("a", **UNPARSABLE[0]), name="a_test.csv")
    place.boxes(_line("a"), _line("b", **OUTSIDE[0]), name="b_train.csv")
    place.boxes(_line("b"), _line("a"), name="c_val.csv")
    tables, counts = place.check()
    splits = {row["image_id"]: row["split"] for row in tables["images"].to_pylist()}
    assert splits == {"a": "test", "b": "validation"}  # b's line in the train file is unusable
    reasons = _rejects(tables)
    assert reasons["b_train.csv:2"] == reasons["c_val.csv:3"] == "box_in_other_split"
    assert counts["boxes_kept"] == 2


def test_a_source_that_does_not_list_all_is_asked_for_what_boxes_name_and_no_more(place: Place) -> None:
    place.photo("train/listed.png")
    place.photo("train/never_named.png")
    place.photo("train/unlisted.png", (3, 2))
    place.boxes(_line("listed"), _line("unlisted"), _line("wrong", **OUTSIDE[0]), _line("..", **GOOD))
    asked: list[tuple[str, str]] = []

    def read(image_id: str, address: str) -> bytes:
        asked.append((image_id, address))
        return place.read(image_id, address)

    photos = place.photos()
    photos = photos.filter(pa.array([name == "listed" for name in photos.column("image_id").to_pylist()]))
    tables, counts = place.check(
        photos=photos,
        read=read,
        lists_all=False,
        address_without_photo=lambda image_id, split: f"{split}/{image_id}.png",
    )
    assert sorted(asked) == [("listed", "train/listed.png"), ("unlisted", "train/unlisted.png")]
    assert counts["images_in"] == 3
    assert _rejects(tables) == {
        "train.csv:4": "box_outside_image",
        "train/wrong.png": "image_without_box",
        "train.csv:5": "box_image_id_invalid",
    }


def test_several_photos_are_read_at_once_and_their_timing_does_not_show(place: Place) -> None:
    for number in range(12):
        place.photo(f"p{number:02d}.png", (number + 1, 2))
    place.boxes(*(_line(f"p{number:02d}") for number in reversed(range(12))))
    running, most, lock = 0, 0, threading.Lock()
    delays = np.random.default_rng(0).permutation(12)

    def slow(image_id: str, address: str) -> bytes:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.005 + 0.005 * delays[int(image_id[1:])])
        with lock:
            running -= 1
        return place.read(image_id, address)

    tables, _ = place.check(read=slow, threads=4)
    assert 2 <= most <= 4
    plain, _ = place.check(threads=1)
    assert all(tables[name].equals(plain[name]) for name in tables)


def test_an_empty_shard_is_an_empty_shard(place: Place) -> None:
    _, counts = place.check()
    assert set(counts.values()) == {0}


def test_any_mixture_adds_up_and_the_order_of_the_files_does_not_matter(place: Place) -> None:
    rng = np.random.default_rng(1)
    for index in range(12):
        place.photo(f"image{index}.png", data=None if index % 3 else rng.bytes(20 * index + 1))
        if index % 5 == 0:
            place.photo(f"again/image{index}.png", grey=9 if index == 10 else index)
    variants: list[dict[str, str]] = [{}, {}, {}, *OUTSIDE, *UNPARSABLE]
    every = place.photos()
    for _ in range(15):
        some = every.take(rng.permutation(every.num_rows)[: rng.integers(every.num_rows + 1)])
        for name in ("train.csv", "val.csv"):
            place.boxes(
                *(
                    _line(f"image{rng.integers(14)}", **variants[rng.integers(len(variants))])
                    for _ in range(rng.integers(1, 25))
                ),
                name=name,
            )
        tables, _ = place.check(photos=some)
        again, _ = place.check(photos=some.take(np.arange(some.num_rows)[::-1]))
        assert tables["images"].equals(again["images"]) and tables["boxes"].equals(again["boxes"])
        assert all(split in SPLITS for split in tables["images"].column("split").to_pylist())


def test_a_photo_of_a_wide_gamut_is_kept_as_it_is_and_counted(place: Place) -> None:
    for name, profile in (("a", WIDE), ("b", SRGB), ("c", None)):
        path = place.photo(f"{name}.png", grey=40)
        Image.open(path, formats=["PNG"]).save(path, icc_profile=profile)
    place.boxes(_line("a"), _line("b"), _line("c"))
    tables, counts = place.check()
    assert (counts["images_kept"], counts["images_converted_to_srgb"]) == (3, 1)
    assert tables["images"].column("bytes")[0].as_py() == (place.folder / "photos" / "a.png").read_bytes()


def test_limits_are_inclusive(place: Place) -> None:
    place.photo("a.png", (20, 10))
    place.boxes(_line("a"))
    assert place.check(limits=replace(LIMITS, max_pixels=200))[1]["images_kept"] == 1
    assert place.check(limits=replace(LIMITS, max_pixels=199))[1]["images_kept"] == 0
