"""Converts Pascal VOC labels to an OpenImages box CSV: python infra/labels/from_voc.py LABELS > boxes.csv

LABELS: folder of .xml files, one per photo, named like it, also in subfolders. Boxes are in pixels that start at 1, as
in VOC. The CSV states the size of each photo, so that ingest sees photos that were turned. A CSV has the photos of one
split: run it once for each, and name the CSVs train.csv, val.csv ...
"""

import math
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from label_csv import Boxes, from_pixels, image_ids

from pbe.data.boxfiles.openimages import SIZE_COLUMNS

PHOTOS_IN = {"Annotations": "JPEGImages", "annotations": "images", "labels": "images"}


def main(folder: str) -> None:
    files = sorted(path for path in Path(folder).rglob("*.xml") if path.is_file())
    if not files:
        sys.exit(f"{folder}: contains no .xml annotation")
    ids = image_ids(files, Path(folder), PHOTOS_IN)
    boxes = Boxes(extra=["IsTruncated", *SIZE_COLUMNS])
    for path in files:
        try:
            add_objects(boxes, ids[path], ElementTree.parse(path).getroot())
        except (ElementTree.ParseError, ValueError) as error:
            sys.exit(f"{path}: {error}")
    boxes.write()


def add_objects(boxes: Boxes, image_id: str, root: ElementTree.Element) -> None:
    """Raises ValueError for what is no VOC annotation."""
    objects = list(root.iter("object"))
    if root.tag != "annotation":
        raise ValueError(f"not a VOC annotation: it begins with <{root.tag}>")
    if not objects:
        return
    width, height = number(root, "size/width"), number(root, "size/height")
    if not (width > 0 and height > 0):
        raise ValueError(f"its size is {width:g} x {height:g}; write the photo's width and height there")
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
        truncated = entry.findtext("truncated", "").strip()
        flag = truncated if truncated in ("0", "1") else "-1"  # also for "Unspecified"
        boxes.add(image_id, name, ends, flag, f"{width:g}", f"{height:g}")


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
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
