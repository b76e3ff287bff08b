"""Initial weights of training: Stable Diffusion's UNet (the paper), or a whole Paint by Example model (fine-tuning).

Stable Diffusion's first convolution has 4 input channels. The five new ones (masked latent, keep mask) start at zero,
so that the network's output is unchanged at first (upstream scripts/modify_checkpoints.py). The mapper then starts
random.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from pbe.errors import one_line
from pbe.model.folder import STEM, STEMS
from pbe.model.tensors import WeightsError, load_strictly, read_folder, read_json
from pbe.model.unet import ConditionedUNet, widened
from pbe.model.weight_store import stored_folder
from pbe.model.weights import MAPPER_PARTS
from pbe.store import Store

# keys of params.yaml that set a UNet's config; its other values are diffusers' defaults
_SETTINGS = {
    "block_out_channels": "train.unet.block_channels",
    "down_block_types": "train.unet.attention",
    "up_block_types": "train.unet.attention",
    "layers_per_block": "train.unet.layers_per_block",
    "attention_head_dim": "train.unet.attention_heads",
    "norm_num_groups": "train.unet.norm_groups",
    "cross_attention_dim": "train.unet.context_width",
    "class_embed_type": "train.unet.class_embedding",
    "out_channels": "encode.codec",
}
_MAY_DIFFER = {"in_channels", "sample_size", "projection_class_embeddings_input_dim"}


def load_stored(network: ConditionedUNet, store: Store, paths: tuple[str, str | None]) -> None:
    """`load_initial` from the storage paths of a UNet and an image encoder. Raises WeightsError."""
    unet, encoder = paths
    with stored_folder(store, unet) as at, stored_folder(store, encoder) if encoder else nullcontext() as encoder_at:
        load_initial(network, at, encoder_at)


def load_initial(network: ConditionedUNet, unet: Path, image_encoder: Path | None) -> None:
    """Load a `unet` folder and, unless it is None, an `image_encoder` folder into `network`.

    Raises WeightsError if sizes, attention heads or norm groups differ from those of the network.
    """
    config = _full_config(read_json(unet / "config.json"), unet)
    _check_sizes(config, network.unet.config, unet)
    tensors = read_folder(unet, STEM)
    given, wanted = config["in_channels"], network.unet.config.in_channels
    if image_encoder is None:
        if given != config["out_channels"]:
            raise WeightsError(
                f"{unet}: {given} input channels and no image_encoder next to it: neither Stable Diffusion, which has "
                f"{config['out_channels']}, nor Paint by Example. Stable Diffusion's inpainting model does not fit: it "
                "orders its channels differently and marks the hole with 1"
            )
        tensors["conv_in.weight"] = widened(tensors["conv_in.weight"], wanted)
    load_strictly(network.unet, tensors, str(unet))
    if image_encoder is not None:
        encoder = read_folder(image_encoder, *STEMS)
        mapper = {name: value for name, value in encoder.items() if name.startswith(MAPPER_PARTS)}
        load_strictly(network.exemplar, mapper, f"{image_encoder} (train.exemplar must match its sizes)")


def _full_config(raw: Mapping[str, Any], where: Path) -> Mapping[str, Any]:
    """A UNet's config, completed by diffusers' defaults, because old files omit keys."""
    try:
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(dict(raw)).config
    except (ValueError, TypeError, KeyError) as error:
        raise WeightsError(f"{where}: not a UNet's config ({one_line(error, 200)})") from None


def _check_sizes(given: Mapping[str, Any], ours: Mapping[str, Any], where: Path) -> None:
    for key in sorted(set(ours) - _MAY_DIFFER):
        theirs = given.get(key)
        if key.startswith("_") or _plain(theirs) == _plain(ours[key]):
            continue
        setting = f"; set {_SETTINGS[key]} accordingly" if key in _SETTINGS else ", and pbe supports no other value"
        raise WeightsError(f"{where}: {key} is {theirs}, but {ours[key]} here{setting}")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
