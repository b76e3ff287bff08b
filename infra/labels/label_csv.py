"""What the label converters share: ids of photos, boxes in pixels, the CSV they write, and what they leave out."""

import csv
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pbe.data.boxfiles.coordinates import FRACTION_SLACK, PIXEL_SLACK
from pbe.data.boxfiles.openimages import BOX_COLUMNS
from pbe.data.files import is_hidden, named

Ends = tuple[float, float, float, float]  # xmin, xmax, ymin, ymax


def files_below(folder: Path, pattern: str) -> list[Path]:
    """Sorted, in all subfolders; not hidden ones, nor what macOS writes beside a file."""
    found = (path for path in folder.rglob(pattern) if path.is_file())
    return sorted(path for path in found if not is_hidden(path.relative_to(folder).as_posix()))


def image_ids(files: Sequence[Path], folder: Path, photos_in: Mapping[str, str]) -> dict[Path, str]:
    """ImageID of each label file: its name without suffix, or where two have one name, its path below `folder`.

    photos_in: by the name of a folder of labels, that of the folder beside it which has the photos.
    """
    names = Counter(path.stem for path in files)
    ids = {}
    for path in files:
        folders = photo_folder(path.relative_to(folder), photos_in)
        ids[path] = path.stem if names[path.stem] == 1 else (folders / path.stem).as_posix()
    return ids


def photo_folder(label: Path, photos_in: Mapping[str, str]) -> Path:
    """Folder of a label file's photo, where photos are laid out as labels are. photos_in: as of `image_ids`."""
    return Path(*(photos_in.get(part, part) for part in label.parts[:-1]))


def from_pixels(ends_px: Ends, width_px: float, height_px: float) -> Ends:
    """Fractions of the photo. Raises ValueError unless all ends are pixels of it, or one pixel outside."""
    x0, x1, y0, y1 = ends_px
    shown = f"x {x0:g}..{x1:g}, y {y0:g}..{y1:g}"
    if not all(map(math.isfinite, ends_px)) or max(x1, y1) <= 1 < max(width_px, height_px):
        raise ValueError(f"{shown} is not in pixels")
    if min(ends_px) < -PIXEL_SLACK or max(x0, x1) > width_px + PIXEL_SLACK or max(y0, y1) > height_px + PIXEL_SLACK:
        raise ValueError(
            f"{shown} px is not inside a photo of {width_px:g} x {height_px:g} px; was the photo turned, cropped or "
            "scaled after it was labelled?"
        )
    return x0 / width_px, x1 / width_px, y0 / height_px, y1 / height_px


def is_fraction(value: float) -> bool:
    return -FRACTION_SLACK <= value <= 1 + FRACTION_SLACK


@dataclass
class Boxes:
    """Rows of the CSV. extra: columns after those that every box file has."""

    extra: Sequence[str] = ()
    rows: list[list[object]] = field(default_factory=list)
    clipped: int = 0

    def add(self, image_id: str, label: str, ends: Ends, *more: object) -> None:
        """ends: in fractions. What lies outside the photo is cut off and, if that is more than rounding, counted."""
        inside = [min(max(end, 0.0), 1.0) for end in ends]
        self.clipped += not all(map(is_fraction, ends))
        self.rows.append([image_id, label, *(round(end, 6) for end in inside), *more])

    def write(self) -> None:
        """Write the CSV to stdout: only after all files were read, so that `> boxes.csv` is never incomplete."""
        out = csv.writer(sys.stdout)
        out.writerow([*BOX_COLUMNS, *self.extra])
        out.writerows(self.rows)
        if self.clipped:
            print(f"{self.clipped} boxes ended outside their photo and were clipped", file=sys.stderr)


@dataclass
class Rejects:
    """What a converter leaves out, by reason; each entry says where."""

    of: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, where: str) -> None:
        self.of.setdefault(reason, []).append(where)

    def report(self) -> None:
        """Print to stderr the number of each reason and the first entries."""
        for reason, where in self.of.items():
            print(f"{len(where)} left out, {reason}: {named(where)}", file=sys.stderr)
