"""Networks of the published sizes with random weights: what they compute means nothing, what it takes does."""

import torch
from diffusers import AutoencoderKL
from transformers import CLIPVisionConfig

from pbe.diffusion.schedule import scheduler_config
from pbe.model.clip import ClipBackbone, new_clip
from pbe.model.unet import new_network
from pbe.model.vae import KlCodec
from pbe.model.weights import Model, ModelCard
from tests.gpu.sizes import Sizes


def new_kl_codec(sizes: Sizes) -> KlCodec:
    return KlCodec(AutoencoderKL(**sizes.vae), digest="random")


def new_clip_backbone(sizes: Sizes) -> ClipBackbone:
    return ClipBackbone(new_clip(CLIPVisionConfig(**sizes.clip)), digest="random")


def new_model(sizes: Sizes) -> Model:
    torch.manual_seed(23)
    backbone = new_clip_backbone(sizes)
    card = ModelCard(sizes.image_px, backbone.input_px, 10, "class", scheduler_config("scaled_linear", "eps"), run={})
    return Model(new_network(sizes.arch).eval(), new_kl_codec(sizes), backbone, card)
