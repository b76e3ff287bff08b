"""Turn one shard of photos and kept boxes into triplet tables, one table per slot."""

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pbe.data import images as image_codec
from pbe.data.boxes import Box, pixel_box
from pbe.data.masks import pack_mask
from pbe.data.object_masks import ObjectMask
from pbe.data.rng import row_rng
from pbe.data.schema import BOXES, ENDS, REJECTS, TRIPLETS, table_from_rows, with_optional
from pbe.data.settings import MaterializeConfig
from pbe.data.slots import slot_name
from pbe.data.triplets import (
    box_order,
    cut,
    plan_triplet,
    reference_area,
    segmentation_hole,
    without_background,
)

# one slot of one photo: its row without the two pictures, the areas that they are cut from, and the object's mask
_Planned = tuple[dict[str, Any], Box, Box, ObjectMask | None]
Masks = Mapping[tuple[str, int], bytes]  # of BOXES, by image id and box index
NO_MASKS: Masks = {}


def triplet_tables(
    images: pa.Table,
    boxes: pa.Table,
    *,
    cfg: MaterializeConfig,
    seed: int,
    masks: Masks = NO_MASKS,
    pairs: pa.Table | None = None,
) -> tuple[dict[str, pa.Table], dict[str, int]]:
    """Triplets of the train split: tables {slot name: TRIPLETS, "rejects": REJECTS} and counts.

    Each photo is decoded once for all its slots. A photo without a kept box is rejected. masks: of the boxes that have
    one. pairs: PAIRS, other pictures of boxes' objects.
    """
    boxes_of: dict[str, list[dict[str, Any]]] = {}
    columns = ["image_id", "box_index", "label_name", *ENDS, "caption"]
    for box in with_optional(boxes, BOXES).select(columns).to_pylist():
        boxes_of.setdefault(box["image_id"], []).append(box)
    # plan all photos before decoding any: each decoded photo pushes this code and its data out of the CPU caches
    planned: list[tuple[int, int, list[_Planned]]] = []
    rejects = []
    for index, image in enumerate(images.drop_columns(["bytes"]).to_pylist()):
        if image["split"] != "train":
            continue
        image_id = image["image_id"]
        if image_id in boxes_of:
            todo = _plan_photo(image, boxes_of[image_id], masks, cfg=cfg, seed=seed)
            planned.append((index, image["exif_orientation"], todo))
        else:
            reason = "image_without_kept_box"
            rejects.append({"stage": "materialize", "key": image_id, "reason": reason, "detail": "see filter"})

    other_views = {}
    if pairs is not None:
        trained = {todo[0][0]["image_id"] for _, _, todo in planned}
        other_views = pair_references(pairs, trained, cfg=cfg)
    rows: list[list[dict[str, Any]]] = [[] for _ in range(cfg.slots)]
    for index, exif_orientation, todo in planned:
        data = memoryview(images.column("bytes")[index].as_buffer())
        photo = image_codec.decode(data, exif_orientation=exif_orientation)
        for row, window, reference, mask in todo:
            source = cut(photo, window, cfg.image_px)
            row["source"] = image_codec.encode_jpeg(source, cfg.jpeg_quality, cfg.jpeg_chroma)
            clean = reference_of(photo, reference, mask, cfg)
            row["reference"] = image_codec.encode_jpeg(clean, cfg.jpeg_quality)  # small: "420" would blur its colours
            row["pair_reference"] = other_views.get((row["image_id"], row["box_index"]))
            rows[row["slot"]].append(row)
    tables = {slot_name(slot): table_from_rows(rows[slot], TRIPLETS) for slot in range(cfg.slots)}
    tables["rejects"] = pa.Table.from_pylist(rejects, schema=REJECTS)
    counts = {
        "images_in": len(planned) + len(rejects),
        "images_kept": len(planned),
        "images_rejected": len(rejects),
        "triplets": sum(map(len, rows)),
    }
    if other_views:
        counts["triplets_with_pair"] = sum(row["pair_reference"] is not None for slot in rows for row in slot)
    if masks:
        counts["triplets_with_mask"] = sum(mask is not None for *_, todo in planned for *_, mask in todo)
    return tables, counts


