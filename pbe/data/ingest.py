"""One bucket of the source: image files and CSV lines to `images`, `boxes` and `rejects` tables."""

import hashlib
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from pbe.data import images as image_codec
from pbe.data.schema import BOXES, IMAGES, REJECTS
from pbe.data.sources import EXTRA_CELLS, FLAG_COLUMNS, BoxLine, ImageFile


def read_bucket(
    files: Sequence[ImageFile], lines: Sequence[BoxLine], names: dict[str, str]
) -> tuple[dict[str, pa.Table], dict[str, int]]:
    """Read every image and check every box; nothing is dropped without a row in `rejects`.

    Returns tables by dataset name, and counts: <images|boxes>_<in|kept|rejected> and rejected_<reason>.
    An image without a usable box is rejected, and boxes of a rejected image are.
    """
    known = {file.image_id for file in files}
    rejects: list[dict[str, str]] = []

    def reject(key: str, reason: str, detail: str) -> None:
        rejects.append({"stage": "ingest", "key": key, "reason": reason, "detail": detail})

    boxes: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        image_id = line.cells["ImageID"]
        if image_id not in known:
            reject(line.where, "image_missing", f"no image file with id '{image_id}'")
            continue
        box, problem = _check_box(line, names)
        if box is None:
            reject(line.where, *problem)
        else:
            boxes.setdefault(image_id, []).append(box)

    images: list[dict[str, Any]] = []
    for file in files:
        mine = boxes.get(file.image_id, [])
        if not mine:
            reject(file.image_id, "image_without_box", "no usable line in the box files names it")
            continue
        try:
            data = file.read()
            height_px, width_px = image_codec.decode(data).shape[:2]
        except (image_codec.ImageError, OSError) as error:
            reject(file.image_id, "image_unreadable", f"{file.path.name}: {error}")
            for index in range(len(boxes.pop(file.image_id))):
                reject(f"{file.image_id}#{index}", "box_image_rejected", "its image is unreadable")
            continue
        images.append(
            {
                "image_id": file.image_id,
                "split": mine[0]["split"],
                "bytes": data,
                "width_px": width_px,
                "height_px": height_px,
                "sha256": hashlib.sha256(data).hexdigest(),
                "license": file.license,
                "author": None,
                "source_url": None,
                "rotation": None,
            }
        )
    kept_boxes = []
    for image in sorted(images, key=lambda row: row["image_id"]):
        kept_boxes += [{**box, "box_index": index} for index, box in enumerate(boxes[image["image_id"]])]
    tables = {
        "images": pa.Table.from_pylist(sorted(images, key=lambda row: row["image_id"]), schema=IMAGES),
        "boxes": pa.Table.from_pylist(kept_boxes, schema=BOXES),
        "rejects": pa.Table.from_pylist(rejects, schema=REJECTS),
    }
    image_reasons = ("image_without_box", "image_unreadable")
    images_rejected = sum(row["reason"] in image_reasons for row in rejects)
    counts = {
        "images_in": len(files),
        "images_kept": len(images),
        "images_rejected": images_rejected,
        "boxes_in": len(lines),
        "boxes_kept": len(kept_boxes),
        "boxes_rejected": len(rejects) - images_rejected,
    }
    for row in rejects:
        counts[f"rejected_{row['reason']}"] = counts.get(f"rejected_{row['reason']}", 0) + 1
    return tables, counts


def _check_box(line: BoxLine, names: dict[str, str]) -> tuple[dict[str, Any] | None, tuple[str, str]]:
    """The box, or None and (reason, detail)."""
    cells = line.cells
    if EXTRA_CELLS in cells:
        return None, ("box_unparsable", f"more cells than the header has columns: {cells[EXTRA_CELLS]}")
    try:
        xmin, xmax, ymin, ymax = (float(cells[name]) for name in ("XMin", "XMax", "YMin", "YMax"))
        flags = {ours: int(cells.get(theirs) or -1) for ours, theirs in FLAG_COLUMNS.items()}
    except (TypeError, ValueError) as error:
        return None, ("box_unparsable", str(error))
    if not cells["LabelName"] or not set(flags.values()) <= {-1, 0, 1}:
        return None, ("box_unparsable", "LabelName is empty or a flag is not 1, 0 or -1")
    if not (0 <= xmin < xmax <= 1 and 0 <= ymin < ymax <= 1):
        return None, (
            "box_outside_image",
            f"x {xmin}..{xmax}, y {ymin}..{ymax}; fractions 0 <= min < max <= 1 are allowed",
        )
    label = cells["LabelName"]
    box = {
        "image_id": cells["ImageID"],
        "split": line.split,
        "box_index": 0,
        "label": label,
        "label_name": names.get(label, label),
        "xmin": xmin,
        "xmax": xmax,
        "ymin": ymin,
        "ymax": ymax,
        **flags,
    }
    return box, ("", "")
