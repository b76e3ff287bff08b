"""Feature extractors of the metrics, each with its name, the digest of its weights and its resize rules.

    efficientnet_lite0, _lite2   ImageNet weights from pip packages: the sample's extractors
    clip                         CLIP ViT-B/32 `encode_image`, as upstream: clip_fid, qs, clip_score (clip.py)
    dino                         class token of DINOv2 or DINO (dino.py)
    inception                    TF's Inception pool3 from its TorchScript file: fid

Preprocessing depends on the picture: `whole` (Frechet, KID, quality), `region` (the box of a hole) or `reference` (what
the region is compared with). Upstream resizes each differently, as does `clip` here; `dino` crops what is whole. The
others have one rule, the squash: a hole's region is rarely square, and a centre crop would drop its ends.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from pbe.data.images import resize
from pbe.model.backbone import EfficientNetLite
from pbe.model.network_file import open_torchscript, read_network
from pbe.model.tensors import WeightsError

CPU = torch.device("cpu")
Preprocessing = Literal["whole", "region", "reference"]
SQUASH_RULE = "cv2 squash to 224 x 224, INTER_AREA if both sides shrink below a quarter, else INTER_LINEAR"
INCEPTION_RULE = "inside the TorchScript file, from the picture's own size"


class Extractor(Protocol):
    """A feature extractor. `matches_resolution`: it needs references resized to their region's resolution."""

    name: str
    digest: str
    resize_rule: str
    matches_resolution: bool
    paper: bool  # the network whose numbers are published
    cmmds_network: bool  # CLIP ViT-L/14 at 336 px, whose CMMD is published

    def __call__(
        self, images: Sequence[np.ndarray], *, preprocessing: Preprocessing = "whole", batch_rows: int
    ) -> np.ndarray:
        """Map N images (H, W, 3) uint8 RGB of any sizes to (N, width) float64 in their order, not normalised.

        Runs `batch_rows` images at a time, which bounds memory and affects only float32 rounding. Raises ValueError
        for another shape or dtype.
        """
        ...


class EfficientNetExtractor:
    resize_rule = SQUASH_RULE
    matches_resolution = True
    paper = cmmds_network = False

    def __init__(self, backbone: EfficientNetLite) -> None:
        self.name, self.digest, self._backbone = backbone.name, backbone.digest, backbone

    def __call__(
        self, images: Sequence[np.ndarray], *, preprocessing: Preprocessing = "whole", batch_rows: int
    ) -> np.ndarray:
        side = self._backbone.input_px

        def features(batch: Sequence[np.ndarray]) -> Tensor:
            rows = np.stack([resize(image, width_px=side, height_px=side) for image in batch])
            device = next(self._backbone.parameters()).device
            return self._backbone(torch.from_numpy(rows).permute(0, 3, 1, 2).to(device))

        return in_batches(images, features, width=self._backbone.width, batch_rows=batch_rows)


class InceptionExtractor:
    """The file resizes and scales inside: it takes uint8 pictures and gives pool3 with `return_features=True`, as
    stylegan2-ada-pytorch's and clean-fid's `inception-2015-12-05.pt`."""

    name = "inception"
    resize_rule = INCEPTION_RULE
    matches_resolution = True
    paper = True
    cmmds_network = False

    def __init__(self, network: Any, *, digest: str, device: torch.device = CPU) -> None:
        self.digest, self._network, self._device = digest, network, device

    def __call__(
        self, images: Sequence[np.ndarray], *, preprocessing: Preprocessing = "whole", batch_rows: int
    ) -> np.ndarray:
        def features(batch: Sequence[np.ndarray]) -> Tensor:
            with torch.no_grad():  # one by one: pictures of one batch may differ in size
                rows = [torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None] for image in batch]
                return torch.cat([self._network(row.to(self._device), return_features=True).flatten(1) for row in rows])

        return in_batches(images, features, width=None, batch_rows=batch_rows)


def load_inception_extractor(file: Path, *, sha256: str, device: torch.device = CPU) -> InceptionExtractor:
    """Load a TorchScript file. It is code, so its SHA-256 must be the expected one. Raises WeightsError."""
    network = open_torchscript(read_network(file), where=str(file), sha256=sha256, device=device)
    return InceptionExtractor(network, digest=sha256[:16], device=device)


def in_batches(images: Sequence[np.ndarray], features: Any, *, width: int | None, batch_rows: int) -> np.ndarray:
    """Return the features of all images, (N, width). features: maps a batch of images to its features."""
    if batch_rows < 1:
        raise ValueError(f"batch_rows {batch_rows} must be at least 1")
    for image in images:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError(f"image: {image.dtype} {image.shape}, expected uint8 (H, W, 3)")
    if not len(images):
        return np.empty((0, width or 0), np.float64)
    rows = [features(images[start : start + batch_rows]) for start in range(0, len(images), batch_rows)]
    found = torch.cat([row.cpu() for row in rows]).numpy().astype(np.float64)
    if not np.isfinite(found).all():
        raise WeightsError("the feature extractor gives NaN or infinite features; its weights are damaged")
    return found
