"""Settings and rules that decide which boxes become triplets.

Default: upstream's scripts/read_bbox.py, relative area in [0.02, 0.8], without the seven photos that
ldm/data/open-images.py excludes. To add a rule, add a setting to FilterConfig, a function and a line to RULES; the
stage, its counts and the report follow.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from pbe.data.boxes import area_frac
from pbe.data.duplicates import Nearest
from pbe.data.schema import ENDS, REJECTS, Flag
from pbe.settings import Float, Frac, Int, Settings

NO_PHOTO = Nearest(0.0, "")
NOTHING_HELD_OUT: Mapping[str, Nearest] = {}


class FilterConfig(Settings):
    """Limits are inclusive. Classes are given by label or name, case-insensitively; flags by their column."""

    min_area_frac: Frac
    max_area_frac: Frac
    min_side_px: Int = Field(
        0, ge=0, description="px, least shorter side of the box in the photo; 0: no limit, as upstream"
    )
    max_aspect: Annotated[Float, Field(ge=1)] | None = Field(
        None, description="greatest longer side / shorter side; null: no limit, as upstream"
    )
    include_classes: Annotated[tuple[str, ...], Field(min_length=1)] | None = Field(
        None, description="labels or names of the classes to keep; null: all, as upstream"
    )
    exclude_classes: tuple[str, ...] = Field(
        (), description="labels or names of the classes to drop; none, as upstream"
    )
    exclude_flags: tuple[Flag, ...] = Field(
        (),
        description="drops is_occluded, is_truncated, is_group_of, is_depiction or is_inside boxes; none, as upstream",
    )
    max_iou: Annotated[Float, Field(gt=0, le=1)] | None = Field(
        None, description="IoU of two boxes of a photo above which the smaller is dropped; null: no limit, as upstream"
    )
    max_heldout_similarity: Frac | None = Field(
        0.9,
        description="similarity of a training photo to a held-out one above which it is dropped as a copy; null: no "
        "limit, as upstream. Measured: pbe/data/duplicates.py. Ours",
    )
    exclude_images: tuple[str, ...] = Field(
        (
            "1af17f3d912e9aac",
            "1d5ef05c8da80e31",
            "3095084b358d3f2d",
            "3ad7415a11ac1f5e",
            "42a30d8f8fba8b40",
            "1366cde3b480a15c",
            "03a53ed6ab408b9f",
        ),
        description="ids of images to drop. Upstream: ldm/data/open-images.py",
    )

    @model_validator(mode="after")
    def _ordered(self) -> "FilterConfig":
        if self.min_area_frac >= self.max_area_frac:
            raise ValueError(f"min_area_frac {self.min_area_frac} must be below max_area_frac {self.max_area_frac}")
        return self


@dataclass(frozen=True)
class MeasuredBoxes:
    """N boxes of a BOXES table, measured for the rules. corners: xmin, xmax, ymin, ymax, fractions of the photo."""

    table: pa.Table
    corners: tuple[np.ndarray, ...]
    area_frac: np.ndarray  # (N,)
    width_px: np.ndarray  # (N,) in pixels of the photo, not rounded; height_px too
    height_px: np.ndarray
    heldout_similarity: np.ndarray  # (N,) of the photo to the nearest held-out one; 0 for held-out photos
    nearest_heldout: Sequence[str]  # (N) its id


class Broken(NamedTuple):
    """Result of one rule. value: the compared number, for the reject's detail; None: the detail gives the class."""

    rows: np.ndarray  # (N,) bool, True where the rule is broken
    allowed: str
    value: np.ndarray | None = None
    other: Sequence[str] | None = None  # (N) what the value compares the row with, for the detail


class Rule(NamedTuple):
    """One rule. broken: takes the boxes, the settings and a mask of the boxes that earlier rules left, (N,) bool."""

    reason: str  # of rejects and counts
    settings: tuple[str, ...]  # of FilterConfig; with all of them null, 0 or empty the rule is off
    broken: Callable[[MeasuredBoxes, FilterConfig, np.ndarray], Broken]

    def is_on(self, cfg: FilterConfig) -> bool:
        return any(getattr(cfg, name) for name in self.settings)


