"""Images to feature vectors: the one way from pixels to what the metrics compare.

Counterpart upstream: the CLIP preprocess of eval_tool/fid (bicubic, centre crop) and of eval_tool/clip_score
(squash).
Deviation: one rule for all metrics, the squash; a hole's region is rarely square and a centre crop would drop
its ends.
"""

from collections.abc import Sequence

import numpy as np
import torch

from pbe.data.images import resize
from pbe.model.backbone import EfficientNetLite

RESIZE_RULE = "cv2 squash to 224 x 224, INTER_AREA if both sides shrink below a quarter, else INTER_LINEAR"


def extract(backbone: EfficientNetLite, images: Sequence[np.ndarray], *, batch_rows: int) -> np.ndarray:
    """N images (H, W, 3) uint8 RGB of any sizes to (N, width) float64 pooled features, in the order given.

    `batch_rows` images are run at a time; it bounds memory and does not change the result beyond float32
    rounding. Not normalised. No images give (0, width). Raises ValueError for another shape or dtype.
    """
    if batch_rows < 1:
        raise ValueError(f"batch_rows {batch_rows} must be at least 1")
    features = np.empty((len(images), backbone.width), np.float64)
    device = next(backbone.parameters()).device
    for start in range(0, len(images), batch_rows):
        rows = np.stack([_squash(image, backbone.input_px) for image in images[start : start + batch_rows]])
        batch = torch.from_numpy(rows).permute(0, 3, 1, 2).to(device)
        features[start : start + batch_rows] = backbone(batch).cpu().numpy()
    return features


def _squash(image: np.ndarray, side_px: int) -> np.ndarray:
    """(H, W, 3) uint8 to (side, side, 3) uint8 by RESIZE_RULE."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"image: {image.dtype} {image.shape}, expected uint8 (H, W, 3)")
    return resize(image, width_px=side_px, height_px=side_px)
