"""Masks of objects: read from COCO segmentations and from pictures, checked against photo and box, stored as runs.

A mask is (H, W) uint8 of 0/1, 1 = object, of the size that IMAGES states for its photo. The part of it that holds
the object is stored, as COCO's compressed run lengths (pycocotools): a few hundred bytes.
"""

import json
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from pbe.data import images
from pbe.data.boxes import Box
from pbe.data.boxfiles.coordinates import PIXEL_SLACK
from pbe.data.frames import Frame, NotOnPhotoError, is_turned, turned_array, turned_points
from pbe.data.settings import MAX_IMAGE_PIXELS
from pbe.errors import one_line

Size = tuple[float, float]  # width, height
Ends = tuple[float, float, float, float]  # xmin, xmax, ymin, ymax, in fractions of the photo
POLYGON_POINTS_MIN = 3
INSIDE_BOX_MIN = 0.9  # share of a mask that its box must hold
BOX_SLACK_FRAC, BOX_SLACK_PX = 0.02, 2.0  # by which the mask may leave its box: of the box's longer side, or in pixels
OBJECT_LEVEL = 128  # of 255: from here on a grey picture shows the object
_AREA = struct.Struct("<4i")
GREY_MAX = 0.1  # share of the object's pixels that may be neither black nor white: an edge drawn with antialiasing


class MaskRejected(Exception):  # noqa: N818  it is no error of ours
    """A mask cannot be used. `reason` is one of the schema's MASK_REASONS; `str()` is the detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def read_mask(said: str, *, stated: Size | None, frame: Frame, read: Callable[[str], bytes]) -> np.ndarray:
    """The mask that ANNOTATIONS' column `mask` describes, (H, W) uint8 of 0/1, of the photo's size.

    stated: width and height that the box file states of the photo. frame: the photo as it is kept; masks of its other
    frame are turned with it, masks of another resolution scaled. read: a picture's name to its bytes, raises OSError.
    Raises MaskRejected.
    """
    try:
        shape = json.loads(said)
        if isinstance(shape, list):
            mask = _of_polygons(shape, stated or (frame.width_px, frame.height_px), frame)
        elif isinstance(shape, dict) and "file" in shape:
            mask = _on_photo(_of_picture(shape["file"], read, frame), frame)
        else:
            mask = _on_photo(_of_runs(shape, frame), frame)
    except NotOnPhotoError as error:
        raise MaskRejected("mask_size_mismatch", str(error)) from None
    if not mask.any():
        raise MaskRejected("mask_empty", "it marks no pixel")
    if mask.all():
        raise MaskRejected("mask_full", "it marks the whole photo; is it inverted, or the photo itself?")
    return mask


def picture_of(said: str) -> str | None:
    """Address of the picture that ANNOTATIONS' column `mask` names; None where it holds the mask itself."""
    return json.loads(said)["file"] if said.startswith('{"file"') else None


def refuse_outside(mask: np.ndarray, ends: Ends) -> None:
    """Raise MaskRejected unless the box holds nine tenths of the mask, give or take two pixels."""
    height_px, width_px = mask.shape
    x0, x1, y0, y1 = ends[0] * width_px, ends[1] * width_px, ends[2] * height_px, ends[3] * height_px
    slack = max(BOX_SLACK_PX, BOX_SLACK_FRAC * max(x1 - x0, y1 - y0))
    rows = slice(max(0, math.floor(y0 - slack)), math.ceil(y1 + slack))
    columns = slice(max(0, math.floor(x0 - slack)), math.ceil(x1 + slack))
    share = np.count_nonzero(mask[rows, columns]) / np.count_nonzero(mask)
    if share < INSIDE_BOX_MIN:
        raise MaskRejected("mask_outside_box", f"{share:.0%} of it are in its box, {INSIDE_BOX_MIN:.0%} must be")


def ends_of(mask: np.ndarray) -> Ends:
    """The tight box of a mask that is not empty, in fractions of its photo."""
    height_px, width_px = mask.shape
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return columns[0] / width_px, (columns[-1] + 1) / width_px, rows[0] / height_px, (rows[-1] + 1) / height_px


