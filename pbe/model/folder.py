"""What a model folder has in it, without its networks: importing this costs no diffusers and no transformers.

pbe/model/weights.py has the layout, and pbe/model/adapter.py that of an adapter.
"""

import math
from pathlib import Path
from typing import Any

from pbe.errors import UserError
from pbe.model.tensors import read_json

CARD_FILE = "pbe.json"
STEM = "diffusion_pytorch_model"  # of the weight files of a UNet or an AutoencoderKL
STEMS = ("model", "pytorch_model")  # of those of a CLIP or an image encoder
CODEC_FILE = "codec/codec.safetensors"  # the patch codec's
ADAPTER_FILE = "adapter.json"


class ModelError(UserError, ValueError):
    """A model folder is missing or incomplete, or its parts do not match; the message says what."""


def is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_FILE).is_file()


def read_card(folder: Path) -> dict[str, Any]:
    """The values of the card of a model or of an adapter; of a published folder, which has none, an empty one.

    Raises ModelError for a guidance scale that is not a finite number, WeightsError for a damaged file.
    """
    path = folder / (ADAPTER_FILE if is_adapter(folder) else CARD_FILE)
    if not path.is_file():
        return {}
    said: Any = read_json(path)
    if is_adapter(folder):
        said = said.get("card")
        if not isinstance(said, dict):
            return {}  # read_adapter says what is wrong
    scale = said.get("guidance_scale")
    if scale is not None and not (type(scale) in (int, float) and math.isfinite(scale)):
        raise ModelError(f"{path}: guidance_scale = {scale!r}: must be a finite number")
    return said


def guidance_scale_of(folder: Path) -> float | None:
    """The guidance scale that the card of a model names. Raises the errors of `read_card`."""
    return read_card(folder).get("guidance_scale")
