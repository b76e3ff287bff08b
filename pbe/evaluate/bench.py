"""The bench: held-out triplets with an own and a foreign reference, and untouched crops to compare with.

Every kept box of the split gives `crops_per_box` items with a crop and a hole of their own (generator purpose
"bench", never seen in training) and as many "real" rows, crops without an edit. The foreign reference is a box
of another photo, chosen by the row's generator.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pbe.data import images as image_codec
from pbe.data.boxes import Box, pixel_box
from pbe.data.masks import HOLE_KINDS, pack_mask
from pbe.data.rng import bucket_of, row_rng
from pbe.data.schema import BENCH
from pbe.data.triplets import CutConfig, cut, plan_triplet, reference_area


@dataclass(frozen=True)
class BenchBox:
    """A kept box and the photo it lies in; `pixels` (H, W, 3) uint8 is shared between boxes of one photo."""

    image_id: str
    box_index: int
    label_name: str
    pixels: np.ndarray
    box: Box


def bench_boxes(images: pa.Table, boxes: pa.Table, *, split: str) -> list[BenchBox]:
    """The boxes of one bucket that belong to `split`, in table order; each photo is decoded once."""
    pixels_of: dict[str, np.ndarray] = {}
    wanted = {box["image_id"] for box in boxes.to_pylist() if box["split"] == split}
    for image in images.to_pylist():
        if image["image_id"] in wanted:
            pixels_of[image["image_id"]] = image_codec.decode(
                image["bytes"], exif_orientation=image["exif_orientation"]
            )
    out = []
    for box in boxes.to_pylist():
        if box["split"] == split:
            pixels = pixels_of[box["image_id"]]
            tight = pixel_box(box["xmin"], box["xmax"], box["ymin"], box["ymax"], **_size(pixels))
            out.append(BenchBox(box["image_id"], box["box_index"], box["label_name"], pixels, tight))
    return out


def make_bench(
    boxes: Sequence[BenchBox], *, cfg: CutConfig, crops_per_box: int, max_items: int, jpeg_quality: int, seed: int
) -> pa.Table:
    """A BENCH table: items and real rows. Raises ValueError with fewer than two photos (no foreign reference)."""
    photos = {box.image_id for box in boxes}
    if len(photos) < 2:
        raise ValueError(f"the bench needs boxes of at least two photos, for foreign references; it has {len(photos)}")
    keys = [(index, crop) for index in range(len(boxes)) for crop in range(crops_per_box)]
    if len(keys) > max_items:
        keys.sort(key=lambda key: bucket_of(f"{boxes[key[0]].image_id}#{boxes[key[0]].box_index}#{key[1]}", 2**61))
        keys = sorted(keys[:max_items])
    others = _boxes_of_other_photos(boxes)
    rows = []
    for index, crop in keys:
        box = boxes[index]
        rng = row_rng(seed, box.image_id, box.box_index, crop, "bench")
        foreign = boxes[int(rng.choice(others[box.image_id]))]
        kind = HOLE_KINDS[int(rng.integers(len(HOLE_KINDS)))]
        for role in ("item", "real"):
            rng = row_rng(seed, box.image_id, box.box_index, crop, role)
            plan = plan_triplet(box.box, **_size(box.pixels), cfg=cfg, rng=rng)
            hole_mask = plan.box_hole_mask if kind == "box" else plan.bezier_hole_mask
            rows.append(
                {
                    "bench_id": f"{box.image_id}#{box.box_index}#{crop}",
                    "role": role,
                    "image_id": box.image_id,
                    "label_name": box.label_name,
                    "source": image_codec.encode_png(cut(box.pixels, plan.window, cfg.image_px)),
                    "hole_mask": pack_mask(hole_mask),
                    "hole_kind": kind,
                    "own_reference": image_codec.encode_jpeg(_reference(box, cfg), jpeg_quality),
                    "foreign_reference": image_codec.encode_jpeg(_reference(foreign, cfg), jpeg_quality),
                    "foreign_image_id": foreign.image_id,
                }
            )
    return pa.Table.from_pylist(rows, schema=BENCH)


def _reference(box: BenchBox, cfg: CutConfig) -> np.ndarray:
    return cut(box.pixels, reference_area(box.box, **_size(box.pixels), cfg=cfg), cfg.reference_px)


def _size(pixels: np.ndarray) -> dict[str, int]:
    return {"width_px": pixels.shape[1], "height_px": pixels.shape[0]}


def _boxes_of_other_photos(boxes: Sequence[BenchBox]) -> Mapping[str, list[int]]:
    return {
        image_id: [index for index, box in enumerate(boxes) if box.image_id != image_id]
        for image_id in {box.image_id for box in boxes}
    }
