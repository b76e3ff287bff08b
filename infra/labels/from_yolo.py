"""Converts YOLO labels: python infra/labels/from_yolo.py LABELS [NAMES] > boxes.csv, or > instances.json of polygons

Boxes become an OpenImages box CSV. Polygons become a COCO instances JSON, which keeps them as masks, in pixels of the
photos. These are read for their size: from the folder `images` in place of `labels`, or beside the labels where there
is no folder of that name; or from --images FOLDER, laid out as LABELS is.

LABELS: folder of .txt files, one per photo, named like it, also in subfolders; or a data set with folders `labels`, as
Ultralytics, Roboflow and FiftyOne write it. NAMES: a text file with one class name per line, in order, or the data
set's .yaml, whose `names` and `kpt_shape` are used; without it, the data.yaml or dataset.yaml in LABELS or beside it;
without that, the class numbers stay. A file has the photos of one split: run it once for each, and name the files
train.csv, val.csv ... or instances_train.json, instances_val.json ...

A line is a class number and fractions of the photo:
    cx cy width height                     detection; a sixth column is a prediction's confidence
    x1 y1 x2 y2 x3 y3 ...                  segmentation
    x1 y1 x2 y2 x3 y3 x4 y4                rotated box, if all lines are such: its bounds are taken
    cx cy width height  x y [visible] ...  pose: the box is taken
"""

import argparse
import math
import re
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from coco_json import Instances
from label_csv import Boxes, Ends, Rejects, files_below, image_ids, is_fraction, photo_folder
from label_photos import Photos, upright_size

from pbe.data.boxfiles.photo_names import IMAGE_SUFFIX

NOT_LABELS = ("classes.txt", "predefined_classes.txt", "obj.names")  # tools write these beside the labels
DATASET_FILES = ("data.yaml", "dataset.yaml")
PHOTOS_IN = {"labels": "images"}
BOX, CONFIDENCE, CORNERS = 4, 5, 8  # numbers after the class
POINTS_MIN = 3
POLYGON_MIN = 2 * POINTS_MIN
VISIBILITIES = (0, 1, 2)
KEYPOINT_MARGIN = 0.05  # of the box, by which a keypoint may lie outside it


@dataclass(frozen=True)
class Row:
    where: str  # file:line
    label: str
    numbers: Sequence[float]


Object = tuple[Row, str, Ends]  # with the class's name


@dataclass(frozen=True)
class Dataset:
    """What a .yaml says. keypoint_numbers: per object; None if it does not say that there are any."""

    names: dict[int, str]
    keypoint_numbers: int | None = None


def main(folder: Path, names_file: Path | None, task: str | None, images: Path | None) -> None:
    files = label_files(folder)
    if not files:
        sys.exit(f"{folder}: contains no .txt label file")
    dataset = read_dataset(folder, names_file)
    rows = {path: [row_of(path, *line) for line in lines_of(path)] for path in files}
    every = [row for found in rows.values() for row in found]
    task = task or task_of(every, dataset)
    # all are checked before the first photo is read
    objects = {
        path: [(row, name_of(row, dataset, names_file), ends_of(row, task, dataset)) for row in found]
        for path, found in rows.items()
    }
    ids = image_ids(files, folder, PHOTOS_IN)
    if task == "segment" and any(len(row.numbers) > CONFIDENCE for row in every):
        write_instances(objects, ids, {path: photos_of(path, folder, images) for path in files})
        return
    boxes = Boxes()
    for path, found in objects.items():
        for _, name, ends in found:
            boxes.add(ids[path], name, ends)
    boxes.write()


def write_instances(
    objects: Mapping[Path, Sequence[Object]], ids: Mapping[Path, str], photos_in: Mapping[Path, Path]
) -> None:
    """photos_in: folder of each label file's photo."""
    out, photos, rejects = Instances(), Photos(), Rejects()
    for path, found in objects.items():
        if not found:
            continue
        try:
            photo = photos.find(photos_in[path], path.stem)
            out.add_photo(f"{ids[path]}{photo.suffix}", upright_size(photo))
        except ValueError as error:
            rejects.add("labels without a photo", f"{path} ({error})")
            continue
        for row, name, ends in found:
            reason = reason_against(row, ends)
            if reason:
                rejects.add(reason, row.where)
            else:
                out.add(int(row.label), name, ends, row.numbers if len(row.numbers) > CONFIDENCE else ())
    rejects.report()
    if not out.images:
        sys.exit(
            "polygons need the sizes of their photos: name the folder with --images, or take the bounds alone with "
            "--task obb"
        )
    if not out.annotations:
        sys.exit("no object is left")
    print(
        f"a COCO instances JSON of {out.polygons} polygons and {len(out.annotations) - out.polygons} boxes without "
        "one; name it instances*.json, and set ingest.masks: read",
        file=sys.stderr,
    )
    out.write()


