"""The held-out bench: who is exemplar of whom, what is repeatable, how much is held, and what a bench refuses."""

import weakref
from collections.abc import Iterable
from functools import partial

import numpy as np
import pyarrow as pa
import pytest

from pbe.data import images
from pbe.data.masks import unpack_mask
from pbe.data.schema import BENCH, BENCH_CANDIDATES, BOXES, FLAGS, REAL_IMAGES, require, with_optional
from pbe.data.settings import MaterializeConfig
from pbe.evaluate.bench import heldout
from pbe.evaluate.bench.heldout import (
    KEYS,
    BenchError,
    Choice,
    bench_table,
    choose,
    cut_shard,
    foreign_boxes,
    nearest_of_other_photos,
    refuse_what_it_lacks,
)

CUT = MaterializeConfig(
    image_px=32,
    slots=1,
    reference_px=16,
    reference_pad_px=2,
    box_extend_frac=0.4,
    crop_shrink_frac=0.6,
    bezier_points_per_side=18,
    bezier_jitter_px=2,
)


def _photos(count: int) -> pa.Table:
    """Photos of 90 x 80 px; each has noise of its own."""
    noise = [np.random.default_rng(number).integers(0, 256, (80, 90, 3)).astype(np.uint8) for number in range(count)]
    ids = [f"photo{number}" for number in range(count)]
    return pa.table({"image_id": ids, "bytes": [*map(images.encode_png, noise)], "exif_orientation": [1] * count})


def _boxes(photos: int = 4, labels: str = "ab") -> pa.Table:
    """One box for each label in every photo."""
    rows = [
        {
            "image_id": f"photo{number}",
            "split": "validation",
            "box_index": index,
            "label": label,
            "label_name": label,
            "xmin": (10 + 20 * index) / 90,
            "xmax": (40 + 20 * index) / 90,
            "ymin": 0.25,
            "ymax": 0.75,
            **dict.fromkeys(FLAGS, 0),
        }
        for number in range(photos)
        for index, label in enumerate(labels)
    ]
    return pa.Table.from_pylist(rows, schema=BOXES)


def _relabelled(boxes: pa.Table, labels: list[str]) -> pa.Table:
    return boxes.set_column(boxes.schema.get_field_index("label_name"), BOXES.field("label_name"), [labels])


def _mean_colour(pictures: Iterable[np.ndarray]) -> np.ndarray:
    return np.stack([picture.mean((0, 1)) for picture in pictures])


def _bench(
    boxes: pa.Table, *, crops: int = 1, items: int = 100, seed: int = 1, shards: int = 1
) -> tuple[pa.Table, pa.Table]:
    """All steps, with the boxes in shards of equal length."""
    choice = choose(boxes.select(KEYS), crops_per_box=crops, max_items=items)
    size = boxes.num_rows // shards
    parts = [
        cut_shard(
            _photos(8),
            boxes.slice(start, size),
            set(choice.names),
            cfg=CUT,
            crops_per_box=crops,
            features=_mean_colour,
            seed=seed,
        )
        for start in range(0, boxes.num_rows, size)
    ]
    candidates = pa.concat_tables([part["candidates"] for part in parts])

    def features() -> Iterable[np.ndarray]:
        for part in parts:
            yield np.stack([np.frombuffer(v, "<f4") for v in part["candidates"].column("vector").to_pylist()])

    bench = bench_table(
        choice,
        pa.concat_tables([part["items"] for part in parts]),
        exemplars=nearest_of_other_photos(choice, features),
        foreign=foreign_boxes(choice, seed),
        references=lambda rows: with_optional(candidates, BENCH_CANDIDATES).take(pa.array(rows)),
    )
    return bench, pa.concat_tables([part["real"] for part in parts])


def test_the_crop_of_a_small_box_is_sized_to_it_as_in_training() -> None:
    tall = _boxes(photos=2, labels="a")  # 30 x 40 px: a square of 100 px has no room
    small = tall  # 10 x 10 px
    for name, value in (("xmax", 20 / 90), ("ymax", 30 / 80)):
        small = small.set_column(BOXES.get_field_index(name), BOXES.field(name), [[value] * 2])
    for boxes, area_frac in ((tall, 30 * 40 / 80**2), (small, 1 / 2.5**2)):
        items = cut_shard(
            _photos(2),
            boxes,
            set(choose(boxes.select(KEYS), crops_per_box=1, max_items=2).names),
            cfg=CUT.model_copy(update={"context_factor": 2.5, "box_extend_frac": 0.0, "crop_shrink_frac": 0.0}),
            crops_per_box=1,
            features=_mean_colour,
            seed=1,
        )["items"]
        for mask in items.column("box_hole_mask").to_pylist():
            assert unpack_mask(mask, width_px=32, height_px=32).mean() == pytest.approx(area_frac, abs=0.04)


def test_every_box_is_an_item_with_three_references_and_a_real_crop() -> None:
    bench, real_images = _bench(_boxes(), crops=2)
    require(bench, BENCH, "bench")
    require(real_images, REAL_IMAGES, "real_images")
    assert bench.num_rows == real_images.num_rows == 16
    rows = bench.to_pylist()
    assert len({row["bench_id"] for row in rows}) == 16
    for row in rows:
        assert row["exemplar_same_class"] and row["exemplar_image_id"] != row["image_id"]
        source = images.decode(row["source"])
        for kind in ("box", "bezier"):
            hole = unpack_mask(row[f"{kind}_hole_mask"], width_px=32, height_px=32)
            assert source.shape == (32, 32, 3) and 0 < hole.sum() < hole.size
        assert {images.decode(row[kind]).shape for kind in ("exemplar", "own", "foreign")} == {(16, 16, 3)}
        assert row["own"] != row["exemplar"] and row["own"] != row["foreign"]


