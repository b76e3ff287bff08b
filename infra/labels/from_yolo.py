"""Converts YOLO labels to an OpenImages box CSV: python infra/labels/from_yolo.py LABELS [NAMES] > boxes.csv

LABELS: folder of .txt files, one per photo, named like it. A line is `class cx cy width height`, in fractions; a longer
line is a polygon, which gives its bounds. NAMES: a text file with one class name per line, in order, or the dataset's
.yaml, whose `names` is used. Without NAMES the class numbers stay.
"""

import csv
import math
import sys
from pathlib import Path

import yaml

NOT_LABELS = ("classes.txt", "obj.names")  # tools write these beside the labels


def main(folder: str, names_file: str | None = None) -> None:
    names = names_of(Path(names_file)) if names_file else {}
    files = [path for path in sorted(Path(folder).rglob("*.txt")) if path.name not in NOT_LABELS]
    if not files:
        sys.exit(f"{folder}: contains no .txt label file")
    rows = []
    for path in files:
        for number, line in enumerate(text_of(path).splitlines(), start=1):
            if not line.strip():
                continue
            try:
                label, *values = line.split()
                x0, x1, y0, y1 = bounds([float(value) for value in values])
                name = label
                if names:
                    name = names[int(label)]
            except KeyError:
                sys.exit(f"{path}:{number}: class {label} has no name in {names_file}")
            except ValueError as error:
                sys.exit(f"{path}:{number}: not `class cx cy width height`: {line!r} ({error})")
            rows.append([path.stem, name, *(round(min(max(end, 0.0), 1.0), 6) for end in (x0, x1, y0, y1))])
    out = csv.writer(sys.stdout)  # after all files are read, so that `> boxes.csv` is never incomplete
    out.writerow(["ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax"])
    out.writerows(rows)


def names_of(path: Path) -> dict[int, str]:
    """Class names by class number."""
    if path.suffix.lower() not in (".yaml", ".yml"):
        return dict(enumerate(text_of(path).splitlines()))
    try:
        names = yaml.safe_load(text_of(path))["names"]
        return {
            int(number): str(name) for number, name in (names.items() if isinstance(names, dict) else enumerate(names))
        }
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        sys.exit(f"{path}: `names` is not a list of class names: {' '.join(str(error).split())}")


def text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"{path}: cannot be read: {error}")


def bounds(values: list[float]) -> tuple[float, float, float, float]:
    if not all(map(math.isfinite, values)):
        raise ValueError("not finite")
    if len(values) == 4:
        cx, cy, width, height = values
        return cx - width / 2, cx + width / 2, cy - height / 2, cy + height / 2
    if len(values) < 6 or len(values) % 2:
        raise ValueError(f"{len(values)} numbers")
    return min(values[::2]), max(values[::2]), min(values[1::2]), max(values[1::2])


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(*sys.argv[1:])
