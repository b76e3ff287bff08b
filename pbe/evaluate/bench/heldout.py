"""The held-out bench: crops of a split with two holes and three references each, and untouched crops to compare with.

Every kept box of the split gives `crops_per_box` items, each with its own crop and holes (generator purpose "item",
never seen in training), and as many real crops. An item's references:

    exemplar  a box of the same class from another photo, the nearest by a network's features: what COCOEE has by hand
    own       the box itself, as in training: can the hidden object be restored?
    foreign   a random box of another photo: does the reference matter at all?

Source of the idea: the paper, section 4.1 (COCOEE, hand-picked pairs). Deviation: pairs are found, not picked, so that
any data set has a bench. Where no other photo has the class, the nearest box of any class stands in, and the row says
so.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pbe.data import images as image_codec
from pbe.data.boxes import Box, pixel_box
from pbe.data.masks import pack_mask
from pbe.data.rng import row_rng, shard_of
from pbe.data.schema import BENCH, REAL_IMAGES
from pbe.data.settings import MaterializeConfig
from pbe.data.triplets import cut, plan_triplet, reference_area
from pbe.errors import UserError

Features = Callable[[Sequence[np.ndarray]], np.ndarray]


class BenchError(UserError, ValueError):
    """The bench lacks what the settings request."""


@dataclass(frozen=True)
class BenchBox:
    """A kept box and its photo; `pixels` (H, W, 3) uint8 is shared between boxes of one photo."""

    image_id: str
    box_index: int
    label_name: str
    pixels: np.ndarray
    box: Box


def bench_boxes(images: pa.Table, boxes: pa.Table, *, split: str) -> list[BenchBox]:
    """Return the boxes of one shard that belong to `split`, in table order; each photo is decoded once."""
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
    boxes: Sequence[BenchBox],
    *,
    cfg: MaterializeConfig,
    crops_per_box: int,
    max_items: int,
    features: Features,
    seed: int,
) -> tuple[pa.Table, pa.Table]:
    """Return a BENCH and a REAL_IMAGES table. features: pictures (h, w, 3) uint8 to (N, d), for nearest neighbours.

    Exemplars come from all boxes of the split, even if `max_items` drops most of them as items. Raises ValueError for
    fewer than two photos (no reference from another one).
    """
    photos = {box.image_id for box in boxes}
    if len(photos) < 2:
        raise ValueError(f"the bench needs boxes of at least two photos, for references; it has {len(photos)}")
    references = [_reference(box, cfg) for box in boxes]
    exemplars = nearest_of_other_photos(
        features(references), [box.image_id for box in boxes], [box.label_name for box in boxes]
    )
    keys = [(index, crop) for index in range(len(boxes)) for crop in range(crops_per_box)]
    if len(keys) > max_items:
        keys.sort(key=lambda key: shard_of(f"{boxes[key[0]].image_id}#{boxes[key[0]].box_index}#{key[1]}", 2**61))
        keys = sorted(keys[:max_items])
    others = _boxes_of_other_photos(boxes)
    items: list[dict[str, Any]] = []
    real_images: list[dict[str, Any]] = []
    for index, crop in keys:
        box, name = boxes[index], f"{boxes[index].image_id}#{boxes[index].box_index}#{crop}"
        plan = plan_triplet(
            box.box, **_size(box.pixels), cfg=cfg, rng=row_rng(seed, box.image_id, box.box_index, crop, "item")
        )
        rng = row_rng(seed, box.image_id, box.box_index, crop, "bench")
        exemplar, foreign = exemplars[index], int(rng.choice(others[box.image_id]))
        items.append(
            {
                "bench_id": name,
                "image_id": box.image_id,
                "label_name": box.label_name,
                "source": image_codec.encode_png(cut(box.pixels, plan.window, cfg.image_px)),
                "box_hole_mask": pack_mask(plan.box_hole_mask),
                "bezier_hole_mask": pack_mask(plan.bezier_hole_mask),
                "exemplar": image_codec.encode_jpeg(references[exemplar], cfg.jpeg_quality),
                "exemplar_image_id": boxes[exemplar].image_id,
                "exemplar_same_class": boxes[exemplar].label_name == box.label_name,
                "own": image_codec.encode_jpeg(references[index], cfg.jpeg_quality),
                "foreign": image_codec.encode_jpeg(references[foreign], cfg.jpeg_quality),
            }
        )
        window = plan_triplet(
            box.box, **_size(box.pixels), cfg=cfg, rng=row_rng(seed, box.image_id, box.box_index, crop, "real")
        ).window
        real_images.append({"real_id": name, "picture": image_codec.encode_png(cut(box.pixels, window, cfg.image_px))})
    return pa.Table.from_pylist(items, schema=BENCH), pa.Table.from_pylist(real_images, schema=REAL_IMAGES)


def nearest_of_other_photos(features: np.ndarray, image_ids: Sequence[str], label_names: Sequence[str]) -> list[int]:
    """Return, for each row of features (N, d), the row of another photo with the largest cosine.

    Rows of the same label come first; of equal cosines the first row wins. Raises ValueError if all rows are of one
    photo.
    """
    if len(set(image_ids)) < 2:
        raise ValueError("all boxes are of one photo: there is no other to take a reference from")
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    directions = features / np.where(norms > 0, norms, 1.0)
    photos, labels = np.asarray(image_ids), np.asarray(label_names)
    out = []
    for row in range(len(features)):
        others = photos != photos[row]
        same = others & (labels == labels[row])
        candidates = np.flatnonzero(same if same.any() else others)
        # rounded: the last bits differ between machines and must not decide between equal boxes
        cosines = np.round(directions[candidates] @ directions[row], 5)
        out.append(int(candidates[int(np.argmax(cosines))]))
    return out


def refuse_what_it_lacks(bench: pa.Table, *, holes: Sequence[str], references: Sequence[str]) -> None:
    """Raise BenchError if the bench lacks a requested hole or reference."""
    columns = {f"{hole}_hole_mask": f"edit.holes: {hole}" for hole in holes}
    columns |= {kind: f"edit.references: {kind}" for kind in references}
    for column, setting in columns.items():
        if bench.column(column).null_count:
            raise BenchError(f"{setting}: this bench has none (COCOEE has box holes and exemplars); leave it out")


def _reference(box: BenchBox, cfg: MaterializeConfig) -> np.ndarray:
    return cut(box.pixels, reference_area(box.box, **_size(box.pixels), cfg=cfg), cfg.reference_px)


def _size(pixels: np.ndarray) -> dict[str, int]:
    return {"width_px": pixels.shape[1], "height_px": pixels.shape[0]}


def _boxes_of_other_photos(boxes: Sequence[BenchBox]) -> Mapping[str, list[int]]:
    return {
        image_id: [index for index, box in enumerate(boxes) if box.image_id != image_id]
        for image_id in {box.image_id for box in boxes}
    }
