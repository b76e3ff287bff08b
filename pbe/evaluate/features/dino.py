"""DINO's class token as feature extractor. In a file of its own: transformers takes seconds to import.

dinov2, dinov2_with_registers   DINOv2 (Oquab et al. 2023), such as facebook/dinov2-base
vit                             DINO (Caron et al. 2021), such as facebook/dino-vits16: its similarity is DINO-I
                                as in DreamBooth (Ruiz et al. 2022); DINOv2's cannot be compared with it
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedModel,
    ViTConfig,
    ViTModel,
)

from pbe.data.images import centre_square, resize
from pbe.errors import one_line
from pbe.evaluate.features.extractors import CPU, SQUASH_RULE, Preprocessing, in_batches
from pbe.model.folder import STEMS
from pbe.model.tensors import WeightsError, folder_digest, read_folder, read_json, some_names

RESIZED_PX, INPUT_PX = 256, 224  # DINOv2's make_classification_eval_transform, DINO's eval_linear.py
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of pixels in [0, 1]
DINO_RULE = f"whole: PIL bicubic to 256 on the shorter side, centre crop of 224; region, reference: {SQUASH_RULE}"
_MODELS: dict[str, tuple[type, type[PreTrainedModel]]] = {
    "dinov2": (Dinov2Config, Dinov2Model),
    "dinov2_with_registers": (Dinov2WithRegistersConfig, Dinov2WithRegistersModel),
    "vit": (ViTConfig, ViTModel),
}
_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size")
_HEADS = ("classifier.", "pooler.")  # on top of the network, for other tasks


class DinoExtractor:
    """The class token after the last LayerNorm, in float32.

    Deviation: regions and references are squashed, as by the other extractors, for a centre crop would drop the ends of
    a hole.
    """

    name = "dino"
    resize_rule = DINO_RULE
    matches_resolution = True
    paper = cmmds_network = False  # no number of the paper or of CMMD is by it

    def __init__(self, network: PreTrainedModel, *, digest: str) -> None:
        self.digest = digest
        self._network = network.float().eval().requires_grad_(False)

    def __call__(
        self, images: Sequence[np.ndarray], *, preprocessing: Preprocessing = "whole", batch_rows: int
    ) -> np.ndarray:
        mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))

        def features(batch: Sequence[np.ndarray]) -> Tensor:
            pixels = torch.from_numpy(np.stack([_pixels(image, preprocessing) for image in batch])).permute(0, 3, 1, 2)
            scaled = (pixels.float() / 255 - mean) / std
            with torch.no_grad():
                found = self._network(pixel_values=scaled.to(self._network.device))
            return found.last_hidden_state[:, 0]

        return in_batches(images, features, width=int(self._network.config.hidden_size), batch_rows=batch_rows)


def _pixels(image: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """(224, 224, 3) uint8."""
    if preprocessing != "whole":
        return resize(image, width_px=INPUT_PX, height_px=INPUT_PX)
    margin = (RESIZED_PX - INPUT_PX) // 2
    return centre_square(image, RESIZED_PX, resampling="bicubic")[margin:-margin, margin:-margin]


def load_dino_extractor(folder: Path, *, device: torch.device = CPU) -> DinoExtractor:
    """Load DINOv2, with or without registers, or DINO from a hub-style folder, also below a classifier.

    Raises WeightsError.
    """
    raw = read_json(folder / "config.json")
    if raw.get("model_type") not in _MODELS:
        raise WeightsError(f"{folder}: a {raw.get('model_type')} model; kind dino takes {', '.join(_MODELS)}")
    if missing := [key for key in _NEEDED if key not in raw]:
        raise WeightsError(f"{folder}: config.json lacks {', '.join(missing)}")
    config_class, network_class = _MODELS[raw["model_type"]]
    try:
        config = config_class(**raw)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise WeightsError(f"{folder}: config.json: {one_line(error, 200)}") from None
    if INPUT_PX % config.patch_size or (config.model_type == "vit" and config.image_size != INPUT_PX):
        raise WeightsError(
            f"{folder}: patches of {config.patch_size} px, pictures of {config.image_size} px; this extractor takes "
            f"networks for {INPUT_PX} px"
        )
    tensors = {name: value for name, value in read_folder(folder, *STEMS).items() if not name.startswith(_HEADS)}
    # transformers maps the published names to its own, which change with its version
    network, info = network_class.from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **({"add_pooling_layer": False} if network_class is ViTModel else {}),
    )
    wrong = {
        "missing": info["missing_keys"],
        "unexpected": info["unexpected_keys"],
        "of another shape": {name for name, *_ in info["mismatched_keys"]},
    }
    if any(wrong.values()):
        parts = (f"{what} {len(names)} such as {some_names(names)}" for what, names in wrong.items() if names)
        raise WeightsError(f"{folder}: these weights do not fit config.json: {'; '.join(parts)}")
    return DinoExtractor(network.to(device), digest=folder_digest(folder, *STEMS))