def image_excluded(boxes: MeasuredBoxes, cfg: FilterConfig, left: np.ndarray) -> Broken:
    return Broken(_is_among(boxes.table, ["image_id"], cfg.exclude_images), "filter.exclude_images")


def image_like_heldout(boxes: MeasuredBoxes, cfg: FilterConfig, left: np.ndarray) -> Broken:
    limit = 1.0 if cfg.max_heldout_similarity is None else cfg.max_heldout_similarity
    similarity = boxes.heldout_similarity
    return Broken(similarity > limit, f"{limit} to a held-out photo", similarity, boxes.nearest_heldout)


def class_excluded(boxes: MeasuredBoxes, cfg: FilterConfig, left: np.ndarray) -> Broken:
    rows = _is_among(boxes.table, ["label", "label_name"], cfg.exclude_classes)
    if cfg.include_classes is not None:
        rows |= ~_is_among(boxes.table, ["label", "label_name"], cfg.include_classes)
    return Broken(rows, "filter.include_classes, exclude_classes")


def flag_excluded(boxes: MeasuredBoxes, cfg: FilterConfig, left: np.ndarray) -> Broken:
    rows = np.zeros(boxes.table.num_rows, bool)
    for flag in cfg.exclude_flags:
        rows |= boxes.table.column(flag).to_numpy() == 1
    return Broken(rows, f"without {', '.join(cfg.exclude_flags)}")


def area_below_min(boxes: MeasuredBoxes, cfg: FilterConfig, left: np.ndarray) -> Broken:
    allowed = f"area {cfg.min_area_frac}..{cfg.max_area_frac}"
    return Broken(boxes.area_frac < cfg.min_area_frac, allowed, boxes.area_frac)


def area_above_max(boxes: MeasuredBoxes, cfg: FilterConfig, left: np.ndarray) -> Broken:
    allowed = f"area {cfg.min_area_frac}..{cfg.max_area_frac}"
    return Broken(boxes.area_frac > cfg.max_area_frac, allowed, boxes.area_frac)


def side_below_min(boxes: MeasuredBoxes, cfg: FilterConfig, left: np.ndarray) -> Broken:
    shorter_px = np.minimum(boxes.width_px, boxes.height_px)
    return Broken(shorter_px < cfg.min_side_px, f"shorter side from {cfg.min_side_px} px", shorter_px)


def aspect_above_max(boxes: MeasuredBoxes, cfg: FilterConfig, left: np.ndarray) -> Broken:
    longer_px, shorter_px = np.maximum(boxes.width_px, boxes.height_px), np.minimum(boxes.width_px, boxes.height_px)
    rows = longer_px > (cfg.max_aspect or np.inf) * shorter_px
    return Broken(rows, f"longer / shorter side up to {cfg.max_aspect}", longer_px / shorter_px)


def near_duplicate(boxes: MeasuredBoxes, cfg: FilterConfig, left: np.ndarray) -> Broken:
    max_iou = cfg.max_iou or 1.0
    overlap = _largest_overlap(boxes, left, max_iou)
    return Broken(overlap > max_iou, f"IoU up to {max_iou} with a larger box", overlap)


# A box is dropped by the first rule that it breaks.
RULES = (
    Rule("image_excluded", ("exclude_images",), image_excluded),
    Rule("image_like_heldout", ("max_heldout_similarity",), image_like_heldout),
    Rule("class_excluded", ("include_classes", "exclude_classes"), class_excluded),
    Rule("flag_excluded", ("exclude_flags",), flag_excluded),
    Rule("area_below_min", ("min_area_frac",), area_below_min),
    Rule("area_above_max", ("max_area_frac",), area_above_max),
    Rule("side_below_min", ("min_side_px",), side_below_min),
    Rule("aspect_above_max", ("max_aspect",), aspect_above_max),
    Rule("near_duplicate", ("max_iou",), near_duplicate),
)


