"""What of a photo is edited, and how its fill returns into it: by this project, upstream's scripts, and diffusers.

Ours edits the square around the hole and pastes the hole back. The others squash the whole photo to the model's square
and return what the codec decodes. Sources: upstream's scripts/inference.py and inference_test_bench.py; diffusers'
PaintByExamplePipeline.
"""

from dataclasses import dataclass, replace
from typing import Literal

import cv2
import numpy as np

from pbe.data import images
from pbe.data.boxes import Box, context_side_px
from pbe.data.images import Resampling
from pbe.data.masks import MaskResize
from pbe.encode import Levels

CONTEXT_FACTOR = 1.6  # by default: side of the edited square / longer side of the hole, if the photo has room
PAD_GREY = 128
HOLE_LEVEL = 128  # of a mask's 0 to 255; what is less is kept

Fit = Literal["squash", "pad", "crop"]


@dataclass(frozen=True)
class EditProtocol:
    """How inputs and outputs are processed before and after the network."""

    area: Literal["window", "photo"] = "window"  # what is edited: the square around the hole, or the squashed photo
    paste_back: bool = True  # keep pixels outside the hole; False: all that the codec decodes replaces the photo
    feather_frac: float = 0.01  # width of the blend inside the hole's edge / side of the square
    resampling: Resampling = "bilinear"  # of photo and reference: as in training, or Pillow's bicubic
    reference_fit: Fit = "squash"  # how references become the encoder's square
    masked_latent: Literal["mean", "sample"] = "mean"  # of the codec's posterior
    mask_resize: MaskResize = "bilinear"  # to latent cells
    timesteps: Literal["asked", "upstream"] = "asked"  # upstream: more than asked where steps do not divide 1000
    levels: Levels = "nearest"  # decoded values to whole levels


OURS = EditProtocol()
_SCRIPT = EditProtocol(area="photo", paste_back=False, resampling="bicubic", masked_latent="sample")
UPSTREAM = replace(_SCRIPT, timesteps="upstream", levels="below")  # scripts/inference.py, inference_test_bench.py
DIFFUSERS = replace(_SCRIPT, reference_fit="crop", mask_resize="nearest")  # PaintByExamplePipeline


@dataclass(frozen=True)
class Cut:
    """The part of a photo that is edited, resized to the model's square."""

    window: Box  # in the photo
    source: np.ndarray  # (S, S, 3) uint8
    hole_mask: np.ndarray  # (S, S) of 0/1


def cut(photo: np.ndarray, hole_mask: np.ndarray, side_px: int, context_factor: float, protocol: EditProtocol) -> Cut:
    """The part of a photo (H, W, 3) uint8 to edit. hole_mask (H, W), non-zero in the hole; context_factor: side of the
    square / longer side of the hole's box. Raises ValueError if the hole vanishes at the model's size."""
    height_px, width_px = hole_mask.shape
    window = Box(0, 0, width_px, height_px) if protocol.area == "photo" else _window(hole_mask, context_factor)
    rows, columns = slice(window.y0, window.y1), slice(window.x0, window.x1)
    source = _resized(photo[rows, columns], side_px, side_px, protocol)
    hole = hole_mask[rows, columns] != 0
    if protocol.area == "photo":  # as masks are resized for both: the picture by Pillow, its middle grey splits it
        level = images.resize_antialiased(
            np.where(hole, np.uint8(255), np.uint8(0)), width_px=side_px, height_px=side_px, resampling="bicubic"
        )
        if level.max() < HOLE_LEVEL:
            raise ValueError(f"hole_mask vanishes where the photo becomes {side_px} x {side_px} px; enlarge the hole")
        return Cut(window, source, (level >= HOLE_LEVEL).astype(np.uint8))
    # a pixel with any hole in it is hole: if the model saw it as known, hidden content would return
    cover = images.resize(hole.astype(np.float32), width_px=side_px, height_px=side_px)
    return Cut(window, source, (cover > 0).astype(np.uint8))


