"""Converts checkpoints of the original code (one file, LDM's names) to this project's parts: Paint by Example, and
Stable Diffusion 1.x without its text encoder.

    model.diffusion_model.*                                       the UNet, renamed by diffusers
    first_stage_model.*                                           AutoencoderKL, renamed by diffusers
    cond_stage_model.transformer.*                                CLIP: vision in Paint by Example, text in SD
    cond_stage_model.{mapper,final_ln}.*, proj_out.*, learnable_vector      the exemplar mapper

Sizes follow from the tensors' shapes. What shapes do not show is taken from SD 1.x (CompVis v1-inference.yaml, upstream
configs/v1.yaml): 8 heads, 32 norm groups, 512 px, latents scaled by 0.18215. Every tensor is either used or belongs to
a family known to be unused here; any other, and any that is missing or has another shape, is an error.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from pbe.model.clip import loaded_clip
from pbe.model.exemplar import ExemplarMapper
from pbe.model.tensors import WeightsError, check_fit, new_loaded, refuse_non_finite, some_names

IMAGE_PX = 512
ATTENTION_HEADS = 8
NORM_GROUPS = 32
SCALING_FACTOR = 0.18215
CLIP_HEAD_WIDTH = 64

UNET, VAE, CLIP = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
MAPPER = "cond_stage_model.mapper.resblocks."
FIRST_CONVOLUTION = f"{UNET}input_blocks.0.0.weight"
# upstream xf.py to diffusers' BasicTransformerBlock; with one head the thirds of c_qkv are queries, keys and values
_MAPPER_LAYERS = {
    "attn.c_qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.c_proj": ("attn1.to_out.0",),
    "ln_1": ("norm1",),
    "ln_2": ("norm3",),
    "mlp.c_fc": ("ff.net.0.proj",),
    "mlp.c_proj": ("ff.net.2",),
}
_EXEMPLAR = ("cond_stage_model.mapper.", "cond_stage_model.final_ln.", "proj_out.", "learnable_vector")
_LEFT_OUT = {
    "model_ema.* (running mean of the UNet)": re.compile(r"model_ema\."),
    "first_stage_model.loss.* (training loss of the VAE)": re.compile(r"first_stage_model\.loss\."),
    "position_ids (a counter in CLIP)": re.compile(r"cond_stage_model\.transformer\..*\bposition_ids$"),
    "noise schedule (betas, alphas_cumprod ...)": re.compile(
        r"(betas|logvar|scale_factor|lvlb_weights|(sqrt_|log_)?(one_minus_)?(recip_|recipm1_)?alphas_cumprod(_prev)?"
        r"|posterior_(variance|log_variance_clipped|mean_coef[12]))$"
    ),
}
_TEXT = re.compile(
    r"cond_stage_model\.(transformer\.(text_model|embeddings|encoder|final_layer_norm)\.|(logit_scale|text_projection)$)"
)
# other models found in such files, recognised by a name prefix
_OTHERS = {
    "lora_": "a LoRA: changes to a model, not a model",
    "conditioner.": "Stable Diffusion XL; this project builds on 1.x",
    "cond_stage_model.model.": "Stable Diffusion 2.x, or an image variation model; this project builds on 1.x",
    "model.diffusion_model.label_emb.": "Stable Diffusion XL or 2.x unCLIP; this project builds on 1.x",
    "model.diffusion_model.joint_blocks.": "Stable Diffusion 3; this project builds on 1.x",
    "control_model.": "a ControlNet",
    "down_blocks.": "a network under diffusers' names; import its whole folder (unet/, vae/, image_encoder/ ...)",
    "encoder.down.": "a VAE alone",
    "vision_model.": "CLIP alone",
    "text_model.": "a CLIP text encoder alone",
}


@dataclass(frozen=True)
class LdmParts:
    """The parts of a checkpoint. unet and vae keep the file's dtype and mapped memory; the rest is float32."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    encoder: tuple[ExemplarMapper, CLIPVisionModel] | None  # None: Stable Diffusion
    found: dict[str, int]  # number of tensors, by part
    left_out: dict[str, int]  # number of unused tensors, by family
    notes: tuple[str, ...]


