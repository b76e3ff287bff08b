"""Parts under the names of the original code (LDM), by walking diffusers' modules block by block.

The way back of pbe/model/ldm.py, written without it. Names: CompVis' openaimodel.py (input_blocks count the first
convolution, each residual block and each downsampling), model.py (VAE), upstream's xf.py and modules.py.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pbe.model.vae import KlCodec
from pbe.model.weights import Model
from tests.tiny_weights import clip_of, mapper_of, paper_model, tiny_vae, vae_of

UNET, VAE, COND = "model.diffusion_model", "first_stage_model", "cond_stage_model"
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def ldm_model() -> Model:
    """paper_model with a VAE that LDM could have: 32 norm groups."""
    return replace(paper_model(), codec=KlCodec(tiny_vae(width=32, norm_groups=32), digest="tiny"))


def sizes_of(model: Model) -> dict[str, Any]:
    """Keys of params.yaml that describe the network, for Project.set_params."""
    unet, mapper = model.network.unet.config, mapper_of(model)
    return {
        "train__unet__block_channels": list(unet.block_out_channels),
        "train__unet__attention": ["CrossAttn" in block for block in unet.down_block_types],
        "train__unet__layers_per_block": unet.layers_per_block,
        "train__unet__attention_heads": unet.attention_head_dim,
        "train__unet__context_width": unet.cross_attention_dim,
        "train__exemplar__mapper_width": mapper.final_layer_norm.weight.shape[0],
        "train__exemplar__mapper_blocks": len(mapper.mapper.blocks),
        "materialize__reference_px": model.card.reference_px,
    }


def paint_by_example(model: Model) -> dict[str, Tensor]:
    """All that upstream's checkpoint has in its state_dict, but for the EMA that it does not keep."""
    return {
        **noise_schedule(),
        **unet_names(model.network.unet),
        **vae_names(vae_of(model)),
        **clip_names(clip_of(model)),
        **mapper_names(model.network.exemplar),
    }


def stable_diffusion(unet: torch.nn.Module, vae: torch.nn.Module) -> dict[str, Tensor]:
    """As sd-v1-4.ckpt: the UNet and its running mean, the VAE, a text encoder."""
    tensors = unet_names(unet)
    ema = {"model_ema." + name.removeprefix("model.").replace(".", ""): value + 1 for name, value in tensors.items()}
    text = {
        "transformer.text_model.embeddings.position_ids": torch.arange(3)[None],
        "transformer.text_model.embeddings.token_embedding.weight": torch.zeros(3, 4),
        "transformer.text_model.encoder.layers.0.mlp.fc1.bias": torch.zeros(4),
    }
    ema |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    return noise_schedule() | tensors | ema | vae_names(vae) | {f"{COND}.{name}": value for name, value in text.items()}


