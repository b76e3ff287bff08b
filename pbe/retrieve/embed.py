"""Crops to unit vectors, with the backbone that also conditions the model.

A crop is cut and squashed as training's references are, but never loses its background: a picture that a user looks
for has no mask.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from pbe.data import images
from pbe.data.boxes import Box, padded, pixel_box
from pbe.errors import UserError
from pbe.model.backbone import Backbone


class EmbeddingError(UserError):
    """The backbone's features are of no use."""


class FindError(UserError, ValueError):
    """The question does not fit the index."""


def area_of(row: Mapping[str, Any], photo: np.ndarray, pad_px: int) -> Box:
    """The part of the (H, W, 3) photo that is the exemplar of a box: the box and `pad_px` around it, as in training.

    row: has xmin, xmax, ymin and ymax in fractions of the photo.
    """
    size = {"width_px": photo.shape[1], "height_px": photo.shape[0]}
    return padded(pixel_box(row["xmin"], row["xmax"], row["ymin"], row["ymax"], **size), pad_px, **size)


def squashed(crop: np.ndarray, backbone: Backbone) -> np.ndarray:
    """(H, W, 3) uint8 to the backbone's square, as training's references."""
    return images.resize(crop, width_px=backbone.input_px, height_px=backbone.input_px)


def embed(squares: Sequence[np.ndarray], names: Sequence[str], backbone: Backbone, device: torch.device) -> np.ndarray:
    """(n, width) float32 unit vectors of (R, R, 3) uint8 pictures: the class token, or its substitute.

    Raises EmbeddingError, which names the picture, for features that are NaN, infinite or zero.
    """
    batch = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).contiguous().to(device)
    features = backbone(batch).cpu().numpy().astype(np.float32)
    lengths = np.linalg.norm(features, axis=1)
    wrong = np.flatnonzero(~np.isfinite(lengths) | (lengths == 0))
    if len(wrong):
        raise EmbeddingError(
            f"{names[wrong[0]]}: the features of backbone {backbone.name} {backbone.digest} are NaN, infinite or "
            "zero; its weights are damaged, or the picture is"
        )
    return features / lengths[:, None]


def backbone_key(backbone: Backbone) -> str:
    """Name and digest: vectors are comparable if these are equal."""
    return f"{backbone.name} {backbone.digest}"


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
