"""The held-out bench: who is exemplar of whom, what is repeatable, and what a bench refuses."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest

from pbe.data import images
from pbe.data.boxes import Box
from pbe.data.masks import unpack_mask
from pbe.data.schema import BENCH, REAL_IMAGES, require
from pbe.data.settings import MaterializeConfig
from pbe.evaluate.bench.heldout import BenchBox, BenchError, make_bench, nearest_of_other_photos, refuse_what_it_lacks

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


def _boxes(photos: int = 4, labels: str = "ab") -> list[BenchBox]:
    """Two boxes a photo, labels in turn; each photo has noise of its own."""
    out = []
    for number in range(photos):
        pixels = np.random.default_rng(number).integers(0, 256, (80, 90, 3)).astype(np.uint8)
        for index, label in enumerate(labels):
            box = Box(10 + 20 * index, 20, 40 + 20 * index, 60)
            out.append(BenchBox(f"photo{number}", index, label, pixels, box))
    return out


def _mean_colour(pictures: Sequence[np.ndarray]) -> np.ndarray:
    return np.stack([picture.mean((0, 1)) for picture in pictures])


def _bench(boxes: list[BenchBox], *, crops: int = 1, items: int = 100, seed: int = 1) -> tuple[pa.Table, pa.Table]:
    return make_bench(boxes, cfg=CUT, crops_per_box=crops, max_items=items, features=_mean_colour, seed=seed)


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


def test_the_exemplar_is_the_nearest_of_the_class_in_another_photo() -> None:
    features = np.array([[1, 0], [0.9, 0.1], [0, 1], [1, 0.02], [0.95, 0], [1, 0]], float)
    photos, labels = list("aabbcc"), list("xyxxyx")
    # row 0: x of photo a; of the other x, rows 2, 3 and 5, row 5 points the same way. Row 2: rows 0 and 5 are equal
    assert nearest_of_other_photos(features, photos, labels) == [5, 4, 0, 0, 1, 0]


def test_without_another_photo_of_the_class_the_nearest_of_any_stands_in_and_is_marked() -> None:
    boxes = _boxes(photos=3, labels="a")
    boxes[1] = BenchBox("photo1", 0, "lonely", boxes[1].pixels, boxes[1].box)
    rows = _bench(boxes)[0].to_pylist()
    assert [row["exemplar_same_class"] for row in rows] == [True, False, True]
    assert rows[1]["exemplar_image_id"] in ("photo0", "photo2")


def test_equal_features_take_the_first_whatever_the_last_bits() -> None:
    features = np.ones((4, 3)) * (1 + 1e-9 * np.arange(4))[:, None]
    assert nearest_of_other_photos(features, list("abcd"), ["x"] * 4) == [1, 0, 0, 0]
    assert nearest_of_other_photos(np.zeros((2, 3)), ["a", "b"], ["x", "x"]) == [1, 0]


def test_the_bench_is_a_function_of_its_seed_and_max_items_takes_a_part_of_it() -> None:
    bench, real_images = _bench(_boxes())
    again, real_images_again = _bench(_boxes())
    assert bench.equals(again) and real_images.equals(real_images_again)
    other = _bench(_boxes(), seed=2)[0]
    assert other.column("source").to_pylist() != bench.column("source").to_pylist()
    few = _bench(_boxes(), items=3)[0].to_pylist()
    whole = {row["bench_id"]: row for row in bench.to_pylist()}
    assert len(few) == 3 and all(whole[row["bench_id"]] == row for row in few)  # the same exemplars too


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
