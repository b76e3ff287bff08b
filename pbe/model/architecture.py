"""What defines a network; no torch here, so that the process that only starts a training need not import it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pbe.model.settings import ExemplarConfig, UNetConfig


@dataclass(frozen=True)
class Architecture:
    """The sizes and settings that define a network. The paper's values: infra/profiles/openimages.yaml."""

    latent_channels: int
    latent_px: int
    backbone_width: int
    unet: UNetConfig
    exemplar: ExemplarConfig
    caption_tokens: int | None = None  # T of the text encoder; None: the condition is an exemplar


def architecture_of(
    unet: UNetConfig,
    exemplar: ExemplarConfig,
    *,
    image_px: int,
    encoded: Mapping[str, Any],
    caption_tokens: int | None = None,
) -> Architecture:
    """The architecture that params.yaml and the encode manifest's config define."""
    codec = encoded["codec"]
    return Architecture(
        latent_channels=int(codec["channels"]),
        latent_px=image_px // int(codec["patch_px"]),
        backbone_width=int(encoded["backbone"]["width"]),
        unet=unet,
        exemplar=exemplar,
        caption_tokens=caption_tokens,
    )
