"""The perceptual loss compares the photo that a prediction implies with the true one, by a frozen network's features.

Squared error alone makes a small model paint the mean of what could fill the hole: a patch of the right colour. Added
to it, this loss teaches edges, print and shapes in a tenth of the steps (pipelines/SPEEDRUN.md has the comparison). The
idea is PixelGen's (arXiv 2602.02493), which adds LPIPS and DINO features to x-prediction. Deviations from it: the
network is EfficientNet-lite0, without LPIPS's learned weights, and rows count whatever their noise. Upstream has no
such loss. Both photos are as the codec decodes them, not clamped: a clamp would stop gradients.
"""

import copy

import torch
from torch import Tensor

from pbe.model.backbone import load_backbone
from pbe.model.codec import Codec

# of EfficientNet-lite0, by stride in px. A run's name does not include them: after a change raise train's VERSION
LAST_BLOCKS = {2: 0, 4: 2, 8: 4, 16: 10, 32: 15}
CELLS_MIN = 2  # a side of a map; a map of one cell does not say where anything is
EPSILON = 1e-6  # of a cell's squared norm, so that cells without features have a gradient


class PerceptualLoss:
    """Holds its own copies of the codec and of EfficientNet-lite0 on one device."""

    def __init__(self, codec: Codec, device: torch.device) -> None:
        """codec: with a decoder that can be differentiated. Raises BackboneError if the network is not installed."""
        self._codec = copy.deepcopy(codec).to(device)
        self._network = load_backbone("efficientnet_lite0").to(device)

    def __call__(self, predicted: Tensor, x0: Tensor) -> Tensor:
        """(B,) float32 in [0, 4], for two batches of latents (B, C, h, w); only `predicted` gets a gradient.

        Each cell's features have unit norm, as LPIPS has them (Zhang et al., CVPR 2018). Their squared distance is
        averaged over cells, then over blocks.
        """
        with torch.no_grad():
            wanted = self._features(x0)
        found = self._features(predicted)
        distances = [(a - b).pow(2).sum(1).mean((1, 2)) for a, b in zip(found, wanted, strict=True)]
        return torch.stack(distances).mean(0)

    def _features(self, latents: Tensor) -> list[Tensor]:
        pixels = (self._codec.decode(latents) + 1) / 2
        blocks = [block for stride, block in LAST_BLOCKS.items() if pixels.shape[-1] >= CELLS_MIN * stride]
        maps = self._network.feature_maps(pixels, blocks)
        return [features / (features.pow(2).sum(1, keepdim=True) + EPSILON).sqrt() for features in maps]