@dataclass(frozen=True)
class ObjectMask:
    """An object's mask in its photo: the part of the photo that holds it, (h, w) uint8 of 0/255, and where that is."""

    part: np.ndarray
    area: Box

    @staticmethod
    def of(mask: np.ndarray) -> "ObjectMask":
        """mask: (H, W) of 0/1, not empty."""
        columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
        area = Box(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        return ObjectMask(mask[area.y0 : area.y1, area.x0 : area.x1] * np.uint8(255), area)

    @staticmethod
    def unpacked(data: bytes) -> "ObjectMask":
        """Inverse of `packed`."""
        area = Box(*_AREA.unpack_from(data))
        counts = data[_AREA.size :]
        part = coco_mask.decode({"size": [area.height_px, area.width_px], "counts": counts})
        return ObjectMask(np.ascontiguousarray(part) * np.uint8(255), area)

    def packed(self) -> bytes:
        """As BOXES has it: x0, y0, x1, y1 as little-endian int32, then COCO's compressed run lengths of that part."""
        counts = coco_mask.encode(np.asfortranarray((self.part > 0).astype(np.uint8)))["counts"]
        return _AREA.pack(self.area.x0, self.area.y0, self.area.x1, self.area.y1) + counts

    def whole(self, *, width_px: int, height_px: int) -> np.ndarray:
        """(height, width) uint8 of 0/1, of the photo."""
        mask = np.zeros((height_px, width_px), np.uint8)
        mask[self.area.y0 : self.area.y1, self.area.x0 : self.area.x1] = self.part > 0
        return mask

    def cut(self, area: Box, size_px: int) -> np.ndarray:
        """(size, size) uint8 of 0/1: `area` of the photo, resized as triplets.cut does, 1 where half is object.

        Only what becomes object is computed: the part's place in the crop, not the crop or the photo.
        """
        part, out = self.part, np.zeros((size_px, size_px), np.uint8)
        scale_x, scale_y = size_px / area.width_px, size_px / area.height_px
        x0, x1 = _span(self.area.x0 - area.x0, self.area.x1 - area.x0, scale_x, size_px)
        y0, y1 = _span(self.area.y0 - area.y0, self.area.y1 - area.y0, scale_y, size_px)
        if x0 >= x1 or y0 >= y1:
            return out
        fewer = max(1, int(1 / max(scale_x, scale_y)))
        if fewer > 1:  # bilinear samples would miss pixels between them
            size = max(1, part.shape[1] // fewer), max(1, part.shape[0] // fewer)
            part = cv2.resize(part, size, interpolation=cv2.INTER_AREA)
        kept_x, kept_y = part.shape[1] / self.part.shape[1], part.shape[0] / self.part.shape[0]
        # from pixel centres of the crop to those of the part
        back = np.array(
            [
                [kept_x / scale_x, 0, ((x0 + 0.5) / scale_x + area.x0 - self.area.x0) * kept_x - 0.5],
                [0, kept_y / scale_y, ((y0 + 0.5) / scale_y + area.y0 - self.area.y0) * kept_y - 0.5],
            ]
        )
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        level = cv2.warpAffine(part, back, (x1 - x0, y1 - y0), flags=flags, borderMode=cv2.BORDER_CONSTANT)
        out[y0:y1, x0:x1] = level >= OBJECT_LEVEL
        return out


def _span(start_px: int, end_px: int, scale: float, size_px: int) -> tuple[int, int]:
    """The pixels of a crop that a span of its area touches."""
    return max(0, math.floor(start_px * scale)), min(size_px, math.ceil(end_px * scale))


# -- forms ----------------------------------------------------------------------------------------------------------


def _of_polygons(shape: Sequence[Any], size: Size, frame: Frame) -> np.ndarray:
    """Polygons are drawn at the photo's own size, whatever size they were made on."""
    rings = shape if shape and isinstance(shape[0], list) else [shape]  # some tools write one without its brackets
    turned = is_turned(size, frame, "it was drawn on")
    drawn = []
    for ring in rings:
        points = _points(ring)
        if len(points) < POLYGON_POINTS_MIN:
            continue  # a line, which COCO has beside real rings
        slack = np.array([PIXEL_SLACK, PIXEL_SLACK]) / size
        fractions = points / size
        if (fractions < -slack).any() or (fractions > 1 + slack).any():
            far = points[((fractions < -slack) | (fractions > 1 + slack)).any(axis=1)][0]
            raise MaskRejected("mask_unreadable", f"vertex {far[0]:g}, {far[1]:g} is outside its photo")
        fractions = np.clip(turned_points(fractions, frame) if turned else fractions, 0.0, 1.0)
        drawn.append((fractions * (frame.width_px, frame.height_px)).ravel().tolist())
    if not drawn:
        raise MaskRejected("mask_unreadable", f"no polygon of it has {POLYGON_POINTS_MIN} points")
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(drawn, frame.height_px, frame.width_px)))


def _points(ring: Any) -> np.ndarray:
    try:
        flat = np.array(ring, np.float64)
    except (ValueError, TypeError, OverflowError):
        flat = np.array([math.nan])
    if flat.ndim != 1 or len(flat) % 2 or not np.isfinite(flat).all():
        raise MaskRejected("mask_unreadable", f"{one_line(ascii(ring), 80)} is no polygon [x, y, x, y, ...]")
    return flat.reshape(-1, 2)