def noise_schedule() -> dict[str, Tensor]:
    """ddpm.py register_schedule, linear_start 0.00085, linear_end 0.0120."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)
    before = torch.cat([torch.ones(1), alphas[:-1]])
    values = {
        "betas": betas,
        "alphas_cumprod": alphas,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": alphas.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - alphas).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - alphas).log(),
        "sqrt_recip_alphas_cumprod": (1 / alphas).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / alphas - 1).sqrt(),
        "posterior_variance": betas * (1 - before) / (1 - alphas),
        "posterior_log_variance_clipped": betas.log(),
        "posterior_mean_coef1": betas,
        "posterior_mean_coef2": betas,
    }
    return {name: value.float() for name, value in values.items()}


def unet_names(unet: Any) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    _put(out, "time_embed.0", unet.time_embedding.linear_1)
    _put(out, "time_embed.2", unet.time_embedding.linear_2)
    _put(out, "input_blocks.0.0", unet.conv_in)
    block = 1
    for level in unet.down_blocks:
        attentions = getattr(level, "attentions", [])
        for j, resnet in enumerate(level.resnets):
            _put_resnet(out, f"input_blocks.{block}.0", resnet)
            if attentions:
                _put(out, f"input_blocks.{block}.1", attentions[j])
            block += 1
        for downsampler in level.downsamplers or []:
            _put(out, f"input_blocks.{block}.0.op", downsampler.conv)
            block += 1
    _put_resnet(out, "middle_block.0", unet.mid_block.resnets[0])
    _put(out, "middle_block.1", unet.mid_block.attentions[0])
    _put_resnet(out, "middle_block.2", unet.mid_block.resnets[1])
    block = 0
    for level in unet.up_blocks:
        attentions = getattr(level, "attentions", [])
        for j, resnet in enumerate(level.resnets):
            _put_resnet(out, f"output_blocks.{block}.0", resnet)
            if attentions:
                _put(out, f"output_blocks.{block}.1", attentions[j])
            if level.upsamplers and j == len(level.resnets) - 1:
                _put(out, f"output_blocks.{block}.{2 if attentions else 1}.conv", level.upsamplers[0].conv)
            block += 1
    _put(out, "out.0", unet.conv_norm_out)
    _put(out, "out.2", unet.conv_out)
    assert len(out) == len(unet.state_dict())
    return {f"{UNET}.{name}": value for name, value in out.items()}


def vae_names(vae: Any) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for half in ("encoder", "decoder"):
        network = getattr(vae, half)
        for name in ("conv_in", "conv_out"):
            _put(out, f"{half}.{name}", getattr(network, name))
        _put(out, f"{half}.norm_out", network.conv_norm_out)
        levels = network.down_blocks if half == "encoder" else network.up_blocks
        for i, level in enumerate(levels):
            ours = f"encoder.down.{i}" if half == "encoder" else f"decoder.up.{len(levels) - 1 - i}"
            for j, resnet in enumerate(level.resnets):
                _put(out, f"{ours}.block.{j}", resnet, conv_shortcut="nin_shortcut")
            for sampler in (level.downsamplers if half == "encoder" else level.upsamplers) or []:
                _put(out, f"{ours}.{'downsample' if half == 'encoder' else 'upsample'}.conv", sampler.conv)
        _put(out, f"{half}.mid.block_1", network.mid_block.resnets[0])
        _put(out, f"{half}.mid.block_2", network.mid_block.resnets[1])
        attention = network.mid_block.attentions[0]
        _put(out, f"{half}.mid.attn_1.norm", attention.group_norm)
        for ldm, ours in {"q": "to_q", "k": "to_k", "v": "to_v"}.items():
            _put(out, f"{half}.mid.attn_1.{ldm}", getattr(attention, ours))
        _put(out, f"{half}.mid.attn_1.proj_out", attention.to_out[0])
    for name in ("quant_conv", "post_quant_conv"):
        _put(out, name, getattr(vae, name))
    # LDM's attention is made of 1 x 1 convolutions
    out = {n: v[:, :, None, None] if "attn_1" in n and v.ndim == 2 else v for n, v in out.items()}
    assert len(out) == len(vae.state_dict())
    return {f"{VAE}.{name}": value for name, value in out.items()}


def clip_names(network: torch.nn.Module) -> dict[str, Tensor]:
    """As transformers 4 named them, with the counter that it saved."""
    tensors = {name.removeprefix("vision_model."): value for name, value in network.state_dict().items()}
    out = {f"{COND}.transformer.vision_model.{name}": value for name, value in tensors.items()}
    positions = len(tensors["embeddings.position_embedding.weight"])
    return out | {f"{COND}.transformer.vision_model.embeddings.position_ids": torch.arange(positions)[None]}


def mapper_names(exemplar: Any) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {"learnable_vector": exemplar.uncond_vector.detach()}
    _put(out, f"{COND}.final_ln", exemplar.final_layer_norm)
    _put(out, "proj_out", exemplar.proj_out)
    for i, block in enumerate(exemplar.mapper.blocks):
        ours = f"{COND}.mapper.resblocks.{i}"
        _put(out, f"{ours}.ln_1", block.norm1)
        _put(out, f"{ours}.ln_2", block.norm3)
        attention = block.attn1
        for kind in ("weight", "bias"):
            thirds = [getattr(linear, kind).detach() for linear in (attention.to_q, attention.to_k, attention.to_v)]
            out[f"{ours}.attn.c_qkv.{kind}"] = torch.cat(thirds)
        _put(out, f"{ours}.attn.c_proj", attention.to_out[0])
        _put(out, f"{ours}.mlp.c_fc", block.ff.net[0].proj)
        _put(out, f"{ours}.mlp.c_proj", block.ff.net[2])
    return out


def _put_resnet(out: dict[str, Tensor], name: str, resnet: torch.nn.Module) -> None:
    _put(out, name, resnet, **_RESNET)


def _put(out: dict[str, Tensor], name: str, module: torch.nn.Module, **renamed: str) -> None:
    state: Mapping[str, Tensor] = module.state_dict()
    for key, value in state.items():
        first, dot, rest = key.partition(".")
        out[f"{name}.{renamed.get(first, first)}{dot}{rest}"] = value
