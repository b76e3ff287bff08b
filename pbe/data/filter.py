"""Which boxes become triplets. Default: upstream's scripts/read_bbox.py, relative area in [0.02, 0.8], nothing else.

Every other rule is off by default. A box is dropped by the first rule that it breaks, in the order of FILTER_REASONS.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pbe.data.boxes import area_frac
from pbe.data.schema import FILTER_REASONS, REJECTS


@dataclass(frozen=True)
class FilterRules:
    """Limits are inclusive. Classes are named by label or by name, in any case; flags by their column."""

    min_area_frac: float
    max_area_frac: float
    min_side_px: int
    max_aspect: float | None
    include_classes: Collection[str] | None
    exclude_classes: Collection[str]
    exclude_flags: Collection[str]
    max_iou: float | None
    exclude_images: Collection[str]


def filter_boxes(boxes: pa.Table, sizes: pa.Table, rules: FilterRules) -> tuple[pa.Table, pa.Table]:
    """Split a BOXES table into kept boxes and REJECTS, both in the order given.

    sizes: image_id, width_px and height_px of every image that a box names.
    """
    corners = [boxes.column(name).to_numpy() for name in ("xmin", "xmax", "ymin", "ymax")]
    width_px, height_px = _sides_px(boxes, sizes, *corners)
    area = area_frac(*corners)
    short, long = np.minimum(width_px, height_px), np.maximum(width_px, height_px)
    broken: dict[str, tuple[np.ndarray, np.ndarray | None, str]] = {
        # reason: (which boxes, the number that broke the rule, what is allowed)
        "image_excluded": (_among(boxes, ["image_id"], rules.exclude_images), None, "filter.exclude_images"),
        "class_excluded": (_class_broken(boxes, rules), None, "filter.include_classes, exclude_classes"),
        "flag_excluded": (_flag_broken(boxes, rules), None, f"without {', '.join(rules.exclude_flags)}"),
        "area_below_min": (area < rules.min_area_frac, area, f"area {rules.min_area_frac}..{rules.max_area_frac}"),
        "area_above_max": (area > rules.max_area_frac, area, f"area {rules.min_area_frac}..{rules.max_area_frac}"),
        "side_below_min": (short < rules.min_side_px, short, f"shorter side from {rules.min_side_px} px"),
        "aspect_above_max": (
            long > (rules.max_aspect or np.inf) * short,
            long / short,
            f"longer / shorter side up to {rules.max_aspect}",
        ),
    }
    reason = np.full(boxes.num_rows, -1)
    for number, name in reversed(list(enumerate(FILTER_REASONS))):
        if name in broken:
            reason[broken[name][0]] = number
    if rules.max_iou is not None:
        overlap = _largest_overlap(boxes, corners, area, reason < 0, rules.max_iou)
        broken["near_duplicate"] = (overlap > rules.max_iou, overlap, f"IoU up to {rules.max_iou} with a larger box")
        reason[overlap > rules.max_iou] = FILTER_REASONS.index("near_duplicate")
    dropped = np.flatnonzero(reason >= 0)
    keys = boxes.select(["image_id", "box_index", "label_name"]).take(dropped).to_pylist()
    rejects = []
    for row, key in zip(dropped, keys, strict=True):
        name = FILTER_REASONS[reason[row]]
        _, values, allowed = broken[name]
        given = f"{values[row]:.4g}" if values is not None else key["label_name"]
        rejects.append(
            {
                "stage": "filter",
                "key": f"{key['image_id']}#{key['box_index']}",
                "reason": name,
                "detail": f"{given}, allowed: {allowed}",
            }
        )
    return boxes.filter(pa.array(reason < 0)), pa.Table.from_pylist(rejects, schema=REJECTS)


def _sides_px(boxes: pa.Table, sizes: pa.Table, *corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Width and height of each box in pixels of its photo, not rounded."""
    place = pc.index_in(boxes.column("image_id"), sizes.column("image_id").combine_chunks())
    if place.null_count:
        raise ValueError("a box names an image that is not in its bucket's images")
    width_px, height_px = (sizes.column(name).take(place).to_numpy() for name in ("width_px", "height_px"))
    xmin, xmax, ymin, ymax = corners
    return (xmax - xmin) * width_px, (ymax - ymin) * height_px


def _among(boxes: pa.Table, columns: Collection[str], values: Collection[str]) -> np.ndarray:
    """True where one of the text columns is among `values`, in any case."""
    wanted = pa.array(sorted({value.lower() for value in values}), pa.string())
    found = np.zeros(boxes.num_rows, bool)
    for name in columns:
        found |= pc.is_in(pc.utf8_lower(boxes.column(name)), wanted).to_numpy()
    return found


def _class_broken(boxes: pa.Table, rules: FilterRules) -> np.ndarray:
    broken = _among(boxes, ["label", "label_name"], rules.exclude_classes)
    if rules.include_classes is not None:
        broken |= ~_among(boxes, ["label", "label_name"], rules.include_classes)
    return broken


def _flag_broken(boxes: pa.Table, rules: FilterRules) -> np.ndarray:
    broken = np.zeros(boxes.num_rows, bool)
    for flag in rules.exclude_flags:
        broken |= boxes.column(flag).to_numpy() == 1
    return broken


def _largest_overlap(
    boxes: pa.Table, corners: list[np.ndarray], area: np.ndarray, alive: np.ndarray, max_iou: float
) -> np.ndarray:
    """(N,) largest IoU of each box with a larger one of its photo that stays; 0 for boxes that stay without one.

    Greedy from the largest down, ties in file order, so that of three near-equal boxes one is left.
    """
    out = np.zeros(boxes.num_rows)
    ids = pc.dictionary_encode(boxes.column("image_id").combine_chunks()).indices.to_numpy()
    rows = np.flatnonzero(alive)
    order = rows[np.lexsort((rows, -area[rows], ids[rows]))]
    starts = np.flatnonzero(np.diff(ids[order], prepend=-1))
    for group in np.split(order, starts[1:]) if len(order) else []:
        kept: list[int] = []
        for row in group:
            if kept:
                out[row] = _iou(corners, area, row, np.array(kept)).max()
            if out[row] <= max_iou:
                kept.append(row)
    return out


def _iou(corners: list[np.ndarray], area: np.ndarray, row: int, others: np.ndarray) -> np.ndarray:
    xmin, xmax, ymin, ymax = corners
    width = np.minimum(xmax[row], xmax[others]) - np.maximum(xmin[row], xmin[others])
    height = np.minimum(ymax[row], ymax[others]) - np.maximum(ymin[row], ymin[others])
    both = np.clip(width, 0, None) * np.clip(height, 0, None)
    return both / (area[row] + area[others] - both)
