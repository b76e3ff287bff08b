"""The filter: every rule drops what it says, the first broken rule is the reason, kept rows stay whole."""

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pbe.config import load_params
from pbe.data.duplicates import Nearest
from pbe.data.filter import RULES, FilterConfig, filter_boxes
from pbe.data.schema import BOXES, FLAGS, REJECTS, require

UPSTREAM = FilterConfig(min_area_frac=0.02, max_area_frac=0.8, exclude_images=())
SIZES = pa.table({"image_id": [f"image{n}" for n in range(300)], "width_px": [1000] * 300, "height_px": [500] * 300})


def _box(xmin: float, xmax: float, ymin: float, ymax: float, **more: Any) -> dict[str, Any]:
    unknown: dict[str, Any] = dict.fromkeys(FLAGS, -1)
    return {
        "image_id": "image0",
        "split": "train",
        "box_index": 0,
        "label": "/m/1",
        "label_name": "Cat",
        **unknown,
        "xmin": xmin,
        "xmax": xmax,
        "ymin": ymin,
        "ymax": ymax,
    } | more


def _table(*boxes: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist([box | {"box_index": n} for n, box in enumerate(boxes)], schema=BOXES)


def replace(cfg: FilterConfig, **changes: Any) -> FilterConfig:
    return cfg.model_copy(update=changes)


def _kept(rules: FilterConfig, *boxes: dict[str, Any]) -> list[int]:
    kept, rejects = filter_boxes(_table(*boxes), SIZES, rules)
    assert kept.num_rows + rejects.num_rows == len(boxes)
    return kept.column("box_index").to_pylist()


def test_the_default_is_upstreams_rule_and_its_seven_ids() -> None:
    rules = load_params().filter
    assert replace(rules, exclude_images=()) == UPSTREAM
    assert len(rules.exclude_images) == 7 and all(len(image_id) == 16 for image_id in rules.exclude_images)


@pytest.mark.parametrize(
    ("sides", "kept"),
    [
        ((0.25, 0.5), True),  # 0.125 exactly: the lower limit
        ((0.75, 1.0), True),  # 0.75 exactly: the upper limit
        ((np.nextafter(0.25, 0), 0.5), False),
        ((np.nextafter(0.75, 1), 1.0), False),
        ((0.5, 0.5), True),
        ((0.0001, 1.0), False),
        ((1.0, 1.0), False),
    ],
)
def test_area_limits_are_inclusive(sides: tuple[float, float], kept: bool) -> None:
    rules = replace(UPSTREAM, min_area_frac=0.125, max_area_frac=0.75)
    assert _kept(rules, _box(0, sides[0], 0, sides[1])) == ([0] if kept else [])


def test_kept_and_rejected_are_the_input_with_the_right_reasons() -> None:
    sides = np.random.default_rng(1).random((600, 2))
    table = _table(*(_box(0, w, 0, h, image_id=f"image{n // 3}") for n, (w, h) in enumerate(sides)))
    kept, rejects = filter_boxes(table, SIZES, replace(UPSTREAM, max_area_frac=0.5))
    require(kept, BOXES, "kept")
    require(rejects, REJECTS, "rejects")
    area = sides.prod(1)
    assert kept.equals(table.filter(pa.array((area >= 0.02) & (area <= 0.5))))  # rows untouched, in order
    dropped = np.flatnonzero((area < 0.02) | (area > 0.5))
    assert rejects.column("key").to_pylist() == [f"image{n // 3}#{n}" for n in dropped]
    expected = ["area_below_min" if area[n] < 0.02 else "area_above_max" for n in dropped]
    assert rejects.column("reason").to_pylist() == expected
    assert rejects.column("detail")[0].as_py() == f"{area[dropped[0]]:.4g}, allowed: area 0.02..0.5"


def test_pixels_and_aspect_are_those_of_the_photo_not_of_the_fractions() -> None:
    square, wide, tall = _box(0, 0.2, 0, 0.4), _box(0, 0.8, 0, 0.2), _box(0, 0.1, 0, 0.8)  # 200x200, 800x100, 100x400
    assert _kept(replace(UPSTREAM, min_side_px=200), square, wide, tall) == [0]
    assert _kept(replace(UPSTREAM, min_side_px=100), square, wide, tall) == [0, 1, 2]
    assert _kept(replace(UPSTREAM, max_aspect=4.0), square, wide, tall) == [0, 2]
    assert _kept(replace(UPSTREAM, max_aspect=1.0), square, wide, tall) == [0]


def test_classes_by_label_or_name_in_any_case() -> None:
    cat, dog = _box(0, 0.5, 0, 0.5), _box(0, 0.5, 0, 0.5, label="/m/2", label_name="Dog")
    for named in ("/m/2", "Dog", "dog"):
        assert _kept(replace(UPSTREAM, include_classes=(named,)), cat, dog) == [1]
        assert _kept(replace(UPSTREAM, exclude_classes=(named,)), cat, dog) == [0]
    assert _kept(replace(UPSTREAM, include_classes=("cat", "dog"), exclude_classes=("cat",)), cat, dog) == [1]


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_excludes_boxes_that_have_it_not_those_of_which_it_is_unknown(flag: str) -> None:
    boxes = [_box(0, 0.5, 0, 0.5, **{flag: value}) for value in (1, 0, -1)]
    assert _kept(replace(UPSTREAM, exclude_flags=(flag,)), *boxes) == [1, 2]
    other = next(name for name in FLAGS if name != flag)
    assert _kept(replace(UPSTREAM, exclude_flags=(other,)), *boxes) == [0, 1, 2]


def test_excluded_images() -> None:
    boxes = [_box(0, 0.5, 0, 0.5, image_id=f"image{n}") for n in range(3)]
    assert _kept(replace(UPSTREAM, exclude_images=("image1", "other")), *boxes) == [0, 2]


def test_of_near_duplicates_the_largest_stays_and_only_within_a_photo() -> None:
    large, near, nearer = _box(0.1, 0.6, 0.1, 0.6), _box(0.1, 0.59, 0.1, 0.6), _box(0.1, 0.6, 0.11, 0.6)
    apart, elsewhere = _box(0.5, 0.9, 0.5, 0.9), _box(0.1, 0.59, 0.1, 0.6, image_id="image1")
    boxes = [near, large, nearer, apart, elsewhere]
    assert _kept(replace(UPSTREAM, max_iou=0.9), *boxes) == [1, 3, 4]
    assert _kept(replace(UPSTREAM, max_iou=0.99), *boxes) == [0, 1, 2, 3, 4]
    assert _kept(replace(UPSTREAM, max_iou=0.9), large, large, large) == [0]  # equal ones: the first


def test_a_box_that_another_rule_drops_shadows_no_other() -> None:
    huge, inside = _box(0, 1, 0, 1), _box(0, 0.95, 0, 0.84)  # IoU 0.8, but the first is too large itself
    assert _kept(replace(UPSTREAM, max_iou=0.5), huge, inside) == [1]


def test_near_duplicates_against_a_plain_double_loop() -> None:
    rng = np.random.default_rng(3)
    boxes = []
    for n in range(400):
        x, y = np.sort(rng.random(2)), np.sort(rng.random(2))
        boxes.append(_box(x[0], x[1], y[0], y[1], image_id=f"image{n // 20}"))
    rules = replace(UPSTREAM, min_area_frac=0.0, max_area_frac=1.0, max_iou=0.3)

    def area(b: dict[str, Any]) -> float:
        return (b["xmax"] - b["xmin"]) * (b["ymax"] - b["ymin"])

    def iou(a: dict[str, Any], b: dict[str, Any]) -> float:
        w = min(a["xmax"], b["xmax"]) - max(a["xmin"], b["xmin"])
        h = min(a["ymax"], b["ymax"]) - max(a["ymin"], b["ymin"])
        both = max(w, 0) * max(h, 0)
        return both / (area(a) + area(b) - both)

    kept: list[int] = []
    for n in sorted(range(400), key=lambda n: -area(boxes[n])):
        same = [m for m in kept if boxes[m]["image_id"] == boxes[n]["image_id"]]
        if all(iou(boxes[n], boxes[m]) <= 0.3 for m in same):
            kept.append(n)
    assert _kept(rules, *boxes) == sorted(kept)
    assert 50 < len(kept) < 350


def test_the_first_broken_rule_is_the_reason() -> None:
    everything = _box(0, 0.01, 0, 0.9, is_group_of=1, image_id="image2")
    rules = replace(
        UPSTREAM,
        exclude_images=("image2",),
        exclude_classes=("Cat",),
        exclude_flags=("is_group_of",),
        min_side_px=50,
        max_aspect=2.0,
    )
    found = []
    copies = {"image2": Nearest(0.95, "elsewhere")}
    for change in (
        {},
        {"exclude_images": ()},
        {"max_heldout_similarity": None},
        {"exclude_classes": ()},
        {"exclude_flags": ()},
        {"min_area_frac": 0.0},
        {"min_side_px": 0},
    ):
        rules = replace(rules, **change)
        found += filter_boxes(_table(everything), SIZES, rules, nearest=copies)[1].column("reason").to_pylist()
    assert found == [
        "image_excluded", "image_like_heldout", "class_excluded", "flag_excluded", "area_below_min", "side_below_min",
        "aspect_above_max",
    ]  # fmt: skip
    assert Counter(found).keys() <= {rule.reason for rule in RULES}


def test_a_copy_of_a_held_out_photo_loses_all_its_boxes_and_names_it() -> None:
    boxes = _table(_box(0.1, 0.5, 0.1, 0.5), _box(0.2, 0.9, 0.2, 0.9), _box(0.1, 0.5, 0.1, 0.5, image_id="image2"))
    nearest = {"image0": Nearest(0.951, "held out"), "image2": Nearest(0.9, "held out")}
    kept, rejects = filter_boxes(boxes, SIZES, UPSTREAM, nearest=nearest)
    assert kept.column("image_id").to_pylist() == ["image2"]  # the limit itself is allowed
    assert {(row["reason"], row["detail"]) for row in rejects.to_pylist()} == {
        ("image_like_heldout", "0.951 with held out, allowed: 0.9 to a held-out photo")
    }
    assert filter_boxes(boxes, SIZES, replace(UPSTREAM, max_heldout_similarity=None), nearest=nearest)[0].num_rows == 3


def test_no_boxes() -> None:
    kept, rejects = filter_boxes(_table(), SIZES, replace(UPSTREAM, max_iou=0.5, exclude_flags=("is_inside",)))
    assert kept.num_rows == rejects.num_rows == 0
