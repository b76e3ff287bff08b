"""Converts labels of OIDv4 ToolKit to an OpenImages box CSV: python infra/labels/from_oidv4.py DATASET > boxes.csv

DATASET: the toolkit's folder of photos and labels as it lies, or a folder below it:

    train/Apple/0a1b2c.jpg  train/Apple/Label/0a1b2c.txt  with lines  Apple 12.8 30.0 640.0 512.5

A line is `class left top right bottom`, in pixels of the photo, which is read for its size. A photo of two classes is
in both folders; the CSV has all its boxes. A CSV has the photos of one split: run it once for each, and name the CSVs
train.csv, validation.csv, test.csv.
"""

import sys
from pathlib import Path

from label_csv import Boxes, files_below, from_pixels
from label_photos import Photos, upright_size

SIDES = 4


def main(folder: str) -> None:
    files = [path for path in files_below(Path(folder), "*.txt") if path.parent.name == "Label"]
    if not files:
        sys.exit(f"{folder}: contains no folder Label with .txt files")
    boxes, photos = Boxes(), Photos()
    for path in files:
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
            size = upright_size(photos.find(path.parent.parent, path.stem))
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


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
