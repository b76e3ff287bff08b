"""The held-out bench: crops of a split with two holes and three references each, and untouched crops to compare with.

Every kept box of the split gives `crops_per_box` items, each with its own crop and holes (generator purpose "item",
never seen in training), and as many real crops. An item's references:

    exemplar  a box of the same class from another photo, the nearest by a network's features: what COCOEE has by hand
    own       the box itself, as in training: can the hidden object be restored?
    foreign   a random box of another photo: does the reference matter at all?

It is made in three steps. None holds more than the items, or one shard, or one decoded photo:

    choose        the items, from the boxes among which references are found too (candidates); reads no photo
    cut_shard     one shard, decoding each photo once: its items' crops, its candidates' references and features
    bench_table   the items, with the references that `nearest_of_other_photos` and `foreign_boxes` find

Source of the idea: the paper, section 4.1 (COCOEE, hand-picked pairs). Deviation: pairs are found, not picked, so that
any data set has a bench. Where no other photo has the class, the nearest box of any class stands in, and the row says
so.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pbe.data import images as image_codec
from pbe.data.boxes import Box, pixel_box
from pbe.data.masks import pack_mask
from pbe.data.materialize import NO_MASKS, Masks, pair_references, reference_of
from pbe.data.object_masks import ObjectMask
from pbe.data.rng import row_rng, shard_of
from pbe.data.schema import (
    BENCH,
    BENCH_CANDIDATES,
    BENCH_ITEMS,
    REAL_IMAGES,
    CaptionForm,
    is_optional,
    table_from_rows,
    with_optional,
    without_empty,
)
from pbe.data.settings import MaterializeConfig
from pbe.data.triplets import (
    cut,
    plan_triplet,
    reference_area,
    segmentation_hole,
)
from pbe.errors import UserError
from pbe.evaluate.metrics.intervals import MIN_GROUPS

Features = Callable[[Iterable[np.ndarray]], np.ndarray]
KEYS = ["image_id", "box_index", "label_name"]
SEARCH_ROWS = 1024  # candidates compared with all items at once
SAME_CLASS = 4.0  # added to a cosine, so that any box of the class goes before all others


class BenchError(UserError, ValueError):
    """The bench lacks what the settings request."""


@dataclass(frozen=True)
class Choice:
    """The bench before any photo is read. boxes: the candidates, N rows with the columns KEYS, of whole shards in
    their order. items: of each item the row of its box and the number of its crop, in that order."""

    boxes: pa.Table
    items: Sequence[tuple[int, int]]

    @property
    def rows(self) -> np.ndarray:
        """(M,) row of each item's box."""
        return np.array([row for row, _ in self.items], np.int64)

    @cached_property
    def names(self) -> list[str]:
        """Bench ids of the items."""
        ids, numbers = (self.boxes.column(key).to_pylist() for key in ("image_id", "box_index"))
        return [bench_id(ids[row], numbers[row], crop) for row, crop in self.items]

    @cached_property
    def photos(self) -> np.ndarray:
        """(N,) number of each box's photo."""
        return _numbered(self.boxes.column("image_id"))

    @cached_property
    def labels(self) -> np.ndarray:
        """(N,) number of each box's class."""
        return _numbered(self.boxes.column("label_name"))


def bench_id(image_id: str, box_index: int, crop: int) -> str:
    return f"{image_id}#{box_index}#{crop}"


def boxes_of_split(boxes: pa.Table, split: str) -> pa.Table:
    """The rows of BOXES that belong to `split`, in table order."""
    return boxes.filter(pc.equal(boxes.column("split"), split))


def choose(boxes: pa.Table, *, crops_per_box: int, max_items: int) -> Choice:
    """Choose at most `max_items` items, those whose ids have the smallest hashes. boxes: the columns KEYS.

    Raises ValueError for fewer than two photos (no reference from another one).
    """
    photos = len(boxes.column("image_id").unique())
    if photos < 2:
        raise ValueError(f"the bench needs boxes of at least two photos, for references; it has {photos}")
    everything = Choice(boxes, [(row, crop) for row in range(boxes.num_rows) for crop in range(crops_per_box)])
    if len(everything.items) <= max_items:
        return everything
    hashes = [shard_of(name, 2**61) for name in everything.names]
    chosen = sorted(sorted(range(len(hashes)), key=hashes.__getitem__)[:max_items])
    return Choice(boxes, [everything.items[index] for index in chosen])