def ldm_parts(tensors: Mapping[str, Tensor], where: str) -> LdmParts:
    """The parts of Paint by Example or Stable Diffusion 1.x, from a checkpoint's tensors under LDM's names.

    Raises WeightsError, which names `where`, for any other model and for any missing, unknown or misshapen tensor.
    """
    exemplar = any(name.startswith((*_EXEMPLAR, f"{CLIP}vision_model.")) for name in tensors)
    _refuse_others(tensors, exemplar, where)
    parts, left_out = _by_part(tensors, exemplar, where)

    notes = []
    if not exemplar and tensors[FIRST_CONVOLUTION].shape[1] == 9:
        parts["unet"][FIRST_CONVOLUTION] = tensors[FIRST_CONVOLUTION][:, :4].contiguous()
        notes.append("5 of the UNet's 9 input channels are zero: Stable Diffusion as widened by upstream; reduced to 4")
    unet = _unet(parts["unet"], where)
    vae = _vae(parts["vae"], where)
    encoder = None
    if exemplar:
        encoder = (_exemplar(parts["mapper"], where), _clip(parts["backbone"], where))
        _refuse_mismatch(unet, vae, encoder[0], where)
    found = {part: len(names) for part, names in parts.items() if exemplar or part in ("unet", "vae")}
    return LdmParts(unet, vae, encoder, found, left_out, tuple(notes))


# -- which model it is -----------------------------------------------------------------------------------------------


def _refuse_others(tensors: Mapping[str, Tensor], exemplar: bool, where: str) -> None:
    for begin, what in _OTHERS.items():
        if any(name.startswith(begin) for name in tensors):
            raise WeightsError(f"{where}: this is {what}")
    if any(".lora_" in name or ".lora." in name for name in tensors):
        raise WeightsError(f"{where}: this is {_OTHERS['lora_']}")
    if not any(name.startswith(UNET) for name in tensors):
        raise WeightsError(
            f"{where}: neither Paint by Example nor Stable Diffusion 1.x: no {UNET}* in it, but names such as "
            f"{some_names(tensors)}"
        )
    if any(name.startswith(UNET) and name.endswith(".proj_in.weight") and t.ndim == 2 for name, t in tensors.items()):
        raise WeightsError(f"{where}: this is a UNet of Stable Diffusion 2.x or XL; this project builds on 1.x")
    first = _get(tensors, FIRST_CONVOLUTION, where)
    channels = first.shape[1]
    if exemplar or channels == 4 or (channels == 9 and not first[:, 4:].any()):
        return
    if channels == 9:
        raise WeightsError(
            f"{where}: this is an inpainting model of Stable Diffusion, not Paint by Example: no exemplar encoder "
            "(learnable_vector, cond_stage_model.mapper.*), and its UNet takes latent, mask (1 = hole), masked latent, "
            "while Paint by Example takes latent, masked latent, mask (1 = known); start from Stable Diffusion"
        )
    raise WeightsError(f"{where}: a UNet with {channels} input channels; Stable Diffusion 1.x has 4")


def _by_part(
    tensors: Mapping[str, Tensor], exemplar: bool, where: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, int]]:
    """Tensors by part, and the number of unused ones by family. Raises WeightsError for any other tensor."""
    parts: dict[str, dict[str, Tensor]] = {"unet": {}, "backbone": {}, "mapper": {}, "vae": {}}
    left_out: dict[str, int] = {}
    families = _LEFT_OUT if exemplar else _LEFT_OUT | {"text encoder": _TEXT}
    unknown = []
    for name, value in tensors.items():
        family = next((family for family, pattern in families.items() if pattern.match(name)), None)
        if family is not None:
            left_out[family] = left_out.get(family, 0) + 1
        elif name.startswith(UNET):
            parts["unet"][name] = value
        elif name.startswith(VAE):
            parts["vae"][name] = value
        elif exemplar and name.startswith(CLIP):
            parts["backbone"][name] = value
        elif exemplar and name.startswith(_EXEMPLAR):
            parts["mapper"][name] = value
        else:
            unknown.append(name)
    if unknown:
        raise WeightsError(
            f"{where}: unexpected {len(unknown)} such as {some_names(unknown)}: from a model unknown to this project"
        )
    refuse_non_finite({name: value for part in parts.values() for name, value in part.items()}, where)
    return parts, left_out


