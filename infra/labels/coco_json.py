"""A COCO instances JSON of polygons and boxes. Source: cocodataset.org/#format-data, "Object Detection"."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from label_csv import Ends

DIGITS = 3  # of a pixel


@dataclass
class Instances:
    """What the JSON will hold."""

    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)  # of classes

    def add_photo(self, file_name: str, size: tuple[int, int]) -> None:
        """The photo of the objects that are added next."""
        width, height = size
        self.images.append({"id": len(self.images) + 1, "file_name": file_name, "width": width, "height": height})

    def add(self, class_number: int, name: str, ends: Ends, polygon: Sequence[float]) -> None:
        """ends, polygon (x, y, x, y, ...): in fractions of the last photo; an object without polygon is a box."""
        photo = self.images[-1]
        x0, x1, *_ = _pixels(ends[:2], [photo["width"]])
        y0, y1, *_ = _pixels(ends[2:], [photo["height"]])
        points = _pixels(polygon, [photo["width"], photo["height"]])
        self.names[class_number] = name
        entry = {
            "id": len(self.annotations) + 1,
            "image_id": photo["id"],
            "category_id": class_number,
            "bbox": [x0, y0, round(x1 - x0, DIGITS), round(y1 - y0, DIGITS)],
            "area": _area(points or [x0, y0, x1, y0, x1, y1, x0, y1]),
            "iscrowd": 0,
        }
        self.annotations.append(entry | ({"segmentation": [points]} if points else {}))

    def write(self) -> None:
        """Write the JSON to stdout: only after all files were read, so that it is never incomplete."""
        classes = [{"id": number, "name": name} for number, name in sorted(self.names.items())]
        json.dump({"images": self.images, "annotations": self.annotations, "categories": classes}, sys.stdout)
        print()


def _pixels(fractions: Sequence[float], sides_px: Sequence[int]) -> list[float]:
    """Clipped to the photo. sides_px: of the fractions, in turn."""
    inside = (min(max(value, 0.0), 1.0) for value in fractions)
    return [round(value * sides_px[place % len(sides_px)], DIGITS) for place, value in enumerate(inside)]


def _area(points: Sequence[float]) -> float:
    """Of a polygon, in square pixels: the shoelace formula."""
    xs, ys = points[::2], points[1::2]
    twice = sum(x * (ys[(at + 1) % len(ys)] - ys[at - 1]) for at, x in enumerate(xs))
    return round(abs(twice) / 2, DIGITS)
