"""Hole masks: the extended box as a rectangle, and the Bezier shape around the tight box.

`hole_mask` is uint8, 1 where the edit goes, 0 where the photo is kept.
Source: upstream ldm/data/open-images.py. The paper's text says 20 points per curve and
offsets of 1-5 px; the code, which trained the published weights, samples 18 (t = 0.05 .. 0.90) and draws
offsets from [-5, 5]. The code's values are the default.
Deviation: upstream skips a point whose x or y equals one already taken, an accident of float ties in
symmetric parabolas (11-17 of 18 points survive); we keep all points.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import cv2
import numpy as np

from pbe.data import images
from pbe.data.boxes import Box
from pbe.data.schema import HoleKind
from pbe.errors import UserError

MaskResize = Literal["bilinear", "nearest"]
HOLE_KINDS: tuple[HoleKind, ...] = get_args(HoleKind)
_POLYGON_SHIFT = 4  # corners are drawn to a sixteenth of a pixel


class MaskError(UserError, ValueError):
    """A picture is no mask; the message says why, to follow the file's name."""


def read_hole_mask(picture: images.Picture) -> np.ndarray:
    """(H, W) bool, upright, of a mask that somebody painted: True where any channel is 128 or more.

    Upstream also splits soft edges in the middle. A picture of 0 and 1 alone, as annotation tools store masks, is read
    as black and white. Raises MaskError for a picture that is neither, ImageError for one that does not decode.
    """
    if picture.upright_alpha() is not None:
        raise MaskError("has transparent parts; a mask is black and white, without transparency")
    exif_orientation = picture.header.exif_orientation
    level = images.decode(picture.data, exif_orientation=exif_orientation, convert=False).max(axis=2)
    most = int(level.max())
    if most == 1:
        return level == 1
    if 0 < most < images.BLACK:
        raise MaskError(f"its largest value is {most} of 255; a mask is white (255) where the edit goes")
    if most == 0 and images.read_mode(picture.data).startswith("I"):
        raise MaskError("no value of its 16 bits reaches 256 of 65535; save it with 8 bits, white where the edit goes")
    painted = np.count_nonzero(level >= images.BLACK)
    grey = np.count_nonzero((level >= images.BLACK) & (level < images.WHITE))
    if grey > painted / 2:
        raise MaskError("mostly greys where it is not black; a mask is white where the edit goes")
    return level >= 128


def box_hole(ends_px: tuple[float, float, float, float], *, width_px: int, height_px: int) -> np.ndarray:
    """(height, width) uint8: 1 where a pixel's centre lies in the box x0, y0, x1, y1, which may end between pixels."""
    x0, y0, x1, y1 = (max(math.ceil(end - 0.5), 0) for end in ends_px)
    hole_mask = np.zeros((height_px, width_px), np.uint8)
    hole_mask[y0:y1, x0:x1] = 1
    return hole_mask


def bezier_ring(box: Box, ext: Box, *, points_per_side: int, jitter_px: int, rng: np.random.Generator) -> np.ndarray:
    """(4 * points_per_side, 2) float64: the closed outline, x and y in pixels, clockwise from the top left.

    Side k is the quadratic Bezier B(t) = (1-t)^2 p0 + 2 t (1-t) c + t^2 p1 between two corners of the tight
    box, with c = the side's midpoint pushed out to the extended box, at t = 0.05 i, i = 1 .. points_per_side
    (for 18 points; in general t = 0.9 i / points_per_side); then jitter in [-jitter_px, jitter_px] on x and y.
    """
    mid_x, mid_y = (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2
    sides = (
        ((box.x0, box.y0), (mid_x, ext.y0), (box.x1, box.y0)),
        ((box.x1, box.y0), (ext.x1, mid_y), (box.x1, box.y1)),
        ((box.x1, box.y1), (mid_x, ext.y1), (box.x0, box.y1)),
        ((box.x0, box.y1), (ext.x0, mid_y), (box.x0, box.y0)),
    )
    ring = (_quadratic_bezier(points_per_side) @ np.array(sides)).reshape(-1, 2)
    return ring + rng.integers(-jitter_px, jitter_px, size=ring.shape, endpoint=True)


@functools.cache
def _quadratic_bezier(points_per_side: int) -> np.ndarray:
    """(points, 3) weights of p0, c and p1."""
    t = 0.9 * np.arange(1, points_per_side + 1) / points_per_side
    return np.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2], axis=1)


