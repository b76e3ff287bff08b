"""The card of a model, which stands in its folder's pbe.json."""

from dataclasses import dataclass
from typing import Any

from pbe.model.settings import Condition, Tokens


@dataclass(frozen=True)
class ModelCard:
    """Settings that a model needs for inference besides its networks."""

    image_px: int
    reference_px: int
    reference_pad_px: int
    tokens: Tokens  # the backbone's tokens that the mapper reads
    scheduler: dict[str, Any]  # diffusers' config: betas, prediction type, spacing of the timesteps
    run: dict[str, Any]  # variant, digest, steps, data digest; empty for imported weights
    condition: Condition = "exemplar"  # text: of the settings above, those of references have no effect
    guidance_scale: float | None = None  # the default of the model's edits; None: upstream's