# -- files ----------------------------------------------------------------------------------------------------------


def label_files(folder: Path) -> list[Path]:
    """All .txt files, in folders `labels` if there are any, without lists of classes or photos and READMEs."""
    found = [path for path in files_below(folder, "*.txt") if path.name not in NOT_LABELS]
    found = [path for path in found if not path.name.lower().startswith("readme")]
    inside = [path for path in found if "labels" in path.relative_to(folder).parts[:-1]]
    return [path for path in inside or found if not is_list_of_photos(path)]


def photos_of(path: Path, folder: Path, images: Path | None) -> Path:
    """Folder of a label file's photo: below `images` as the labels lie below `folder`; else the folder `images` in
    place of the last `labels`, as Ultralytics does; else the label's own, as Darknet does."""
    if images is not None:
        return images / photo_folder(path.relative_to(folder), PHOTOS_IN)
    parts = list(path.absolute().parent.parts)
    if "labels" in parts:
        last = len(parts) - 1 - parts[::-1].index("labels")
        parts[last] = PHOTOS_IN["labels"]
    return Path(*parts)


def is_list_of_photos(path: Path) -> bool:
    """True for train.txt and the like, as Darknet and CVAT write them."""
    lines = [line for _, line in lines_of(path)]
    return bool(lines) and all(re.search(IMAGE_SUFFIX, line.strip()) for line in lines)


def lines_of(path: Path) -> list[tuple[int, str]]:
    return [(number, line) for number, line in enumerate(text_of(path).splitlines(), start=1) if line.strip()]


def text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"{path}: cannot be read: {error}")


def read_dataset(folder: Path, names_file: Path | None) -> Dataset:
    """Class names and keypoints: of `names_file`, else of the .yaml that belongs to the labels."""
    if names_file is not None and names_file.suffix.lower() in (".yaml", ".yml"):
        return dataset_of(names_file)
    beside = [path / name for path in (folder, folder.parent) for name in DATASET_FILES]
    found = next((path for path in beside if path.is_file()), None)
    keypoint_numbers = None if found is None else keypoint_numbers_of(found, mapping_of(found))
    if names_file is not None:
        return Dataset(dict(enumerate(text_of(names_file).splitlines())), keypoint_numbers)
    if found is None:
        return Dataset({})
    print(f"class names of {found}", file=sys.stderr)
    return dataset_of(found)


def dataset_of(path: Path) -> Dataset:
    raw = mapping_of(path)
    try:
        names = raw["names"]
        numbered = names if isinstance(names, dict) else dict(enumerate(names))
        return Dataset({int(number): str(name) for number, name in numbered.items()}, keypoint_numbers_of(path, raw))
    except (KeyError, TypeError, ValueError) as error:
        sys.exit(f"{path}: `names` is not a list of class names: {' '.join(str(error).split())}")


