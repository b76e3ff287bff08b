"""Photos and references to begin with: those of the sample profile, if their packages are installed."""

import csv
from dataclasses import dataclass

import numpy as np

from pbe.data import images
from pbe.data.boxes import pixel_box
from pbe.data.files import SourceError
from pbe.data.settings import MAX_IMAGE_BYTES
from pbe.data.sources import SampleSource
from pbe.page.uploads import Upload, open_upload
from pbe.places import repo_root

PHOTOS_MAX, REFERENCES_MAX = 7, 10
SIDE_MIN_PX = 90  # of a reference


@dataclass(frozen=True)
class Samples:
    photos: list[Upload]
    photo_names: list[str]
    references: list[Upload]  # crops of the photos' boxes
    reference_names: list[str]


def open_samples() -> Samples:
    """Nothing where the packages are missing: the page works without."""
    folder = repo_root() / "pbe" / "data" / "sample"
    source = SampleSource(folder / "photos.csv")
    try:
        rows = [row for table in source.photos() for row in table.to_pylist()]
    except SourceError:
        return Samples([], [], [], [])
    by_id = {
        row["image_id"]: open_upload(source.read(row["address"], MAX_IMAGE_BYTES), "sample photo")
        for row in rows
        if row["license"]
    }
    with (folder / "class-descriptions-boxable.csv").open(newline="", encoding="utf-8") as stream:
        names = dict(csv.reader(stream))
    with (folder / "boxes_openimages.csv").open(newline="", encoding="utf-8") as stream:
        boxes = [row for row in csv.DictReader(stream) if row["ImageID"] in by_id]
    crops: dict[str, np.ndarray] = {}
    for row in boxes:
        pixels = by_id[row["ImageID"]].pixels
        ends = (float(row[key]) for key in ("XMin", "XMax", "YMin", "YMax"))
        box = pixel_box(*ends, width_px=pixels.shape[1], height_px=pixels.shape[0])
        if min(box.width_px, box.height_px) >= SIDE_MIN_PX:  # one of each class
            crops.setdefault(names[row["LabelName"]], pixels[box.y0 : box.y1, box.x0 : box.x1])
    chosen = dict(list(crops.items())[:REFERENCES_MAX])
    references = [Upload(images.encode_png(crop), crop) for crop in chosen.values()]
    names_of_photos = [image_id.partition("_")[2].capitalize() for image_id in by_id]
    return Samples(list(by_id.values())[:PHOTOS_MAX], names_of_photos[:PHOTOS_MAX], references, list(chosen))
