"""SegmentationObject/ID.png of Pascal VOC: the regions of a photo's objects, and the box of each."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from label_csv import Ends
from label_masks import bounds_px

from pbe.data.images import ImageError, decode, open_picture, read_mode, read_palette_indices

VOID = 255  # a border around each object, and what is hard to tell
# The void border takes about 2.5 px off each side of a region: that of an object of 10 px has an IoU of 0.25 with its
# box. A pair that fits better comes first.
IOU_MIN = 0.25


def read_regions(path: Path, size: tuple[float, float]) -> np.ndarray:
    """(H, W) uint8: 0 background, VOID, else an object's number. size: of the annotation. Raises ValueError."""
    try:
        data = open_picture(path).data
        regions = read_palette_indices(data)
        if regions is None and read_mode(data) == "L":
            regions = decode(data, convert=False)[..., 0]
        if regions is None:
            raise ValueError(f"it is {read_mode(data)}, not a palette of object numbers")
    except (ImageError, OSError) as error:
        raise ValueError(f"it cannot be read: {error}") from None
    height, width = regions.shape
    if (width, height) != size:
        raise ValueError(f"it is {width} x {height} px, its annotation says {size[0]:g} x {size[1]:g}")
    return regions


def region_numbers(regions: np.ndarray) -> list[int]:
    """Numbers of the objects, ascending."""
    return [int(number) for number in np.unique(regions) if number not in (0, VOID)]


def match_regions(regions: np.ndarray, boxes_px: Sequence[Ends]) -> dict[int, int]:
    """Number of the region of each box, by the place of the box; boxes and regions that fit none are absent.

    Pairs are taken by falling IoU of the box and the region's bounds. Of equal ones, the region that has the number of
    the box comes first: VOC counts objects in the order of the annotation, from 1.
    """
    bounds = {number: bounds_px(regions == number) for number in region_numbers(regions)}
    pairs = [(-iou(ends, box), abs(number - 1 - at), at, number)
             for at, box in enumerate(boxes_px) for number, ends in bounds.items()]  # fmt: skip
    found: dict[int, int] = {}
    for negative_iou, _, at, number in sorted(pairs):
        if -negative_iou >= IOU_MIN and at not in found and number not in found.values():
            found[at] = number
    return found


def iou(one: Ends, other: Ends) -> float:
    """Intersection over union of two boxes."""
    width = min(one[1], other[1]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[2], other[2])
    common = max(width, 0.0) * max(height, 0.0)
    areas = sum((x1 - x0) * (y1 - y0) for x0, x1, y0, y1 in (one, other))
    return common / (areas - common) if areas > common else 0.0