def _resized(picture: np.ndarray, width_px: int, height_px: int, protocol: EditProtocol) -> np.ndarray:
    if protocol.resampling == "bilinear":
        return images.resize(picture, width_px=width_px, height_px=height_px)
    return images.resize_antialiased(picture, width_px=width_px, height_px=height_px, resampling="bicubic")


def paste(photo: np.ndarray, hole_mask: np.ndarray, cut: Cut, fill: np.ndarray, protocol: EditProtocol) -> np.ndarray:
    """The edit (H, W, 3) uint8: a copy of the photo with the fill (S, S, 3) uint8 of its cut."""
    window = cut.window
    rows, columns = slice(window.y0, window.y1), slice(window.x0, window.x1)
    grown = _resized(fill, window.width_px, window.height_px, protocol)
    edit = photo.copy()
    if protocol.paste_back:
        hole = (hole_mask[rows, columns] != 0).astype(np.uint8)
        _feather(grown, edit[rows, columns], hole, round(protocol.feather_frac * max(hole.shape)))
        edit[rows, columns][hole > 0] = grown[hole > 0]
    else:
        edit[rows, columns] = grown
    return edit


def _feather(fill: np.ndarray, photo: np.ndarray, hole: np.ndarray, feather_px: int) -> None:
    """Inside the hole's edge, blend the fill in place with the colour of the nearest known pixel.

    Never with the hidden pixels, which must not reappear.
    """
    if not feather_px or hole.all():
        return
    distance, nearest = cv2.distanceTransformWithLabels(hole, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    known, ring = hole == 0, (hole > 0) & (distance <= feather_px)
    colours = np.zeros((int(nearest.max()) + 1, 3), np.uint8)
    colours[nearest[known]] = photo[known]
    weight = (distance[ring] / (feather_px + 1))[:, None]
    fill[ring] = np.round(weight * fill[ring] + (1 - weight) * colours[nearest[ring]]).astype(np.uint8)


def fit_reference(reference: np.ndarray, side_px: int, protocol: EditProtocol) -> np.ndarray:
    """The reference as (side, side, 3): squashed, as upstream; padded with grey; or centre-cropped, as in diffusers."""
    height_px, width_px = reference.shape[:2]
    if protocol.reference_fit == "squash":
        return _resized(reference, side_px, side_px, protocol)
    if protocol.reference_fit == "crop" and protocol.resampling == "bicubic":
        return images.centre_square(reference, side_px, resampling="bicubic", odd="down")
    if protocol.reference_fit == "crop":  # crop first: resizing a whole narrow strip would make it enormous
        side = min(height_px, width_px)
        top, left = (height_px - side) // 2, (width_px - side) // 2
        return images.resize(reference[top : top + side, left : left + side], width_px=side_px, height_px=side_px)
    scale = side_px / max(height_px, width_px)
    high, wide = max(1, round(scale * height_px)), max(1, round(scale * width_px))
    out = np.full((side_px, side_px, 3), PAD_GREY, np.uint8)
    top, left = (side_px - high) // 2, (side_px - wide) // 2
    out[top : top + high, left : left + wide] = _resized(reference, wide, high, protocol)
    return out


def _window(hole_mask: np.ndarray, context_factor: float) -> Box:
    """The square to edit around all of the hole (H, W); the whole photo if no square holds it with a known pixel."""
    height_px, width_px = hole_mask.shape
    ys, xs = np.flatnonzero(hole_mask.any(axis=1)), np.flatnonzero(hole_mask.any(axis=0))
    hole = Box(int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1)
    side = context_side_px(hole, context_factor, width_px=width_px, height_px=height_px)
    left = min(max((hole.x0 + hole.x1 - side) // 2, 0), width_px - side)
    top = min(max((hole.y0 + hole.y1 - side) // 2, 0), height_px - side)
    window = Box(left, top, left + side, top + side)
    known = not hole_mask[window.y0 : window.y1, window.x0 : window.x1].all()
    return window if known and window.contains(hole) else Box(0, 0, width_px, height_px)
