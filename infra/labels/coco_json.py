"""A COCO instances JSON of polygons and boxes. Source: cocodataset.org/#format-data, "Object Detection"."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from label_csv import Ends

DIGITS = 3  # of a pixel


@dataclass
class Instances:
    """What the JSON will hold. annotations: each as JSON already, which takes less than half of the memory."""

    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[str] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)  # of classes
    polygons: int = 0

    def add_photo(self, file_name: str, size: tuple[int, int]) -> None:
        """The photo of the objects that are added next."""
        width, height = size
        self.images.append({"id": len(self.images) + 1, "file_name": file_name, "width": width, "height": height})

    def add(self, class_number: int, name: str, ends: Ends, polygon: Sequence[float]) -> None:
        """ends, polygon (x, y, x, y, ...): in fractions of the last photo, clipped to it; no polygon leaves a box."""
        photo = self.images[-1]
        size = photo["width"], photo["height"]
        (x0, y0), (x1, y1) = corners = _pixels([ends[0], ends[2], ends[1], ends[3]], size)
        points = _pixels(polygon, size)
        self.names[class_number] = name
        self.polygons += bool(len(points))
        entry: dict[str, Any] = {
            "id": len(self.annotations) + 1,
            "image_id": photo["id"],
            "category_id": class_number,
            "bbox": [x0, y0, *np.round(corners[1] - corners[0], DIGITS).tolist()],
            "area": _area(points if len(points) else np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])),
            "iscrowd": 0,
        }
        if len(points):
            entry["segmentation"] = [points.ravel().tolist()]
        self.annotations.append(json.dumps(entry))

    def write(self) -> None:
        """Write the JSON to stdout: only after all files were read, so that it is never incomplete."""
        classes = [{"id": number, "name": name} for number, name in sorted(self.names.items())]
        print(f'{{"images": {json.dumps(self.images)},\n"categories": {json.dumps(classes)},\n"annotations": [')
        sys.stdout.writelines(f"{',' if place else ''}{entry}\n" for place, entry in enumerate(self.annotations))
        print("]}")


def _pixels(fractions: Sequence[float], size: tuple[int, int]) -> np.ndarray:
    """(N, 2) x and y."""
    return np.round(np.clip(np.reshape(fractions, (-1, 2)), 0.0, 1.0) * size, DIGITS)


def _area(points: np.ndarray) -> float:
    """Of a polygon, in square pixels: the shoelace formula."""
    xs, ys = points.T
    return round(abs(float(np.dot(xs, np.roll(ys, -1) - np.roll(ys, 1)))) / 2, DIGITS)
