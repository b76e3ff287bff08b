"""Pictures to extract features from, of the bench, edits and real images. `view` names the part.

    bench         source            the photo before the edit, whole
                  <hole>/<kind>     reference <kind> of a hole
    edits         whole             the edit, whole
                  region            the box of its hole
    real_images   whole             an untouched photo

Most extractors compare a region with a reference at the region's resolution; otherwise sharpness outweighs content.
Upstream's CLIP score does not.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pbe.data import images
from pbe.data.masks import hole_of
from pbe.evaluate.bench.scopes import Scope, scopes_of
from pbe.evaluate.features.extractors import Preprocessing
from pbe.evaluate.metrics.similarity import hole_region, match_resolution, upstream_region
from pbe.evaluate.settings import Region


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


def bench_crops(rows: Sequence[Mapping[str, Any]], scopes: Sequence[Scope], *, matched: bool) -> Iterator[Crop]:
    """Yield the crops of rows of BENCH: each source photo, then its reference for every scope.

    scopes: pairs of hole kind and reference kind. matched: resize references to their region's resolution.
    """
    for row in rows:
        source = images.decode(row["source"])
        yield Crop(row["bench_id"], "source", "whole", source)
        for hole_kind, reference_kind in scopes:
            if not scopes_of(row, [hole_kind], [reference_kind]):
                continue
            reference = images.decode(row[reference_kind])
            if matched:
                height_px, width_px = hole_region(source, hole_of(row, hole_kind, source)).shape[:2]
                reference = match_resolution(reference, height_px, width_px)
            yield Crop(row["bench_id"], f"{hole_kind}/{reference_kind}", "reference", reference)


def edited_crops(
    rows: Sequence[Mapping[str, Any]], bench: Mapping[str, Mapping[str, Any]], *, region: Region
) -> Iterator[Crop]:
    """Yield the crops of rows of EDITS: the whole edit, then its region. bench: rows of BENCH by id."""
    for row in rows:
        edit = images.decode(row["edit"])
        yield Crop(edit_key(row), "whole", "whole", edit)
        hole_mask = hole_of(bench[row["bench_id"]], row["hole_kind"], edit)
        cut = hole_region(edit, hole_mask) if region == "whole" else upstream_region(edit, hole_mask)
        yield Crop(edit_key(row), "region", "region", cut)


def real_crops(rows: Sequence[Mapping[str, Any]]) -> Iterator[Crop]:
    """Yield the pictures of rows of REAL_IMAGES."""
    for row in rows:
        yield Crop(row["real_id"], "whole", "whole", images.decode(row["picture"]))


def square(photo: np.ndarray, side_px: int) -> np.ndarray:
    """(H, W, 3) to (side, side, 3), as upstream's scripts/create_square_gt_for_fid.py: bilinearly with antialias."""
    return images.centre_square(photo, side_px, resampling="bilinear")