def filter_boxes(
    boxes: pa.Table, sizes: pa.Table, cfg: FilterConfig, *, nearest: Mapping[str, Nearest] = NOTHING_HELD_OUT
) -> tuple[pa.Table, pa.Table]:
    """Split a BOXES table into kept boxes and REJECTS, both in the order given.

    sizes: image_id, width_px and height_px of every image that a box names. nearest: of training photos by image id.
    Raises ValueError if an image is missing in sizes.
    """
    measured = _measured(boxes, sizes, nearest)
    left = np.ones(boxes.num_rows, bool)
    rejects: dict[int, dict[str, str]] = {}
    for rule in RULES:
        if not rule.is_on(cfg):
            continue
        broken = rule.broken(measured, cfg, left)
        rows = np.flatnonzero(left & broken.rows)
        left[rows] = False
        keys = boxes.select(["image_id", "box_index", "label_name"]).take(rows).to_pylist()
        for row, key in zip(rows, keys, strict=True):
            given = key["label_name"] if broken.value is None else f"{broken.value[row]:.4g}"
            given += f" with {broken.other[int(row)]}" if broken.other is not None else ""
            rejects[int(row)] = {
                "stage": "filter",
                "key": f"{key['image_id']}#{key['box_index']}",
                "reason": rule.reason,
                "detail": f"{given}, allowed: {broken.allowed}",
            }
    ordered = [rejects[row] for row in sorted(rejects)]
    return boxes.filter(pa.array(left)), pa.Table.from_pylist(ordered, schema=REJECTS)


def _measured(boxes: pa.Table, sizes: pa.Table, nearest: Mapping[str, Nearest]) -> MeasuredBoxes:
    place = pc.index_in(boxes.column("image_id"), sizes.column("image_id").combine_chunks())
    if place.null_count:
        raise ValueError("a box names an image that is not among the images of its part")
    photo_width_px, photo_height_px = (sizes.column(name).take(place).to_numpy() for name in ("width_px", "height_px"))
    xmin, xmax, ymin, ymax = corners = tuple(boxes.column(name).to_numpy() for name in ENDS)
    found = [nearest.get(image_id, NO_PHOTO) for image_id in boxes.column("image_id").to_pylist()]
    return MeasuredBoxes(
        table=boxes,
        heldout_similarity=np.array([photo.similarity for photo in found], np.float64),
        nearest_heldout=[photo.image_id for photo in found],
        corners=corners,
        area_frac=area_frac(*corners),
        width_px=(xmax - xmin) * photo_width_px,
        height_px=(ymax - ymin) * photo_height_px,
    )


def _is_among(boxes: pa.Table, columns: Collection[str], values: Collection[str]) -> np.ndarray:
    """True where one of the text columns is among `values`, in any case."""
    wanted = pa.array(sorted({value.lower() for value in values}), pa.string())
    found = np.zeros(boxes.num_rows, bool)
    for name in columns:
        found |= pc.is_in(pc.utf8_lower(boxes.column(name)), wanted).to_numpy()
    return found


def _largest_overlap(boxes: MeasuredBoxes, left: np.ndarray, max_iou: float) -> np.ndarray:
    """(N,) largest IoU of each box with a larger kept box of its photo; 0 without one.

    Greedy from the largest down, ties in file order, so that one of three near-equal boxes is kept.
    """
    area = boxes.area_frac
    out = np.zeros(len(area))
    ids = pc.dictionary_encode(boxes.table.column("image_id").combine_chunks()).indices.to_numpy()
    rows = np.flatnonzero(left)
    order = rows[np.lexsort((rows, -area[rows], ids[rows]))]
    starts = np.flatnonzero(np.diff(ids[order], prepend=-1))
    for group in np.split(order, starts[1:]) if len(order) else []:
        kept: list[int] = []
        for row in group:
            if kept:
                out[row] = _iou(boxes, row, np.array(kept)).max()
            if out[row] <= max_iou:
                kept.append(row)
    return out


def _iou(boxes: MeasuredBoxes, row: int, others: np.ndarray) -> np.ndarray:
    xmin, xmax, ymin, ymax = boxes.corners
    width = np.minimum(xmax[row], xmax[others]) - np.maximum(xmin[row], xmin[others])
    height = np.minimum(ymax[row], ymax[others]) - np.maximum(ymin[row], ymin[others])
    both = np.clip(width, 0, None) * np.clip(height, 0, None)
    return both / (boxes.area_frac[row] + boxes.area_frac[others] - both)
