"""Mask files as ingest reads them: ID_N.png, grey, 255 where the object is, N counts the boxes of photo ID."""

import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image

OBJECT = 255


def write_mask(folder: Path, image_id: str, number: int, mask: np.ndarray) -> None:
    """mask: (H, W) bool, True on the object."""
    write_png(folder / f"{image_id}_{number}.png", np.where(mask, OBJECT, 0).astype(np.uint8))


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Write (H, W) or (H, W, 3) uint8. Exits where another picture is: two photos may have one name."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.read_bytes() != buffer.getvalue():
            sys.exit(f"{path}: another picture is there; write to an empty folder, or rename one of the two photos")
        path.write_bytes(buffer.getvalue())
    except OSError as error:
        sys.exit(f"{path}: cannot be written: {error.strerror}")


def bounds_px(mask: np.ndarray) -> tuple[int, int, int, int]:
    """xmin, xmax, ymin, ymax of the object, half-open. mask: (H, W) bool, not empty."""
    xs, ys = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return int(xs[0]), int(xs[-1]) + 1, int(ys[0]), int(ys[-1]) + 1
