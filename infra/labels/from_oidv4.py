"""Converts labels of OIDv4 ToolKit to an OpenImages box CSV: python infra/labels/from_oidv4.py DATASET > boxes.csv

DATASET: the toolkit's folder of photos and labels as it lies, or a folder below it:

    train/Apple/0a1b2c.jpg  train/Apple/Label/0a1b2c.txt  with lines  Apple 12.8 30.0 640.0 512.5

A line is `class left top right bottom`, in pixels of the photo, which is read for its size. A photo of two classes is
in both folders; the CSV has all its boxes. A CSV has the photos of one split: run it once for each, and name the CSVs
train.csv, validation.csv, test.csv.
"""

import sys
from pathlib import Path

from label_csv import Boxes, from_pixels

from pbe.data.images import ImageError, open_picture

SIDES = 4
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations


def main(folder: str) -> None:
    files = sorted(path for path in Path(folder).rglob("*.txt") if path.parent.name == "Label")
    if not files:
        sys.exit(f"{folder}: contains no folder Label with .txt files")
    boxes = Boxes()
    for path in files:
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
            size = photo_size(path)
        except (OSError, ValueError) as error:
            sys.exit(f"{path}: {error}")
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            words = line.split()
            try:
                if len(words) <= SIDES:
                    raise ValueError(f"{len(words)} words")
                left, top, right, bottom = (float(word) for word in words[-SIDES:])
                ends = from_pixels((left, right, top, bottom), *size)
            except ValueError as error:
                sys.exit(f"{path}:{number}: not `class left top right bottom`: {line!r} ({error})")
            boxes.add(path.stem, " ".join(words[:-SIDES]), ends)  # a class may have several words
    boxes.write()


def photo_size(label: Path) -> tuple[int, int]:
    """Width and height of the photo in the folder above, upright, as OpenCV read it for the toolkit.

    Raises ValueError.
    """
    found = [path for path in label.parent.parent.glob(f"{label.stem}.*") if path.is_file()]
    if len(found) != 1:
        raise ValueError(f"{len(found)} photos {label.parent.parent / label.stem}.*, one is needed for its size")
    try:
        photo = open_picture(found[0]).header
    except (ImageError, OSError) as error:
        raise ValueError(f"its photo {found[0]} cannot be read: {error}") from None
    sideways = photo.exif_orientation in SIDEWAYS
    return (photo.height_px, photo.width_px) if sideways else (photo.width_px, photo.height_px)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
