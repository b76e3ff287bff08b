"""Turns cut-outs, PNGs whose alpha is the object, into photos, masks and boxes:

    python infra/labels/from_cutouts.py CUTOUTS OUT > boxes.csv

CUTOUTS: folder of .png files, also in subfolders, whose name is the label ("object" without one). OUT gets the photos
in images/ and the masks in masks/. A photo has the colours that lie under the alpha; where a program has cut them out
for good, they are as it left them, often black or white. The object is where alpha is at least 128 of 255. Cut-outs in
which that is nowhere or everywhere are left out. Put the CSV into OUT, and set `ingest.images: OUT/images`,
`ingest.boxes: OUT` and `ingest.masks: read`. A CSV has the photos of one split: run it once for each, and name the CSVs
train.csv, val.csv ...
"""

import sys
from pathlib import Path

import numpy as np
from label_csv import Boxes, Rejects, files_below, image_ids
from label_masks import bounds_px, write_mask, write_png

from pbe.data.images import ImageError, open_picture

ALPHA_MIN = 128  # of 255, as ingest reads grey masks
WITHOUT_FOLDER = "object"


def main(folder: Path, out: Path) -> None:
    files = [path for path in files_below(folder, "*") if path.suffix.lower() == ".png"]
    if not files:
        sys.exit(f"{folder}: contains no .png cut-out")
    if out.resolve().is_relative_to(folder.resolve()):
        sys.exit(f"{out}: lies in {folder}, so that its pictures would be cut-outs; write to another folder")
    ids = {path: image_id.replace("/", "__") for path, image_id in image_ids(files, folder, {}).items()}
    boxes, rejects = Boxes(), Rejects()
    for path in files:
        try:
            photo, mask = read_cutout(path)
        except (ImageError, OSError) as error:
            rejects.add("unreadable", f"{path} ({error})")
            continue
        if not mask.any() or mask.all():
            rejects.add(f"alpha is {'128 or more everywhere' if mask.any() else 'below 128 everywhere'}", str(path))
            continue
        label = path.parent.name if path.parent != folder else WITHOUT_FOLDER
        write_png(out / "images" / f"{ids[path]}.png", photo)
        write_mask(out / "masks" / label, ids[path], 0, mask)
        height, width = mask.shape
        x0, x1, y0, y1 = bounds_px(mask)
        boxes.add(ids[path], label, (x0 / width, x1 / width, y0 / height, y1 / height))
    rejects.report()
    if not boxes.rows:
        sys.exit(f"{folder}: no cut-out is left")
    boxes.write()


def read_cutout(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(H, W, 3) uint8 sRGB and (H, W) bool, upright. Raises ImageError and OSError."""
    picture = open_picture(path)
    photo, alpha = picture.upright(), picture.upright_alpha()
    return photo, np.ones(photo.shape[:2], bool) if alpha is None else alpha >= ALPHA_MIN


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
