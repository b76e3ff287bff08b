"""Pictures to extract features from, of the bench, edits and real images. `view` names the part.

    bench         source                 the photo before the edit, whole
                  exemplar               the exemplar at the size of the bench's median box hole
                  <hole>/region          the box of a hole in that photo
                  <hole>/masked          the same, neutral outside the hole
                  <hole>/<kind>          reference <kind> of a hole
                  <hole>/<kind>/masked   the same, neutral outside its object, where the bench has the object's mask
    edits         whole                  the edit, whole
                  region                 the box of its hole
                  masked                 the same, neutral outside the hole
                  of fills from foreign references, which only serve the gains, region alone
    real_images   whole                  an untouched photo

A box hole has no masked views: they would equal the others. Most extractors compare a region with a reference at the
region's resolution; otherwise sharpness outweighs content. Upstream's CLIP score does not. Retrieval compares one
region with all exemplars, which therefore share one resolution: none stands out by its sharpness.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pbe.data import images
from pbe.data.masks import hole_of
from pbe.data.schema import HoleKind
from pbe.evaluate.bench.scopes import Scope, object_mask_of, scopes_of
from pbe.evaluate.features.extractors import Preprocessing
from pbe.evaluate.metrics.similarity import hole_region, match_resolution, neutral_outside, upstream_region
from pbe.evaluate.settings import Region

# images.decode, or one that remembers: several extractors read the same pictures. Nobody writes into them
Decode = Callable[[bytes], np.ndarray]


@dataclass(frozen=True)
class Crop:
    """One picture (h, w, 3) uint8 for an extractor. key: a bench id, edit key, real id or file name."""

    key: str
    view: str
    preprocessing: Preprocessing
    picture: np.ndarray


def edit_key(row: Mapping[str, Any]) -> str:
    """Return the key of a row of EDITS or PIXELS."""
    return f"{row['bench_id']}|{row['hole_kind']}|{row['reference_kind']}|{row['seed']}"


def bench_crops(
    rows: Sequence[Mapping[str, Any]],
    scopes: Sequence[Scope],
    *,
    matched: bool,
    median_px: int,
    region: Region,
    decode: Decode = images.decode,
) -> Iterator[Crop]:
    """Yield the crops of rows of BENCH: each source photo, its exemplar, its holes' regions, then its references.

    scopes: pairs of hole kind and reference kind. matched: resize references to their region's resolution.
    median_px: `median_hole_px` of the whole bench.
    """
    for row in rows:
        key, source = row["bench_id"], decode(row["source"])
        yield Crop(key, "source", "whole", source)
        exemplar = decode(row["exemplar"])
        if matched:
            exemplar = match_resolution(exemplar, median_px, median_px)
        yield Crop(key, "exemplar", "reference", exemplar)
        found = [scope for scope in scopes if scopes_of(row, [scope[0]], [scope[1]])]
        for hole_kind in dict.fromkeys(hole_kind for hole_kind, _ in found):
            for view, cut in _of_hole(source, hole_of(row, hole_kind, source), hole_kind, region):
                yield Crop(key, f"{hole_kind}/{view}", "region", cut)
        for hole_kind, reference_kind in found:
            height_px, width_px = hole_region(source, hole_of(row, hole_kind, source)).shape[:2]
            for suffix, reference in _references(row, hole_kind, reference_kind, decode):
                if matched:
                    reference = match_resolution(reference, height_px, width_px)
                yield Crop(key, f"{hole_kind}/{reference_kind}{suffix}", "reference", reference)


def edited_crops(
    rows: Sequence[Mapping[str, Any]],
    bench: Mapping[str, Mapping[str, Any]],
    *,
    region: Region,
    decode: Decode = images.decode,
) -> Iterator[Crop]:
    """Yield the crops of rows of EDITS: the whole edit, then its region, then what of it is in the hole.

    bench: rows of BENCH by id.
    """
    for row in rows:
        edit, scored = decode(row["edit"]), row["reference_kind"] != "foreign"
        if scored:
            yield Crop(edit_key(row), "whole", "whole", edit)
        hole_mask = hole_of(bench[row["bench_id"]], row["hole_kind"], edit)
        for view, cut in _of_hole(edit, hole_mask, row["hole_kind"], region):
            if scored or view == "region":
                yield Crop(edit_key(row), view, "region", cut)


def median_hole_px(rows: Iterable[Mapping[str, Any]]) -> int:
    """Side of a square as large as the median box hole of rows of BENCH, which all have one."""
    areas = [np.unpackbits(np.frombuffer(row["box_hole_mask"], np.uint8)).sum() for row in rows]
    return round(float(np.sqrt(np.median(areas))))


def real_crops(rows: Sequence[Mapping[str, Any]], *, decode: Decode = images.decode) -> Iterator[Crop]:
    """Yield the pictures of rows of REAL_IMAGES."""
    for row in rows:
        yield Crop(row["real_id"], "whole", "whole", decode(row["picture"]))


def square(photo: np.ndarray, side_px: int) -> np.ndarray:
    """(H, W, 3) to (side, side, 3), as upstream's scripts/create_square_gt_for_fid.py: bilinearly with antialias."""
    return images.centre_square(photo, side_px, resampling="bilinear")


def _of_hole(
    picture: np.ndarray, hole_mask: np.ndarray, hole_kind: HoleKind, region: Region
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the view and the picture of a hole's box and, unless the hole fills it, of the hole alone.

    region: of the box; the hole alone always has its last row and column.
    """
    yield "region", hole_region(picture, hole_mask) if region == "whole" else upstream_region(picture, hole_mask)
    if hole_kind != "box":
        yield "masked", hole_region(neutral_outside(picture, hole_mask), hole_mask)


def _references(
    row: Mapping[str, Any], hole_kind: HoleKind, reference_kind: str, decode: Decode
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield a reference as it is and, for a hole that is no box and an object with a known mask, the object alone."""
    reference = decode(row[reference_kind])
    yield "", reference
    object_mask = object_mask_of(row, reference_kind, reference)
    if hole_kind != "box" and object_mask is not None and object_mask.any():
        yield "/masked", neutral_outside(reference, object_mask)
