"""CLIP as feature extractor. In a file of its own: transformers takes seconds to import."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import CLIPVisionModelWithProjection

from pbe.data.images import centre_square, resize_antialiased
from pbe.evaluate.features.extractors import CPU, Preprocessing, in_batches
from pbe.model.clip import MEAN, STD, clip_tensors, vision_config
from pbe.model.folder import STEMS
from pbe.model.tensors import WeightsError, folder_digest, new_loaded, read_folder, read_json

PROJECTION = "visual_projection.weight"
CLIP_RULE = "whole: PIL bicubic to the shorter side, centre crop; region: bilinear squash without antialias"
VIT_B_32 = {"hidden_size": 768, "num_hidden_layers": 12, "patch_size": 32, "image_size": 224}
VIT_L_14_336 = {"hidden_size": 1024, "num_hidden_layers": 24, "patch_size": 14, "image_size": 336}


class ClipExtractor:
    """CLIP's projected class token: upstream's encode_image, in float32 (upstream: float16 on CUDA).

    `paper` is True if the sizes are those of ViT-B/32, `cmmds_network` if they are those of ViT-L/14 at 336 px.
    """

    name = "clip"
    resize_rule = CLIP_RULE
    matches_resolution = False  # upstream compares with the reference at full size

    def __init__(self, network: CLIPVisionModelWithProjection, *, digest: str) -> None:
        self.digest = digest
        self._network = network.float().eval().requires_grad_(False)
        self._side = int(network.config.image_size)
        self.paper, self.cmmds_network = (
            all(getattr(network.config, key) == value for key, value in sizes.items())
            for sizes in (VIT_B_32, VIT_L_14_336)
        )

    def __call__(
        self, images: Sequence[np.ndarray], *, preprocessing: Preprocessing = "whole", batch_rows: int
    ) -> np.ndarray:
        mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))

        def features(batch: Sequence[np.ndarray]) -> Tensor:
            pixels = torch.stack([self._pixels(image, preprocessing) for image in batch])
            with torch.no_grad():
                found = self._network(pixel_values=((pixels - mean) / std).to(self._network.device))
            return found.image_embeds

        width = int(self._network.config.projection_dim)
        return in_batches(images, features, width=width, batch_rows=batch_rows)

    @property
    def input_px(self) -> int:
        return self._side

    def of_pixels(self, pixels: Tensor) -> Tensor:
        """(B, 3, side, side) float32 in [0, 1] to (B, width) float32, with a gradient."""
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (MEAN, STD))
        return self._network(pixel_values=(pixels - mean) / std).image_embeds

    def _pixels(self, image: np.ndarray, preprocessing: Preprocessing) -> Tensor:
        """(3, side, side) in [0, 1]. Sources: OpenAI's CLIP preprocess (whole), upstream region_clip_score (the
        others)."""
        side = self._side
        if preprocessing == "region":  # resizing commutes with the normalisation, which upstream does before it
            tensor = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 255
            return interpolate(tensor, (side, side), mode="bilinear", align_corners=False, antialias=False)[0]
        if preprocessing == "reference":
            picture = resize_antialiased(image, width_px=side, height_px=side, resampling="bicubic")
        else:
            picture = centre_square(image, side, resampling="bicubic")
        return torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1).float() / 255


def load_clip_extractor(folder: Path, *, device: torch.device = CPU) -> ClipExtractor:
    """Load CLIP from a hub-style folder (whole, or its vision part with projection). Raises WeightsError."""
    raw = read_json(folder / "config.json")
    config = vision_config(raw, str(folder))
    tensors = read_folder(folder, *STEMS)
    if PROJECTION not in tensors:
        raise WeightsError(
            f"{folder}: has no {PROJECTION}: the metrics need CLIP with its projection, not a bare encoder"
        )
    config.projection_dim = tensors[PROJECTION].shape[0]
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        names = CLIPVisionModelWithProjection(config).state_dict()
    nested = any(name.startswith("vision_model.vision_model.") for name in names)
    prefix = "vision_model.vision_model." if nested else "vision_model."
    named = {f"{prefix}{name}": value for name, value in clip_tensors(tensors).items()}
    named[PROJECTION] = tensors[PROJECTION]
    network = new_loaded(lambda: CLIPVisionModelWithProjection(config), named, str(folder))
    return ClipExtractor(network.to(device), digest=folder_digest(folder, *STEMS))
