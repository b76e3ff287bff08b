"""Converts Pascal VOC labels to an OpenImages box CSV: python infra/labels/from_voc.py LABELS > boxes.csv

LABELS: folder of .xml files, one per photo, named like it, also in subfolders. Boxes are in pixels that start at 1, as
in VOC. The CSV states the size of each photo, so that ingest sees photos that were turned. A CSV has the photos of one
split: run it once for each, and name the CSVs train.csv, val.csv ...

--masks OUT: also write OUT/ID_N.png, the mask of box N of photo ID, counted from 0 in the CSV. They come from
SegmentationObject/ID.png, a folder beside that of the .xml files. The void border of an object is no part of its mask.
With `ingest.masks: read`, ingest finds them in the folder masks/ beside the CSV.
"""

import argparse
import math
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path

from label_csv import Boxes, Ends, Rejects, files_below, from_pixels, image_ids
from label_masks import write_mask
from voc_objects import match_regions, read_regions, region_numbers

from pbe.data.boxfiles.openimages import SIZE_COLUMNS

PHOTOS_IN = {"Annotations": "JPEGImages", "annotations": "images", "labels": "images"}


SEGMENTATION = "SegmentationObject"


def main(folder: Path, masks: Path | None) -> None:
    files = files_below(folder, "*.xml")
    if not files:
        sys.exit(f"{folder}: contains no .xml annotation")
    ids = image_ids(files, folder, PHOTOS_IN)
    shared = next((path for path in files if "/" in ids[path]), None)
    if masks is not None and shared is not None:
        sys.exit(f"{shared}: another photo is also called {shared.stem}; masks need names of their own: rename one")
    boxes = Boxes(extra=["IsTruncated", *SIZE_COLUMNS])
    boxes_px: dict[Path, list[Ends]] = {}
    sizes: dict[Path, tuple[float, float]] = {}
    for path in files:
        try:
            root = ElementTree.parse(path).getroot()
            boxes_px[path] = add_objects(boxes, ids[path], root)
            if boxes_px[path]:
                sizes[path] = size_of(root)
        except (ElementTree.ParseError, ValueError) as error:
            sys.exit(f"{path}: {error}")
    if masks is not None:
        write_masks(masks, boxes_px, sizes)
    boxes.write()


def write_masks(out: Path, boxes_px: Mapping[Path, Sequence[Ends]], sizes: Mapping[Path, tuple[float, float]]) -> None:
    """Write the masks of all photos; exits if there is none."""
    rejects, photos, written = Rejects(), 0, 0
    for path, size in sizes.items():
        picture = path.parent.parent / SEGMENTATION / f"{path.stem}.png"
        if not picture.is_file():
            rejects.add(f"photos without a PNG in {SEGMENTATION}", path.stem)
            continue
        try:
            regions = read_regions(picture, size)
        except ValueError as error:
            rejects.add("pictures of objects", f"{picture} ({error})")
            continue
        numbers = region_numbers(regions)
        if not numbers:
            rejects.add("pictures without an object", str(picture))
            continue
        found = match_regions(regions, boxes_px[path])
        for place, region in found.items():
            write_mask(out, path.stem, place, regions == region)
        for place in range(len(boxes_px[path])):
            if place not in found:
                rejects.add("boxes without a region", f"{path.stem} box {place}")
        for region in numbers:
            if region not in found.values():
                rejects.add("regions without a box", f"{picture} region {region}")
        photos, written = photos + bool(found), written + len(found)
    rejects.report()
    total = sum(map(len, boxes_px.values()))
    if not written:
        sys.exit(f"no mask for any of {total} boxes; {SEGMENTATION} must lie beside the folder of the .xml files")
    print(f"{written} masks for {total} boxes, in {photos} of {len(boxes_px)} photos", file=sys.stderr)


def add_objects(boxes: Boxes, image_id: str, root: ElementTree.Element) -> list[Ends]:
    """Ends of the boxes in pixels, which count from 0 and are half-open. Raises ValueError for what is no VOC
    annotation."""
    objects = list(root.iter("object"))
    if root.tag != "annotation":
        raise ValueError(f"not a VOC annotation: it begins with <{root.tag}>")
    if not objects:
        return []
    width, height = size_of(root)
    found = []
    for count, entry in enumerate(objects, start=1):
        name = entry.findtext("name", "").strip()
        if not name:
            raise ValueError(f"object {count} has no name")
        try:
            x0, x1 = number(entry, "bndbox/xmin") - 1, number(entry, "bndbox/xmax")
            y0, y1 = number(entry, "bndbox/ymin") - 1, number(entry, "bndbox/ymax")
            ends = from_pixels((x0, x1, y0, y1), width, height)
        except ValueError as error:
            raise ValueError(f"object {count} ({name}): {error}") from None
        found.append((x0, x1, y0, y1))
        truncated = entry.findtext("truncated", "").strip()
        flag = truncated if truncated in ("0", "1") else "-1"  # also for "Unspecified"
        boxes.add(image_id, name, ends, flag, f"{width:g}", f"{height:g}")
    return found


def size_of(root: ElementTree.Element) -> tuple[float, float]:
    """Width and height in pixels. Raises ValueError."""
    width, height = number(root, "size/width"), number(root, "size/height")
    if not (width > 0 and height > 0):
        raise ValueError(f"its size is {width:g} x {height:g}; write the photo's width and height there")
    return width, height


def number(element: ElementTree.Element, path: str) -> float:
    text = element.findtext(path)
    if text is None:
        raise ValueError(f"not a VOC annotation: no {path}")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{path} is {text!r}, not a number")
    return value


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels", type=Path, metavar="LABELS")
    parser.add_argument("--masks", type=Path, metavar="OUT", help="folder that gets the masks of SegmentationObject")
    args = parser.parse_args()
    main(args.labels, args.masks)