def cut_shard(
    images: pa.Table,
    boxes: pa.Table,
    names: Collection[str],
    *,
    cfg: MaterializeConfig,
    crops_per_box: int,
    features: Features,
    seed: int,
    masks: Masks = NO_MASKS,
    pairs: pa.Table | None = None,
) -> dict[str, pa.Table]:
    """Tables {"items": BENCH_ITEMS, "real": REAL_IMAGES, "candidates": BENCH_CANDIDATES} of one shard.

    images: its photos, with the columns image_id, bytes and exif_orientation of IMAGES. boxes: rows of BOXES; all are
    candidates. names: the bench ids of items. features: maps pictures (h, w, 3) uint8, which it takes one by one, to
    (N, d) in their order; one photo is decoded at a time.
    """
    rows = boxes.to_pylist()
    rows_of: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        rows_of.setdefault(row["image_id"], []).append(number)
    order: list[int] = []
    jpegs: dict[int, bytes] = {}
    object_masks: dict[int, bytes] = {}
    items: dict[int, list[dict[str, Any]]] = {}

    def references() -> Iterator[np.ndarray]:
        for image_id, photo in _decoded(images, rows_of):
            for number in rows_of[image_id]:
                row = rows[number]
                box = pixel_box(row["xmin"], row["xmax"], row["ymin"], row["ymax"], **_size(photo))
                crops = [crop for crop in range(crops_per_box) if bench_id(image_id, row["box_index"], crop) in names]
                counts = masks.get((image_id, row["box_index"]))
                mask = ObjectMask.unpacked(counts) if counts is not None else None
                items[number] = [_item(photo, box, mask, row, crop, cfg=cfg, seed=seed) for crop in crops]
                area = reference_area(box, **_size(photo), cfg=cfg)
                reference = reference_of(photo, area, mask, cfg)
                if mask is not None:
                    object_masks[number] = pack_mask(mask.cut(area, cfg.reference_px))
                jpegs[number] = image_codec.encode_jpeg(reference, cfg.jpeg_quality)
                order.append(number)
                yield reference

    other_views = pair_references(pairs, rows_of, cfg=cfg) if pairs is not None else {}
    vectors = dict(zip(order, features(references()).astype("<f4"), strict=True))
    numbers = range(len(rows))
    candidates = [
        {
            "reference": jpegs[number],
            "vector": vectors[number].tobytes(),
            "object_mask": object_masks.get(number),
            "caption": row.get("caption"),
        }
        for number, row in enumerate(rows)
    ]
    views = [other_views.get((row["image_id"], row["box_index"])) for row in rows]
    found = [item | {"pair": views[number]} for number in numbers for item in items[number]]
    real = [{"real_id": item["bench_id"], "picture": item["real"]} for item in found]
    return {
        "items": table_from_rows(found, BENCH_ITEMS),
        "real": table_from_rows(real, REAL_IMAGES),
        "candidates": table_from_rows(candidates, BENCH_CANDIDATES),
    }