def _refuse_mismatch(unet: UNet2DConditionModel, vae: AutoencoderKL, exemplar: ExemplarMapper, where: str) -> None:
    latent = vae.config.latent_channels
    if (unet.config.in_channels, unet.config.out_channels) != (2 * latent + 1, latent):
        raise WeightsError(
            f"{where}: the UNet has {unet.config.in_channels} channels in, {unet.config.out_channels} out; Paint by "
            f"Example with {latent} latent channels has {2 * latent + 1} in, {latent} out"
        )
    if unet.config.cross_attention_dim != exemplar.proj_out.out_features:
        raise WeightsError(
            f"{where}: the UNet takes tokens of width {unet.config.cross_attention_dim}, proj_out makes width "
            f"{exemplar.proj_out.out_features}"
        )


# -- UNet and VAE ----------------------------------------------------------------------------------------------------


def _unet(tensors: dict[str, Tensor], where: str) -> UNet2DConditionModel:
    config = unet_config(tensors, where)
    with torch.device("meta"):  # costs no memory and no random numbers; the file's tensors replace its own
        unet = UNet2DConditionModel(**config)
    return _filled(unet, tensors, _renamed(convert_ldm_unet_checkpoint, tensors, config, where), f"{where}: UNet")


def _vae(tensors: dict[str, Tensor], where: str) -> AutoencoderKL:
    config = vae_config(tensors, where)
    with torch.device("meta"):
        vae = AutoencoderKL(**config)
    return _filled(vae, tensors, _renamed(convert_ldm_vae_checkpoint, tensors, config, where), f"{where}: VAE")


def _renamed(convert: Any, tensors: dict[str, Tensor], config: dict[str, Any], where: str) -> dict[str, Tensor]:
    try:
        renamed = convert(tensors, config)
    except KeyError as error:  # diffusers assumes some biases exist
        raise WeightsError(f"{where}: missing {error.args[0]}; the file is incomplete") from None
    return {name: value for name, value in renamed.items() if value is not None}


def _filled(module: Any, source: dict[str, Tensor], renamed: dict[str, Tensor], where: str) -> Any:
    """The module with the file's tensors as parameters, without copying."""
    # diffusers drops unknown names; the tensors that it used keep their addresses
    taken = {value.data_ptr() for value in renamed.values()}
    dropped = {name: value for name, value in source.items() if value.data_ptr() not in taken}
    check_fit(module.state_dict(), renamed | dropped, where)
    module.load_state_dict(renamed, assign=True)
    return module.eval().requires_grad_(False)