def pair_references(
    pairs: pa.Table, image_ids: Collection[str], *, cfg: MaterializeConfig
) -> dict[tuple[str, int], bytes]:
    """JPEGs (R, R) by image id and box index: the object in its pair's picture, cut as a reference of its own photo.

    pairs: PAIRS. image_ids: the photos whose pairs are wanted; no other picture is decoded.
    """
    wanted = pc.is_in(pairs.column("image_id"), pa.array(sorted(image_ids), pa.string()))
    out = {}
    for row in pairs.filter(wanted).to_pylist():
        picture = image_codec.decode(row["picture"], exif_orientation=row["exif_orientation"])
        size = {"width_px": row["width_px"], "height_px": row["height_px"]}
        area, mask = Box(0, 0, row["width_px"], row["height_px"]), None
        if row["mask"] is not None:
            mask = ObjectMask.unpacked(row["mask"])
            area = reference_area(mask.area, **size, cfg=cfg)
        reference = reference_of(picture, area, mask, cfg)
        out[row["image_id"], row["box_index"]] = image_codec.encode_jpeg(reference, cfg.jpeg_quality)
    return out


def reference_of(photo: np.ndarray, area: Box, mask: ObjectMask | None, cfg: MaterializeConfig) -> np.ndarray:
    """The (R, R, 3) reference that `area` of the photo becomes; without its background where the settings ask."""
    reference = cut(photo, area, cfg.reference_px)
    if mask is None or cfg.reference_background == "kept":
        return reference
    return without_background(reference, mask.cut(area, cfg.reference_px), cfg.reference_background)


def masks_of(boxes: pa.Table) -> Masks:
    """The masks of ingest's BOXES."""
    with_mask = boxes.filter(pc.is_valid(boxes.column("mask")))
    ids, numbers, masks = (with_mask.column(name).to_pylist() for name in ("image_id", "box_index", "mask"))
    return dict(zip(zip(ids, numbers, strict=True), masks, strict=True))


def _plan_photo(
    image: dict[str, Any], boxes: Sequence[dict[str, Any]], masks: Masks, *, cfg: MaterializeConfig, seed: int
) -> list[_Planned]:
    image_id = image["image_id"]
    size = {"width_px": image["width_px"], "height_px": image["height_px"]}
    order = box_order(len(boxes), row_rng(seed, image_id, "boxes"))
    objects: dict[int, ObjectMask] = {}  # unpacked once for all slots
    out = []
    for slot in range(cfg.slots):
        box = boxes[int(order[slot % len(boxes)])]
        tight = pixel_box(box["xmin"], box["xmax"], box["ymin"], box["ymax"], **size)
        plan = plan_triplet(tight, **size, cfg=cfg, rng=row_rng(seed, image_id, slot, "triplet"))
        x0, y0, x1, y1 = plan.box_px
        row = {
            "image_id": image_id,
            "slot": slot,
            "box_index": box["box_index"],
            "label_name": box["label_name"],
            "caption": box["caption"],
            "box_hole_mask": pack_mask(plan.box_hole_mask),
            "bezier_hole_mask": pack_mask(plan.bezier_hole_mask),
            "box_x0_px": x0,
            "box_y0_px": y0,
            "box_x1_px": x1,
            "box_y1_px": y1,
        }
        number = box["box_index"]
        mask = objects.get(number)
        if mask is None and (image_id, number) in masks:
            mask = objects[number] = ObjectMask.unpacked(masks[image_id, number])
        if mask is not None:
            rng = partial(row_rng, seed, image_id, slot, "segmentation")
            row["segmentation_hole_mask"] = pack_mask(segmentation_hole(mask, plan, cfg=cfg, rng=rng))
        out.append((row, plan.window, plan.reference, mask))
    return out