def mapping_of(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(text_of(path))
    except yaml.YAMLError as error:
        sys.exit(f"{path}: not a YAML file: {' '.join(str(error).split())}")
    return raw if isinstance(raw, dict) else {}


def keypoint_numbers_of(path: Path, raw: dict[str, Any]) -> int | None:
    shape = raw.get("kpt_shape")
    if shape is None:
        return None
    if isinstance(shape, list) and len(shape) == 2 and isinstance(shape[0], int) and shape[1] in (2, 3):
        return shape[0] * shape[1]
    sys.exit(f"{path}: kpt_shape is {shape!r}, expected [number of keypoints, 2 or 3]")


# -- rows -----------------------------------------------------------------------------------------------------------


def row_of(path: Path, number: int, line: str) -> Row:
    where = f"{path}:{number}"
    label, *texts = line.split()
    if not re.fullmatch(r"[0-9]+(\.0+)?", label):
        toolkit = "; labels of OIDv4 ToolKit: from_oidv4.py" if len(texts) >= BOX else ""
        sys.exit(f"{where}: {line!r} does not begin with a class number{toolkit}")
    try:
        numbers = array("d", map(float, texts))  # a million polygons as lists would take gigabytes
    except ValueError as error:
        sys.exit(f"{where}: not a YOLO label: {line!r} ({error})")
    if not all(map(math.isfinite, numbers)):
        sys.exit(f"{where}: not a YOLO label: {line!r} (not finite)")
    return Row(where, label.partition(".")[0], numbers)


def name_of(row: Row, dataset: Dataset, names_file: Path | None) -> str:
    if not dataset.names:
        return row.label
    try:
        return dataset.names[int(row.label)]
    except KeyError:
        sys.exit(f"{row.where}: class {row.label} has no name in {names_file or 'the .yaml of the data set'}")


def task_of(rows: Sequence[Row], dataset: Dataset) -> str:
    """Segmentation, pose or rotated boxes (obb, as Ultralytics calls them), which may have equal numbers of columns.

    Exits if the rows fit both of the first two.
    """
    if dataset.keypoint_numbers is not None:
        return "pose"
    long = [row for row in rows if len(row.numbers) > CONFIDENCE]
    fits_pose = bool(long) and len({len(row.numbers) for row in long}) == 1
    fits_pose = fits_pose and any(all(is_pose(row.numbers, of) for row in long) for of in (2, 3))
    if long and all(is_parallelogram(row.numbers) for row in long):
        print("the polygons are rotated boxes, whose bounds are taken; for masks give --task segment", file=sys.stderr)
        return "obb"
    if not fits_pose:
        return "segment"
    if any(len(row.numbers) % 2 or not all(map(is_fraction, row.numbers)) for row in long):
        return "pose"  # visibilities make an odd number, or are 2
    sys.exit(
        f"{long[0].where}: {len(long[0].numbers)} numbers are a polygon, or a box and keypoints: name the data set's "
        ".yaml with its kpt_shape as NAMES, or give --task segment or --task pose"
    )


def is_pose(numbers: Sequence[float], numbers_per_keypoint: int) -> bool:
    """True if the first four are a box and the rest keypoints in it, or (0, 0) where one is not labelled."""
    cx, cy, width, height = numbers[:BOX]
    rest = numbers[BOX:]
    if len(rest) % numbers_per_keypoint or not all(map(is_fraction, (cx, cy, width, height))):
        return False
    points = [rest[at : at + numbers_per_keypoint] for at in range(0, len(rest), numbers_per_keypoint)]
    if any(point[2] not in VISIBILITIES for point in points if numbers_per_keypoint == 3):
        return False
    allowed_x, allowed_y = (side * (0.5 + KEYPOINT_MARGIN) for side in (width, height))
    return all(
        (x, y) == (0, 0) or (abs(x - cx) <= allowed_x and abs(y - cy) <= allowed_y) for x, y, *_ in points
    )  # fmt: skip


def is_parallelogram(numbers: Sequence[float]) -> bool:
    """True for the corners of a rotated box, in order; fractions of a photo's sides skew it."""
    if len(numbers) != CORNERS:
        return False
    x0, y0, x1, y1, x2, y2, x3, y3 = numbers
    return abs(x0 + x2 - x1 - x3) < 0.01 and abs(y0 + y2 - y1 - y3) < 0.01


def ends_of(row: Row, task: str, dataset: Dataset) -> Ends:
    """In fractions. Exits for numbers that no format has."""
    numbers, count = row.numbers, len(row.numbers)
    expected = None if dataset.keypoint_numbers is None else BOX + dataset.keypoint_numbers
    if task == "pose" and count > CONFIDENCE:
        if expected is not None and count != expected:
            sys.exit(f"{row.where}: {count} numbers after the class, kpt_shape makes {expected}")
        numbers = numbers[:BOX]
    elif count not in (BOX, CONFIDENCE) and (count < POLYGON_MIN or count % 2):
        sys.exit(
            f"{row.where}: {count} numbers after the class: a box has 4, or 5 with its confidence, a polygon 6, 8, "
            "10 ..."
        )
    odd = next((number for number in numbers if not is_fraction(number)), None)
    if odd is not None:
        sys.exit(f"{row.where}: not fractions of the photo: {odd:g}; divide pixels by its width and height")
    if count in (BOX, CONFIDENCE) or task == "pose":
        cx, cy, width, height = numbers[:BOX]
        return cx - width / 2, cx + width / 2, cy - height / 2, cy + height / 2
    return min(numbers[::2]), max(numbers[::2]), min(numbers[1::2]), max(numbers[1::2])


def reason_against(row: Row, ends: Ends) -> str:
    """Why a line among polygons is no object; "" if it is one."""
    numbers = row.numbers
    if len(numbers) > CONFIDENCE:
        points = len(set(zip(numbers[::2], numbers[1::2], strict=True)))
        return "" if points >= POINTS_MIN else f"polygons of fewer than {POINTS_MIN} different points"
    if all(map(is_fraction, ends)):
        return ""
    return "boxes that end outside their photo, which may be polygons of two points"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels", type=Path, metavar="LABELS")
    parser.add_argument("names", type=Path, metavar="NAMES", nargs="?")
    parser.add_argument(
        "--task", choices=("segment", "pose", "obb"), help="what longer lines are; obb takes the bounds of polygons"
    )
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="photos of polygons, laid out as LABELS")
    args = parser.parse_args()
    main(args.labels, args.names, args.task, args.images)
