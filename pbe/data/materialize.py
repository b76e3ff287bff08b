"""One bucket of photos and kept boxes to triplet tables, one table per slot."""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pbe.data import images as image_codec
from pbe.data.boxes import pixel_box
from pbe.data.masks import pack_mask
from pbe.data.rng import row_rng
from pbe.data.schema import REJECTS, TRIPLETS
from pbe.data.slots import slot_name
from pbe.data.triplets import CutConfig, box_order, cut_triplet


@dataclass(frozen=True)
class Jpeg:
    """How source and reference are stored."""

    quality: int
    chroma: image_codec.Chroma


def triplet_tables(
    images: pa.Table, boxes: pa.Table, *, cfg: CutConfig, slots: int, jpeg: Jpeg, seed: int
) -> tuple[dict[str, pa.Table], dict[str, int]]:
    """Triplets of the train split: tables {slot name: TRIPLETS, "rejects": REJECTS} and counts.

    Each photo is decoded once for all its slots. A photo without a kept box is rejected.
    """
    boxes_of: dict[str, list[dict[str, Any]]] = {}
    for box in boxes.to_pylist():
        boxes_of.setdefault(box["image_id"], []).append(box)
    rows: list[list[dict[str, Any]]] = [[] for _ in range(slots)]
    rejects = []
    train = [image for image in images.to_pylist() if image["split"] == "train"]
    for image in train:
        image_id = image["image_id"]
        mine = boxes_of.get(image_id)
        if not mine:
            rejects.append(
                {"stage": "materialize", "key": image_id, "reason": "image_without_kept_box", "detail": "see filter"}
            )
            continue
        pixels = image_codec.decode(image["bytes"], exif_orientation=image["exif_orientation"])
        order = box_order(len(mine), row_rng(seed, image_id, "boxes"))
        for slot in range(slots):
            box = mine[int(order[slot % len(mine)])]
            rows[slot].append(_row(pixels, box, slot, cfg=cfg, jpeg=jpeg, seed=seed))
    tables = {slot_name(slot): pa.Table.from_pylist(rows[slot], schema=TRIPLETS) for slot in range(slots)}
    tables["rejects"] = pa.Table.from_pylist(rejects, schema=REJECTS)
    counts = {
        "images_in": len(train),
        "images_kept": len(train) - len(rejects),
        "images_rejected": len(rejects),
        "triplets": sum(map(len, rows)),
    }
    return tables, counts


def _row(pixels: Any, box: dict[str, Any], slot: int, *, cfg: CutConfig, jpeg: Jpeg, seed: int) -> dict[str, Any]:
    height_px, width_px = pixels.shape[:2]
    tight = pixel_box(box["xmin"], box["xmax"], box["ymin"], box["ymax"], width_px=width_px, height_px=height_px)
    triplet = cut_triplet(pixels, tight, cfg=cfg, rng=row_rng(seed, box["image_id"], slot, "triplet"))
    x0, y0, x1, y1 = triplet.box_px
    return {
        "image_id": box["image_id"],
        "slot": slot,
        "box_index": box["box_index"],
        "label_name": box["label_name"],
        "source": image_codec.encode_jpeg(triplet.source, jpeg.quality, jpeg.chroma),
        "box_hole_mask": pack_mask(triplet.box_hole_mask),
        "bezier_hole_mask": pack_mask(triplet.bezier_hole_mask),
        "reference": image_codec.encode_jpeg(triplet.reference, jpeg.quality, jpeg.chroma),
        "box_x0_px": x0,
        "box_y0_px": y0,
        "box_x1_px": x1,
        "box_y1_px": y1,
    }
