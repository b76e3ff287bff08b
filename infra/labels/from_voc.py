"""Converts Pascal VOC labels to an OpenImages box CSV: python infra/labels/from_voc.py LABELS > boxes.csv

LABELS: folder of .xml files, one per photo, named like it. Boxes are in pixels that start at 1, as in VOC.
"""

import csv
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path


def main(folder: str) -> None:
    files = sorted(path for path in Path(folder).rglob("*.xml") if path.is_file())
    if not files:
        sys.exit(f"{folder}: contains no .xml annotation")
    rows = []
    for path in files:
        try:
            root = ElementTree.parse(path).getroot()
            width, height = number(root, "size/width"), number(root, "size/height")
            for entry in root.iter("object"):
                x0, x1 = number(entry, "bndbox/xmin") - 1, number(entry, "bndbox/xmax")
                y0, y1 = number(entry, "bndbox/ymin") - 1, number(entry, "bndbox/ymax")
                ends = (x0 / width, x1 / width, y0 / height, y1 / height)
                clipped = [round(min(max(end, 0.0), 1.0), 6) for end in ends]
                truncated = entry.findtext("truncated", "").strip()
                flag = truncated if truncated in ("0", "1") else "-1"  # also for "Unspecified"
                rows.append([path.stem, entry.findtext("name", ""), *clipped, flag])
        except (ElementTree.ParseError, ValueError, ZeroDivisionError) as error:
            sys.exit(f"{path}: not a VOC annotation: {error}")
    out = csv.writer(sys.stdout)  # after all files are read, so that `> boxes.csv` is never incomplete
    out.writerow(["ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax", "IsTruncated"])
    out.writerows(rows)


def number(element: ElementTree.Element, path: str) -> float:
    text = element.findtext(path)
    if text is None:
        raise ValueError(f"no {path}")
    return float(text)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