def unet_config(tensors: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """diffusers' config of a UNet, from the shapes of its tensors under LDM's names. Raises WeightsError."""
    blocks = sorted(_numbers(tensors, rf"{re.escape(UNET)}input_blocks\.(\d+)\."))
    # blocks by level; block 0 is the first convolution, and a convolution ends each level
    levels: list[list[int]] = [[]]
    for block in blocks[1:]:
        if f"{UNET}input_blocks.{block}.0.op.weight" in tensors:
            levels.append([])
        else:
            levels[-1].append(block)
    if not all(levels):
        raise WeightsError(f"{where}: the UNet's input_blocks are incomplete: {len(blocks)} found")

    def channels(block: int) -> int:
        return _get(tensors, f"{UNET}input_blocks.{block}.0.out_layers.3.weight", where).shape[0]

    widths = tuple(channels(level[0]) for level in levels)
    _refuse_width("UNet", widths, where)
    attention = [any(f"{UNET}input_blocks.{block}.1.norm.weight" in tensors for block in level) for level in levels]
    context = _get(tensors, f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight", where)
    return {
        "sample_size": IMAGE_PX // 8,
        "in_channels": _get(tensors, FIRST_CONVOLUTION, where).shape[1],
        "out_channels": _get(tensors, f"{UNET}out.2.weight", where).shape[0],
        "block_out_channels": widths,
        "layers_per_block": len(levels[0]),
        "down_block_types": tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        "up_block_types": tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        "cross_attention_dim": context.shape[1],
        "attention_head_dim": ATTENTION_HEADS,  # diffusers' name for the number of heads
        "norm_num_groups": NORM_GROUPS,
    }


def vae_config(tensors: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """diffusers' config of an AutoencoderKL, from the shapes of its tensors under LDM's names. Raises WeightsError."""
    levels = len(_numbers(tensors, rf"{re.escape(VAE)}encoder\.down\.(\d+)\."))
    widths = tuple(
        _get(tensors, f"{VAE}encoder.down.{level}.block.0.conv1.weight", where).shape[0] for level in range(levels)
    )
    if not widths:
        raise WeightsError(f"{where}: no VAE in it ({VAE}encoder.down.0.*); use a whole checkpoint")
    _refuse_width("VAE", widths, where)
    return {
        "sample_size": IMAGE_PX,
        "in_channels": _get(tensors, f"{VAE}encoder.conv_in.weight", where).shape[1],
        "out_channels": _get(tensors, f"{VAE}decoder.conv_out.weight", where).shape[0],
        "latent_channels": _get(tensors, f"{VAE}post_quant_conv.weight", where).shape[1],
        "block_out_channels": widths,
        "layers_per_block": len(_numbers(tensors, rf"{re.escape(VAE)}encoder\.down\.0\.block\.(\d+)\.")),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "norm_num_groups": NORM_GROUPS,
        "scaling_factor": SCALING_FACTOR,
    }


def _refuse_width(what: str, widths: tuple[int, ...], where: str) -> None:
    if any(width % NORM_GROUPS for width in widths):
        raise WeightsError(f"{where}: {what} levels have {widths} channels; they must be multiples of {NORM_GROUPS}")


# -- the exemplar encoder --------------------------------------------------------------------------------------------


def _exemplar(tensors: Mapping[str, Tensor], where: str) -> ExemplarMapper:
    renamed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name.startswith(MAPPER):
            block, _, rest = name.removeprefix(MAPPER).partition(".")
            layer, _, kind = rest.rpartition(".")
            ours = _MAPPER_LAYERS.get(layer, (layer,))
            for target, third in zip(ours, value.chunk(len(ours)), strict=False):
                renamed[f"mapper.blocks.{block}.{target}.{kind}"] = third
        elif name == "learnable_vector":
            renamed["uncond_vector"] = value
        else:
            renamed[name.replace("cond_stage_model.final_ln.", "final_layer_norm.")] = value
    width = _get(tensors, "cond_stage_model.final_ln.weight", where).shape[0]
    return new_loaded(
        lambda: ExemplarMapper(
            backbone_width=width,
            mapper_width=width,
            mapper_blocks=len(_numbers(tensors, re.escape(MAPPER) + r"(\d+)\.")),
            context_width=_get(tensors, "proj_out.weight", where).shape[0],
        ),
        renamed,
        f"{where}: exemplar mapper",
    ).eval()


def _clip(tensors: Mapping[str, Tensor], where: str) -> CLIPVisionModel:
    flat = {name.removeprefix(CLIP).removeprefix("vision_model."): value for name, value in tensors.items()}
    patches = _get(flat, "embeddings.patch_embedding.weight", where)
    width, patch_px = patches.shape[0], patches.shape[-1]
    positions = _get(flat, "embeddings.position_embedding.weight", where).shape[0]
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=_get(flat, "encoder.layers.0.mlp.fc1.weight", where).shape[0],
        num_hidden_layers=len(_numbers(flat, r"encoder\.layers\.(\d+)\.")),
        num_attention_heads=max(1, width // CLIP_HEAD_WIDTH),
        image_size=math.isqrt(positions - 1) * patch_px,
        patch_size=patch_px,
        hidden_act="quick_gelu",
    )
    return loaded_clip(config, flat, f"{where}: CLIP").eval()


# -- tensors by name -------------------------------------------------------------------------------------------------


def _get(tensors: Mapping[str, Tensor], name: str, where: str) -> Tensor:
    if name not in tensors:
        raise WeightsError(f"{where}: missing {name}; the file is incomplete")
    return tensors[name]


def _numbers(names: Iterable[str], pattern: str) -> set[int]:
    return {int(match[1]) for name in names if (match := re.match(pattern, name))}
