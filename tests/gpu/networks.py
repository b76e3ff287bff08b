"""Networks of the published sizes with random weights, made on the device: their outputs mean nothing,
their costs do."""

import torch
from diffusers import AutoencoderKL
from transformers import CLIPVisionConfig

from pbe.diffusion.scheduler_config import scheduler_config
from pbe.model.card import ModelCard
from pbe.model.clip import ClipBackbone, new_clip
from pbe.model.unet import new_network
from pbe.model.vae import KlCodec
from pbe.model.weights import Model
from tests.gpu.sizes import Sizes


def new_kl_codec(device: torch.device, sizes: Sizes) -> KlCodec:
    with device:
        return KlCodec(AutoencoderKL(**sizes.vae), digest="random")


def new_clip_backbone(device: torch.device, sizes: Sizes) -> ClipBackbone:
    with device:
        return ClipBackbone(new_clip(CLIPVisionConfig(**sizes.clip)), digest="random")


def new_model(device: torch.device, sizes: Sizes) -> Model:
    torch.manual_seed(23)
    backbone = new_clip_backbone(device, sizes)
    with device:
        network = new_network(sizes.arch).eval()
    card = ModelCard(sizes.image_px, backbone.input_px, 10, "class", scheduler_config("scaled_linear", "eps"), run={})
    return Model(network, new_kl_codec(device, sizes), backbone, card)