def _of_runs(shape: Any, frame: Frame) -> np.ndarray:
    try:
        lengths, (height_px, width_px) = run_lengths(shape)
    except ValueError as error:
        raise MaskRejected("mask_unreadable", str(error)) from None
    is_turned((width_px, height_px), frame, "its size is")
    if width_px * height_px > MAX_IMAGE_PIXELS:  # before it takes memory
        said = f"its size is {width_px} x {height_px} px, more than {MAX_IMAGE_PIXELS} pixels"
        raise MaskRejected("mask_unreadable", said)
    values = (np.arange(len(lengths)) % 2).astype(np.uint8)
    return np.repeat(values, lengths).reshape(width_px, height_px).T


def run_lengths(shape: Any) -> tuple[np.ndarray, tuple[int, int]]:
    """Lengths of the runs of 0 and 1 in turn, column by column, and (height, width). Raises ValueError.

    shape: {"counts": ..., "size": [height, width]}, or whatever else a file has in its place.
    """
    try:
        counts = shape["counts"]
        height_px, width_px = (int(side) for side in shape["size"])
        lengths = np.array(_decoded(counts) if isinstance(counts, str) else counts, np.int64)
        # Python's sum: numpy's, of huge counts, overflows to a small number that fits
        adds_up = lengths.ndim == 1 and (lengths >= 0).all() and sum(lengths.tolist()) == height_px * width_px < 2**63
        if not adds_up or height_px < 1:
            raise ValueError
    except (ValueError, TypeError, KeyError, OverflowError):
        shown = one_line(ascii(shape), 80)
        raise ValueError(f"segmentation {shown} is no run-length encoded mask: its counts do not add up") from None
    return lengths, (height_px, width_px)


def _decoded(text: str) -> list[int]:
    """COCO's compressed run lengths: five bits per character, the third length on as difference to the last but one.

    Not by pycocotools, which trusts what it reads. Source: rleFrString of cocoapi, common/maskApi.c.
    """
    lengths: list[int] = []
    value = shift = 0
    for character in text.encode("ascii"):
        bits = character - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError(text)
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
            value = shift = 0
    return lengths


def _of_picture(name: str, read: Callable[[str], bytes], frame: Frame) -> np.ndarray:
    """White, non-transparent or of the palette's one colour that is not the first: the object."""
    try:
        data = read(name)
        picture = images.open_picture(data, max_bytes=len(data))
        is_turned((picture.header.width_px, picture.header.height_px), frame, f"{name} has")
        indices = images.read_palette_indices(data)
        if indices is not None:
            return _of_indices(name, indices)
        alpha = picture.upright_alpha()
        level = alpha if alpha is not None else images.decode(data, convert=False).max(axis=2)
    except OSError as error:
        raise MaskRejected("mask_unreadable", f"{name}: cannot be read ({error.strerror or error})") from None
    except images.ImageError as error:
        raise MaskRejected("mask_unreadable", f"{name}: {error}") from None
    if int(level.max()) == 1:  # as annotation tools store masks
        return level
    if 0 < int(level.max()) < OBJECT_LEVEL:
        raise MaskRejected("mask_ambiguous", f"{name}: its largest value is {level.max()} of 255; objects are white")
    grey = np.count_nonzero((level >= images.BLACK) & (level < images.WHITE))
    if grey > GREY_MAX * np.count_nonzero(level >= OBJECT_LEVEL):
        raise MaskRejected("mask_ambiguous", f"{name}: greys, where a mask is black and white with edges between")
    return (level >= OBJECT_LEVEL).astype(np.uint8)


def _of_indices(name: str, indices: np.ndarray) -> np.ndarray:
    objects = np.unique(indices[indices > 0])
    if len(objects) > 1:
        raise MaskRejected(
            "mask_ambiguous", f"{name}: a palette picture of {len(objects)} objects; write one file for each"
        )
    return (indices > 0).astype(np.uint8)


def _on_photo(mask: np.ndarray, frame: Frame) -> np.ndarray:
    """Turn and scale a mask to its photo. Raises NotOnPhotoError."""
    if is_turned((mask.shape[1], mask.shape[0]), frame, "its size is"):
        mask = turned_array(mask, frame)
    if mask.shape != (frame.height_px, frame.width_px):
        mask = cv2.resize(mask, (frame.width_px, frame.height_px), interpolation=cv2.INTER_NEAREST_EXACT)
    return np.ascontiguousarray(mask)
