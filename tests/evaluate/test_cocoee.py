"""COCOEE from a folder of the published layout, and every way in which such a folder is not whole."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pbe.data import images
from pbe.data.files import FileTree
from pbe.data.masks import unpack_mask
from pbe.data.schema import BENCH, require
from pbe.evaluate.bench.cocoee import SIDE_PX, CocoeeError, read_cocoee
from tests.icc import WIDE

IDS = [900100000042, 17, 581930]  # annotation ids: larger than any image id, unsorted


def write_cocoee(folder: Path, ids: list[int] = IDS) -> Path:
    rng = np.random.default_rng(0)
    for part in ("GT_3500", "Ref_3500", "Mask_bbox_3500"):
        (folder / part).mkdir(parents=True)
    for number in ids:
        photo = images.resize(rng.integers(0, 256, (8, 8, 3)).astype(np.uint8), width_px=SIDE_PX, height_px=SIDE_PX)
        mask = np.zeros((SIDE_PX, SIDE_PX, 3), np.uint8)
        mask[100:200, 50 : 300 + number % 7] = 255
        reference = rng.integers(0, 256, (40, 30 + number % 5, 3)).astype(np.uint8)
        (folder / f"GT_3500/{number:012d}_GT.png").write_bytes(images.encode_png(photo))
        (folder / f"Mask_bbox_3500/{number:012d}_mask.png").write_bytes(images.encode_png(mask))
        (folder / f"Ref_3500/{number:012d}_ref.png").write_bytes(images.encode_png(reference))
    np.save(folder / "id_list.npy", np.array(ids, np.int64))
    return folder


def write_annotations(path: Path, ids: list[int] = IDS) -> Path:
    """As COCO's instances JSON: 3 and 4 by turns, and an annotation of which COCOEE knows nothing."""
    found = [{"id": number, "category_id": 3 + place % 2, "image_id": 9} for place, number in enumerate(ids)]
    categories = [{"id": 3, "name": "dog"}, {"id": 4, "name": "hot dog"}]
    coco = {"images": [], "categories": categories, "annotations": [*found, {"id": 99, "category_id": 3}]}
    path.write_text(json.dumps(coco))
    return path


def _tree(path: Path) -> FileTree:
    return FileTree(str(path), "bench.cocoee_annotations")


def _read(folder: Path, **changes: Any) -> list[dict]:
    settings = {"image_px": SIDE_PX, "seed": 1, "expected_items": len(IDS)} | changes
    return require(read_cocoee(folder, **settings), BENCH, "cocoee").to_pylist()


def test_items_are_the_published_ones_in_the_lists_order(tmp_path: Path) -> None:
    rows = _read(write_cocoee(tmp_path / "test_bench"))
    assert [row["bench_id"] for row in rows] == ["900100000042", "000000000017", "000000581930"]
    for row in rows:
        hole = unpack_mask(row["box_hole_mask"], width_px=SIDE_PX, height_px=SIDE_PX)
        assert (hole[100:200, 50:300] == 1).all() and hole[:100].sum() == hole[200:].sum() == 0  # white is the hole
        assert row["bezier_hole_mask"] is None and row["own"] is None
        assert row["exemplar"] == (tmp_path / f"test_bench/Ref_3500/{row['bench_id']}_ref.png").read_bytes()
        source = images.decode((tmp_path / f"test_bench/GT_3500/{row['bench_id']}_GT.png").read_bytes())
        np.testing.assert_array_equal(images.decode(row["source"]), source)
        others = [other["exemplar"] for other in rows if other is not row]
        assert row["foreign"] in others
    assert _read(tmp_path / "test_bench") == rows


def test_pixels_are_taken_as_stored_as_upstream_does_whatever_profile_a_file_has(tmp_path: Path) -> None:
    folder = write_cocoee(tmp_path / "test_bench")
    rows = _read(folder)
    for path in (*folder.glob("GT_3500/*"), *folder.glob("Ref_3500/*")):
        Image.open(path, formats=["PNG"]).save(path, icc_profile=WIDE)
    for row, before in zip(_read(folder), rows, strict=True):
        for name in ("source", "exemplar", "foreign"):
            np.testing.assert_array_equal(images.decode(row[name]), images.decode(before[name]))


def test_some_items_are_chosen_by_hash_from_a_whole_archive(tmp_path: Path) -> None:
    write_cocoee(tmp_path, [*IDS, 5])
    every, two, three = (_read(tmp_path, expected_items=4, max_items=count) for count in (4, 2, 3))
    names = [[row["bench_id"] for row in rows] for rows in (every, two, three)]
    assert len(names[1]) == 2 and len(names[2]) == 3 and set(names[1]) < set(names[2]) < set(names[0])
    assert all([name for name in names[0] if name in some] == some for some in names)  # in the list's order
    assert all(row["foreign"] in [other["exemplar"] for other in two if other is not row] for row in two)
    (tmp_path / "GT_3500/000000000017_GT.png").unlink()
    _refused(tmp_path, "1 of its 12 files are missing", expected_items=4, max_items=1)