def _nearest(features: np.ndarray, photos: str, labels: str, *, items: list[int] | None = None) -> list[int]:
    boxes = pa.table({"image_id": [*photos], "box_index": [*range(len(photos))], "label_name": [*labels]})
    choice = Choice(boxes, [(row, 0) for row in (range(len(photos)) if items is None else items)])
    return nearest_of_other_photos(choice, lambda: [features[:2], features[2:3], features[3:]]).tolist()


@pytest.mark.parametrize("search_rows", [1, 2, 100])
def test_the_exemplar_is_the_nearest_of_the_class_in_another_photo(
    search_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heldout, "SEARCH_ROWS", search_rows)
    features = np.array([[1, 0], [0.9, 0.1], [0, 1], [1, 0.02], [0.95, 0], [1, 0]], float)
    # row 0: x of photo a; of the other x, rows 2, 3 and 5, row 5 points the same way. Row 2: rows 0 and 5 are equal
    assert _nearest(features, "aabbcc", "xyxxyx") == [5, 4, 0, 0, 1, 0]
    assert _nearest(features, "aabbcc", "xyxxyx", items=[1, 2, 5]) == [4, 0, 0]


def test_a_far_box_of_the_class_goes_before_a_near_one_of_another() -> None:
    assert _nearest(np.array([[1, 0], [1, 0], [-1, 0]], float), "abc", "xyx") == [2, 0, 0]


def test_without_another_photo_of_the_class_the_nearest_of_any_stands_in_and_is_marked() -> None:
    rows = _bench(_relabelled(_boxes(photos=3, labels="a"), ["a", "lonely", "a"]))[0].to_pylist()
    assert [row["exemplar_same_class"] for row in rows] == [True, False, True]
    assert rows[1]["exemplar_image_id"] in ("photo0", "photo2")


def test_equal_features_take_the_first_whatever_the_last_bits() -> None:
    features = np.ones((4, 3)) * (1 + 1e-9 * np.arange(4))[:, None]
    assert _nearest(features, "abcd", "xxxx") == [1, 0, 0, 0]
    assert _nearest(np.zeros((2, 3)), "ab", "xx") == [1, 0]


def test_the_bench_is_a_function_of_its_seed_and_max_items_takes_a_part_of_it() -> None:
    bench, real_images = _bench(_boxes())
    again, real_images_again = _bench(_boxes(), shards=4)
    assert bench.equals(again) and real_images.equals(real_images_again)
    other = _bench(_boxes(), seed=2)[0]
    assert other.column("source").to_pylist() != bench.column("source").to_pylist()
    few = _bench(_boxes(), items=3)[0].to_pylist()
    whole = {row["bench_id"]: row for row in bench.to_pylist()}
    assert len(few) == 3 and all(whole[row["bench_id"]] == row for row in few)  # the same exemplars too


def test_boxes_in_another_order_than_the_photos_keep_their_pictures() -> None:
    boxes = _boxes()
    there = {row["bench_id"]: row["own"] for row in _bench(boxes)[0].to_pylist()}
    mixed = _bench(boxes.take([5, 0, 7, 2, 1, 6, 3, 4]))[0].to_pylist()
    assert {row["bench_id"]: row["own"] for row in mixed} == there


def test_a_shard_holds_two_photos_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """One is decoded while the last is still there; the photos of an OpenImages shard would take a gigabyte."""
    decode, photos, held = images.decode, [], []

    def watched(data: bytes, *, exif_orientation: int) -> np.ndarray:
        photo = decode(data, exif_orientation=exif_orientation)
        photos.append(weakref.ref(photo))
        held.append(sum(one() is not None for one in photos))
        return photo

    monkeypatch.setattr(images, "decode", watched)
    boxes = _boxes(photos=6)
    cut_shard(_photos(8), boxes, (), cfg=CUT, crops_per_box=1, features=_mean_colour, seed=1)
    assert len(held) == 6 and max(held) <= 2  # and none of the two photos without a box


def test_one_photo_has_no_bench() -> None:
    with pytest.raises(ValueError, match="at least two photos, for references; it has 1"):
        _bench(_boxes(photos=1))


def test_what_the_bench_lacks_is_refused_with_the_setting() -> None:
    bench = _bench(_boxes())[0]
    refuse_what_it_lacks(bench, holes=["box", "bezier"], references=["exemplar", "own", "foreign"])
    poor = bench.set_column(5, BENCH.field("bezier_hole_mask"), pa.nulls(bench.num_rows, pa.binary()))
    refuse_what_it_lacks(poor, holes=["box"], references=["exemplar"])
    with pytest.raises(BenchError, match=r"edit\.holes: bezier: this bench has none"):
        refuse_what_it_lacks(poor, holes=["box", "bezier"], references=["exemplar"])


def test_captions_are_asked_of_a_bench_that_has_enough_of_them() -> None:
    asked = partial(refuse_what_it_lacks, holes=["box"], references=["exemplar"], captions=["label", "caption"])
    boxes = _boxes(photos=4)
    place, field = BOXES.get_field_index("caption"), BOXES.field("caption")
    said = boxes.set_column(place, field, [[f"thing {number}" for number in range(boxes.num_rows)]])
    asked(_bench(said)[0])
    bare = with_optional(_bench(boxes)[0], BENCH)
    with pytest.raises(BenchError, match=r"edit\.captions: caption: 0 photos of this bench have one, .* box files"):
        asked(bare)
    refuse_what_it_lacks(bare, holes=["box"], references=["exemplar"], captions=["label"])