def bezier_hole(ring: np.ndarray, *, width_px: int, height_px: int) -> np.ndarray:
    """(height, width) uint8: the polygon filled with 1; points outside the image are clipped by the fill.

    ring: (N, 2) x and y in pixels, which may lie between pixels; pixel k covers k to k + 1.
    """
    hole_mask = np.zeros((height_px, width_px), np.uint8)
    # OpenCV counts from the pixels' centres, in whole steps of 2 ** -shift
    cv2.fillPoly(hole_mask, [np.round((ring - 0.5) * 2**_POLYGON_SHIFT).astype(np.int32)], 1, shift=_POLYGON_SHIFT)
    return hole_mask


def segmentation_hole(
    object_mask: np.ndarray, *, dilate_px: int, jitter_px: int, rng: Callable[[], np.random.Generator]
) -> np.ndarray:
    """(H, W) uint8: a mask of 0/1, grown by a disc of radius `dilate_px`, with every point of its outline moved.

    jitter_px: by which it moves at most in x and y, uniformly, as a Bezier hole's points; the outline has a point in
    every 2 * jitter_px pixels. rng: makes the generator, where there is jitter. Holes inside the object stay holes of
    the mask, but for the jitter, which fills them.
    """
    hole_mask = object_mask
    if dilate_px:
        hole_mask = np.zeros_like(object_mask)
        x, y, width, height = cv2.boundingRect(object_mask)  # the rest stays empty
        rows = slice(max(0, y - dilate_px), y + height + dilate_px)
        columns = slice(max(0, x - dilate_px), x + width + dilate_px)
        hole_mask[rows, columns] = cv2.dilate(object_mask[rows, columns], _disc(dilate_px))
    if not jitter_px:
        return hole_mask
    outlines, _ = cv2.findContours(hole_mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    rings = [outline[:: 2 * jitter_px, 0] for outline in outlines]
    generator = rng()
    moved = [ring + generator.integers(-jitter_px, jitter_px, size=ring.shape, endpoint=True) for ring in rings]
    jittered = np.zeros_like(hole_mask)
    cv2.fillPoly(jittered, [ring.astype(np.int32) for ring in moved], 1)
    return jittered


@functools.cache
def _disc(radius_px: int) -> np.ndarray:
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius_px + 1, 2 * radius_px + 1))


def pack_mask(mask: np.ndarray) -> bytes:
    """Pack an (H, W) mask of 0/1 into 1 bit per pixel, rows padded to bytes."""
    return np.packbits(mask, axis=1).tobytes()


def unpack_mask(data: bytes, *, width_px: int, height_px: int) -> np.ndarray:
    """Inverse of pack_mask: (height, width) uint8 of 0/1."""
    rows = np.frombuffer(data, np.uint8).reshape(height_px, -1)
    return np.unpackbits(rows, axis=1, count=width_px)


def hole_kinds_of(row: Mapping[str, Any]) -> list[HoleKind]:
    """The kinds of hole that a TRIPLETS or BENCH row has."""
    return [kind for kind in HOLE_KINDS if row.get(f"{kind}_hole_mask") is not None]


def hole_of(row: Mapping[str, Any], kind: str, picture: np.ndarray) -> np.ndarray:
    """Hole mask of a TRIPLETS or BENCH row: (H, W) uint8, 1 = hole, of the size of `picture` (H, W, 3)."""
    height_px, width_px = picture.shape[:2]
    return unpack_mask(row[f"{kind}_hole_mask"], width_px=width_px, height_px=height_px)


def keep_mask_latent(hole_mask: np.ndarray, cell_px: int, *, resize: MaskResize = "bilinear") -> np.ndarray:
    """Turn an (H, W) 0/1 hole mask into the network's (1, H/cell, W/cell) float32 keep mask in [0, 1].

    Bilinear without antialias, as upstream's torchvision 0.12 Resize: for an even cell that is the mean of
    its central 2 x 2 pixels; for an odd cell its central pixel. Nearest, as in diffusers' pipeline: its top-left pixel.
    """
    if resize == "nearest":
        return 1.0 - hole_mask[None, ::cell_px, ::cell_px].astype(np.float32)
    low, high = (cell_px - 1) // 2, cell_px // 2
    hole = hole_mask.astype(np.float32)
    cells = [hole[dy::cell_px, dx::cell_px] for dy in (low, high) for dx in (low, high)]
    return 1.0 - np.mean(cells, axis=0)[None].astype(np.float32)