def _decoded(images: pa.Table, wanted: Collection[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Decode the wanted photos one by one."""
    ids, orientations = (images.column(name).to_pylist() for name in ("image_id", "exif_orientation"))
    for index, image_id in enumerate(ids):
        if image_id in wanted:
            data = memoryview(images.column("bytes")[index].as_buffer())
            yield image_id, image_codec.decode(data, exif_orientation=orientations[index])


def _item(
    photo: np.ndarray,
    box: Box,
    mask: ObjectMask | None,
    row: dict[str, Any],
    crop: int,
    *,
    cfg: MaterializeConfig,
    seed: int,
) -> dict[str, Any]:
    """A row of BENCH_ITEMS, and its real crop."""
    identity = row["image_id"], row["box_index"], crop
    plan = plan_triplet(box, **_size(photo), cfg=cfg, rng=row_rng(seed, *identity, "item"))
    real = plan_triplet(box, **_size(photo), cfg=cfg, rng=row_rng(seed, *identity, "real"))
    segmentation = None
    if mask is not None:
        rng = partial(row_rng, seed, *identity, "segmentation")
        segmentation = pack_mask(segmentation_hole(mask, plan, cfg=cfg, rng=rng))
    return {
        "bench_id": bench_id(*identity),
        "image_id": row["image_id"],
        "label_name": row["label_name"],
        "source": image_codec.encode_png(cut(photo, plan.window, cfg.image_px)),
        "box_hole_mask": pack_mask(plan.box_hole_mask),
        "bezier_hole_mask": pack_mask(plan.bezier_hole_mask),
        "segmentation_hole_mask": segmentation,
        "real": image_codec.encode_png(cut(photo, real.window, cfg.image_px)),
    }


def nearest_of_other_photos(choice: Choice, blocks: Callable[[], Iterable[np.ndarray]]) -> np.ndarray:
    """Return (M,), for each item the candidate of another photo whose features have the largest cosine with its own.

    blocks: yields the features (n, d) of all candidates in their order, some rows at a time; it is called twice, and no
    more than a block is held beside the items' features. Boxes of the item's class come first; of equal cosines the
    first row wins.
    """
    boxes, box_of_item = np.unique(choice.rows, return_inverse=True)  # the crops of a box have one exemplar
    own = np.concatenate([directions[np.isin(rows, boxes)] for rows, directions in _pieces(blocks)])
    best, found = np.full(len(boxes), -np.inf), np.full(len(boxes), -1)
    for rows, directions in _pieces(blocks):
        # rounded: the last bits differ between machines and must not decide between equal boxes
        scores = np.round(own @ directions.T, 5)
        scores[choice.labels[boxes, None] == choice.labels[rows]] += SAME_CLASS
        scores[choice.photos[boxes, None] == choice.photos[rows]] = -np.inf
        first = scores.argmax(axis=1)
        top = scores[np.arange(len(boxes)), first]
        better = top > best
        found[better], best[better] = rows[first[better]], top[better]
    return found[box_of_item]


def _pieces(blocks: Callable[[], Iterable[np.ndarray]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield row numbers (n,) and directions (n, d) float64 of at most SEARCH_ROWS candidates at a time."""
    row = 0
    for block in blocks():
        for start in range(0, len(block), SEARCH_ROWS):
            piece = block[start : start + SEARCH_ROWS].astype(np.float64)
            norms = np.linalg.norm(piece, axis=1, keepdims=True)
            yield np.arange(row, row + len(piece)), piece / np.where(norms > 0, norms, 1.0)
            row += len(piece)


def foreign_boxes(choice: Choice, seed: int) -> np.ndarray:
    """Return (M,), for each item a random candidate of another photo."""
    ids, numbers = (choice.boxes.column(key).to_pylist() for key in ("image_id", "box_index"))
    out = []
    for row, crop in choice.items:
        others = np.flatnonzero(choice.photos != choice.photos[row])
        out.append(others[row_rng(seed, ids[row], numbers[row], crop, "bench").integers(len(others))])
    return np.array(out, np.int64)


def bench_table(
    choice: Choice,
    items: pa.Table,
    *,
    exemplars: np.ndarray,
    foreign: np.ndarray,
    references: Callable[[np.ndarray], pa.Table],
) -> pa.Table:
    """Return a BENCH table. items: rows of BENCH_ITEMS, one for each item, in the order of `choice`.

    exemplars, foreign: (M,) rows of candidates. references: reference, object_mask and caption of candidates, by
    ascending rows without repeats.
    """
    if items.column("bench_id").to_pylist() != choice.names:
        raise ValueError("the shards' items are not those that were chosen")
    rows_of = {"exemplar": exemplars, "own": choice.rows, "foreign": foreign}
    needed = np.unique(np.concatenate([*rows_of.values()]))
    found = references(needed)
    items = with_optional(items, BENCH_ITEMS)
    columns = {name: items.column(name) for name in BENCH_ITEMS.names}
    for name, rows in rows_of.items():
        places = pa.array(np.searchsorted(needed, rows))
        columns[name] = found.column("reference").take(places)
        columns[f"{name}_object_mask"] = found.column("object_mask").take(places)
        if name == "exemplar":
            columns["exemplar_caption"] = found.column("caption").take(places)
    columns["exemplar_image_id"] = choice.boxes.column("image_id").take(pa.array(exemplars))
    columns["exemplar_same_class"] = pa.array(choice.labels[exemplars] == choice.labels[choice.rows])
    return without_empty(pa.Table.from_arrays([columns[name] for name in BENCH.names], schema=BENCH))


def refuse_what_it_lacks(
    bench: pa.Table, *, holes: Sequence[str], references: Sequence[str], captions: Sequence[CaptionForm] = ()
) -> None:
    """Raise BenchError if the bench lacks a requested hole, reference or caption. Of optional ones a few items must
    have it."""
    columns = {f"{hole}_hole_mask": f"edit.holes: {hole}" for hole in holes}
    columns |= {kind: f"edit.references: {kind}" for kind in references}
    if "caption" in captions:
        columns["exemplar_caption"] = "edit.captions: caption"
    for column, setting in columns.items():
        if not is_optional(BENCH.field(column)):
            if bench.column(column).null_count:
                raise BenchError(f"{setting}: this bench has none (COCOEE has box holes and exemplars); leave it out")
            continue
        photos = len(bench.filter(pc.is_valid(bench.column(column))).column("image_id").unique())
        if photos < MIN_GROUPS:
            raise BenchError(
                f"{setting}: {photos} photos of this bench have one, an interval needs {MIN_GROUPS}; leave it out, or "
                "let more photos have it (ingest.masks, ingest.source: pairs, captions in the box files)"
            )


def _size(photo: np.ndarray) -> dict[str, int]:
    return {"width_px": photo.shape[1], "height_px": photo.shape[0]}


def _numbered(names: pa.ChunkedArray) -> np.ndarray:
    return np.unique(names.to_numpy(), return_inverse=True)[1]