def test_annotations_give_every_item_its_class_and_change_nothing_else(tmp_path: Path) -> None:
    folder = write_cocoee(tmp_path / "test_bench")
    plain = _read(folder)
    assert {row["label_name"] for row in plain} == {""}
    labelled = _read(folder, annotations=_tree(write_annotations(tmp_path / "instances.json")))
    assert [row["label_name"] for row in labelled] == ["dog", "hot dog", "dog"]
    assert [row | {"label_name": ""} for row in labelled] == plain


def test_annotations_of_other_photos_are_refused_by_the_ids_that_they_lack(tmp_path: Path) -> None:
    folder, path = write_cocoee(tmp_path / "test_bench"), tmp_path / "instances.json"
    _refused(
        folder,
        r"bench\.cocoee_annotations: \S+/instances\.json has no annotation of 2 of 3 ids: 17, 581930; name the",
        annotations=_tree(write_annotations(path, IDS[:1])),
    )
    _refused(folder, r"bench\.cocoee_annotations: .*nowhere", annotations=_tree(tmp_path / "nowhere"))
    for broken, message in (
        ("{", "not a JSON file"),
        ('{"categories": []}', "not a COCO instances JSON: it has no list of annotations"),
        ('{"categories": [], "annotations": [{"id": 17}]}', "annotation 17: category_id None is no id"),
        (
            '{"categories": [], "annotations": [{"id": 17, "category_id": 1}, {"id": 17, "category_id": 2}]}',
            "annotation 17 is both '1' and '2'",
        ),
    ):
        path.write_text(broken)
        _refused(folder, f"instances.json: {message}", annotations=_tree(path))


def _refused(folder: Path, message: str, **changes: Any) -> None:
    with pytest.raises(CocoeeError, match=message):
        _read(folder, **changes)


def test_a_folder_that_is_not_there_says_how_to_get_it(tmp_path: Path) -> None:
    _refused(tmp_path / "nowhere", "no such folder; get test_bench.zip from the link in the README")
    write_cocoee(tmp_path)
    (tmp_path / "id_list.npy").unlink()
    _refused(tmp_path, re.escape("id_list.npy: not there; get test_bench.zip"))


def test_files_that_are_missing_are_counted_and_named(tmp_path: Path) -> None:
    write_cocoee(tmp_path)
    (tmp_path / "GT_3500/000000000017_GT.png").unlink()
    (tmp_path / "Ref_3500/000000581930_ref.png").unlink()
    _refused(
        tmp_path,
        "2 of its 9 files are missing: GT_3500/000000000017_GT.png, Ref_3500/000000581930_ref.png; get",
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.array([1, 1, 2]), "expected a one-dimensional array of distinct whole numbers"),
        (np.array([[1, 2, 3]]), "expected a one-dimensional array of distinct whole numbers"),
        (np.array([1, 2]), "2 ids, COCOEE has 3"),
        (np.array([-1, 2, 3]), "expected a one-dimensional array of distinct whole numbers"),
        (b"\x93NUMPY broken", "not an array of ids"),
    ],
)
def test_an_id_list_that_is_none_is_refused(tmp_path: Path, content: np.ndarray | bytes, message: str) -> None:
    write_cocoee(tmp_path)
    if isinstance(content, bytes):
        (tmp_path / "id_list.npy").write_bytes(content)
    else:
        np.save(tmp_path / "id_list.npy", content)
    _refused(tmp_path, message)


def test_an_id_list_is_never_unpickled(tmp_path: Path) -> None:
    write_cocoee(tmp_path)
    np.save(tmp_path / "id_list.npy", np.array([{"a": 1}, 2, 3], object), allow_pickle=True)
    _refused(tmp_path, "not an array of ids")


def test_pictures_of_another_size_or_broken_ones_are_named(tmp_path: Path) -> None:
    write_cocoee(tmp_path)
    mask = tmp_path / "Mask_bbox_3500/000000000017_mask.png"
    whole = mask.read_bytes()
    for content, message in (
        (images.encode_png(np.zeros((64, 64, 3), np.uint8)), "_mask.png: 64 x 64 px, expected 512 x 512"),
        (images.encode_png(np.zeros((SIDE_PX, SIDE_PX, 3), np.uint8)), "_mask.png: nothing is white"),
        (images.encode_png(np.full((SIDE_PX, SIDE_PX, 3), 255, np.uint8)), "_mask.png: everything is white"),
        (whole[: len(whole) // 2], "_mask.png: .*unpack the archive again"),
    ):
        mask.write_bytes(content)
        _refused(tmp_path, message)


def test_a_model_of_another_size_is_refused(tmp_path: Path) -> None:
    _refused(write_cocoee(tmp_path), "COCOEE is 512 px and is not resized; set materialize.image_px", image_px=64)
