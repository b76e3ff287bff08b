"""CLIP's vision transformer, from transformers, as exemplar backbone. The paper uses ViT-L/14.

Upstream: ldm/modules/encoders/modules.py `FrozenCLIPImageEmbedder`. Files spell tensor names in three ways, and all
are read: `vision_model.*`; flat, since transformers 5.6; and either of these below `model.`, in Paint by Example's
image encoder.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from pbe.model.folder import STEMS
from pbe.model.tensors import WeightsError, folder_digest, new_loaded, read_folder, read_json

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of pixels in [0, 1]; upstream open-images.py, OpenAI's CLIP
STD = (0.26862954, 0.26130258, 0.27577711)
_PARTS = ("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm.")  # the misspelling is CLIP's


class ClipBackbone(nn.Module):
    """A CLIP vision model in eval mode, without gradients.

    Computes in float32, or as `compute_in` says; always returns float32. `digest` identifies the weights.
    """

    name = "clip"
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, network: CLIPVisionModel, *, digest: str) -> None:
        super().__init__()
        self.network = network.float().eval().requires_grad_(False)
        self.digest = digest
        self.register_buffer("pixel_mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("pixel_std", torch.tensor(STD)[:, None, None], persistent=False)

    @property
    def config(self) -> CLIPVisionConfig:
        return self.network.config

    @property
    def width(self) -> int:
        return self.config.hidden_size

    @property
    def input_px(self) -> int:
        return self.config.image_size

    @property
    def token_count(self) -> int:
        """The class token and the patches: 257 for ViT-L/14."""
        return 1 + (self.config.image_size // self.config.patch_size) ** 2

    def train(self, mode: bool = True) -> "ClipBackbone":
        return super().train(False)

    def compute_in(self, dtype: torch.dtype) -> "ClipBackbone":
        self.network.to(dtype)  # pixels are still normalised in float32
        return self

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, R, R) uint8 RGB to (B, width): the class token after the last LayerNorm, no visual projection."""
        return self._run(images).pooler_output.float()

    def tokens(self, images: Tensor) -> Tensor:
        """(B, 3, R, R) uint8 RGB to (B, 1 + patches, width): all tokens after the last LayerNorm, class token first."""
        norm = getattr(self.network, "vision_model", self.network).post_layernorm
        with torch.no_grad():
            return norm(self._run(images).last_hidden_state).float()

    def _run(self, images: Tensor) -> Any:
        side = self.input_px
        if images.dtype != torch.uint8 or images.shape[1:] != (3, side, side):
            raise ValueError(f"images: {images.dtype} {tuple(images.shape)}, expected uint8 (B, 3, {side}, {side})")
        # Features are stored and compared across processes, so the caller's autocast must not matter.
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return self._run_pixels(images.to(torch.float32) / 255)

    def of_pixels(self, pixels: Tensor) -> Tensor:
        """(B, 3, R, R) float32 in [0, 1] to (B, width), with a gradient."""
        return self._run_pixels(pixels).pooler_output.float()

    def _run_pixels(self, pixels: Tensor) -> Any:
        scaled = (pixels - self.pixel_mean) / self.pixel_std
        return self.network(pixel_values=scaled.to(self.network.dtype))


def load_clip(folder: Path) -> ClipBackbone:
    """Load a CLIP model (its vision part), a CLIP vision model, or the image_encoder of a Paint by Example folder.

    Raises WeightsError.
    """
    config = vision_config(read_json(folder / "config.json"), str(folder))
    network = loaded_clip(config, clip_tensors(read_folder(folder, *STEMS)), str(folder))
    return ClipBackbone(network, digest=folder_digest(folder, *STEMS))


def vision_config(raw: Mapping[str, Any], where: str) -> CLIPVisionConfig:
    """The vision part of a CLIP config. Raises WeightsError for any other model.

    An image encoder that diffusers has saved again has its values at the top level, and defaults in `vision_config`.
    """
    inner = raw if "hidden_size" in raw else raw.get("vision_config", raw)
    if raw.get("model_type", "clip_vision_model") not in ("clip", "clip_vision_model"):
        raise WeightsError(f"{where}: a {raw['model_type']} model, not CLIP")
    known = set(CLIPVisionConfig().to_dict()) - {"architectures", "model_type", "torch_dtype", "dtype"}
    missing = [key for key in ("hidden_size", "num_hidden_layers", "patch_size") if key not in inner]
    if missing:
        raise WeightsError(f"{where}: not a CLIP vision config: missing {', '.join(missing)}")
    return CLIPVisionConfig(**{key: value for key, value in inner.items() if key in known})


def new_clip(config: CLIPVisionConfig) -> CLIPVisionModel:
    """A network with random weights and sdpa attention."""
    config._attn_implementation = "sdpa"
    return CLIPVisionModel(config)


def clip_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of CLIP's vision part under flat names, from any of the three spellings."""
    out = {}
    for name, value in tensors.items():
        flat = name.removeprefix("model.").removeprefix("vision_model.")
        if flat.startswith(_PARTS) and not flat.endswith("position_ids"):  # a counter that old files carry
            out[flat] = value
    return out


def loaded_clip(config: CLIPVisionConfig, tensors: Mapping[str, Tensor], where: str) -> CLIPVisionModel:
    """A network with tensors of flat names, regardless of the names in the installed transformers. Raises
    WeightsError."""
    with torch.device("meta"):
        nested = any(name.startswith("vision_model.") for name in new_clip(config).state_dict())
    named = {f"vision_model.{name}" if nested else name: value for name, value in tensors.items()}
    return new_loaded(lambda: new_clip(config), named, where)
