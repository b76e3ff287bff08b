"""Checkpoints of the original code: names, published sizes (without their memory), and what is rejected.

The names in the tables were read in public lists of Stable Diffusion 1.x' names, not made by code of this repository.
"""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from pbe.errors import UserError
from pbe.model.ldm import FIRST_CONVOLUTION, LdmParts, ldm_parts, unet_config, vae_config
from pbe.model.tensors import WeightsError
from tests import ldm_layout
from tests.tiny_weights import tiny_unet, tiny_vae

STABLE_DIFFUSION = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
}
STABLE_DIFFUSION_VAE = {
    "sample_size": 512,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
}
UNET_NAMES = {
    "input_blocks.0.0.weight": ("conv_in.weight", (320, 4, 3, 3)),
    "time_embed.0.weight": ("time_embedding.linear_1.weight", (1280, 320)),
    "input_blocks.1.0.in_layers.0.weight": ("down_blocks.0.resnets.0.norm1.weight", (320,)),
    "input_blocks.1.0.emb_layers.1.bias": ("down_blocks.0.resnets.0.time_emb_proj.bias", (320,)),
    "input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (
        "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k.weight",
        (320, 768),
    ),
    "input_blocks.3.0.op.weight": ("down_blocks.0.downsamplers.0.conv.weight", (320, 320, 3, 3)),
    "input_blocks.4.0.skip_connection.weight": ("down_blocks.1.resnets.0.conv_shortcut.weight", (640, 320, 1, 1)),
    "input_blocks.11.0.out_layers.3.weight": ("down_blocks.3.resnets.1.conv2.weight", (1280, 1280, 3, 3)),
    "middle_block.1.transformer_blocks.0.attn2.to_k.weight": (
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight",
        (1280, 768),
    ),
    "middle_block.2.in_layers.2.weight": ("mid_block.resnets.1.conv1.weight", (1280, 1280, 3, 3)),
    "output_blocks.2.1.conv.weight": ("up_blocks.0.upsamplers.0.conv.weight", (1280, 1280, 3, 3)),
    "output_blocks.3.0.skip_connection.weight": ("up_blocks.1.resnets.0.conv_shortcut.weight", (1280, 2560, 1, 1)),
    "output_blocks.3.1.norm.weight": ("up_blocks.1.attentions.0.norm.weight", (1280,)),
    "output_blocks.5.2.conv.bias": ("up_blocks.1.upsamplers.0.conv.bias", (1280,)),
    "output_blocks.8.1.proj_out.weight": ("up_blocks.2.attentions.2.proj_out.weight", (640, 640, 1, 1)),
    "output_blocks.8.2.conv.weight": ("up_blocks.2.upsamplers.0.conv.weight", (640, 640, 3, 3)),
    "output_blocks.9.0.skip_connection.weight": ("up_blocks.3.resnets.0.conv_shortcut.weight", (320, 960, 1, 1)),
    "out.2.weight": ("conv_out.weight", (4, 320, 3, 3)),
}
VAE_NAMES = {
    "encoder.down.0.block.0.norm1.weight": ("encoder.down_blocks.0.resnets.0.norm1.weight", (128,)),
    "encoder.down.1.block.0.nin_shortcut.weight": (
        "encoder.down_blocks.1.resnets.0.conv_shortcut.weight",
        (256, 128, 1, 1),
    ),
    "encoder.down.0.downsample.conv.weight": ("encoder.down_blocks.0.downsamplers.0.conv.weight", (128, 128, 3, 3)),
    "encoder.mid.attn_1.q.weight": ("encoder.mid_block.attentions.0.to_q.weight", (512, 512, 1, 1)),
    "encoder.mid.block_2.conv2.bias": ("encoder.mid_block.resnets.1.conv2.bias", (512,)),
    "decoder.up.3.block.0.norm1.weight": ("decoder.up_blocks.0.resnets.0.norm1.weight", (512,)),
    "decoder.up.1.upsample.conv.weight": ("decoder.up_blocks.2.upsamplers.0.conv.weight", (256, 256, 3, 3)),
    "decoder.up.0.block.0.nin_shortcut.weight": (
        "decoder.up_blocks.3.resnets.0.conv_shortcut.weight",
        (128, 256, 1, 1),
    ),
    "decoder.norm_out.weight": ("decoder.conv_norm_out.weight", (128,)),
    "quant_conv.weight": ("quant_conv.weight", (8, 8, 1, 1)),
}


@pytest.fixture(scope="module")
def full_size() -> dict[str, Tensor]:
    """Stable Diffusion 1.x under LDM's names: tensor k has the value k everywhere, in the memory of one number."""
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**STABLE_DIFFUSION), AutoencoderKL(**STABLE_DIFFUSION_VAE)
    tensors = ldm_layout.unet_names(unet) | ldm_layout.vae_names(vae)
    return {name: torch.tensor(float(k)).expand(value.shape) for k, (name, value) in enumerate(tensors.items())}


@pytest.fixture(scope="module")
def parts(full_size: dict[str, Tensor]) -> LdmParts:
    return ldm_parts(full_size, "sd.ckpt")


@pytest.fixture(scope="module")
def tiny() -> dict[str, Tensor]:
    """The same for Paint by Example."""
    return ldm_layout.paint_by_example(ldm_layout.ldm_model())


@pytest.fixture(scope="module")
def tiny_sd() -> dict[str, Tensor]:
    return ldm_layout.stable_diffusion(tiny_unet(), tiny_vae(32, 32))


def test_sizes_are_read_off_the_shapes(full_size: dict[str, Tensor], parts: LdmParts) -> None:
    assert unet_config(full_size, "sd.ckpt") == STABLE_DIFFUSION
    assert vae_config(full_size, "sd.ckpt") == STABLE_DIFFUSION_VAE
    assert sum(value.numel() for value in parts.unet.parameters()) == 859_535_364 - 320 * 5 * 9  # upstream's has 9 in
    assert parts.found == {"unet": 686, "vae": 248} and parts.left_out == {} and parts.encoder is None
    assert parts.unet.config.use_linear_projection is False and parts.unet.config.norm_eps == 1e-5


@pytest.mark.parametrize(("names", "prefix"), [(UNET_NAMES, ldm_layout.UNET), (VAE_NAMES, ldm_layout.VAE)])
def test_published_names_arrive_where_they_belong(
    names: dict[str, tuple[str, tuple[int, ...]]], prefix: str, full_size: dict[str, Tensor], parts: LdmParts
) -> None:
    got = (parts.unet if prefix == ldm_layout.UNET else parts.vae).state_dict()
    for ldm, (ours, shape) in names.items():
        value = full_size[f"{prefix}.{ldm}"]
        assert tuple(value.shape) == shape, ldm
        assert got[ours].flatten()[0] == value.flatten()[0], ldm


def test_thirds_of_c_qkv_are_queries_keys_and_values(tiny: dict[str, Tensor]) -> None:
    width = 64
    numbered = dict(tiny)
    numbered["cond_stage_model.mapper.resblocks.1.attn.c_qkv.bias"] = torch.arange(3.0 * width)
    numbered["cond_stage_model.mapper.resblocks.0.mlp.c_proj.bias"] = torch.full((width,), 7.0)
    numbered["learnable_vector"] = torch.full_like(tiny["learnable_vector"], 5.0)
    encoder = ldm_parts(numbered, "pbe.ckpt").encoder
    assert encoder is not None
    got = encoder[0].state_dict()
    for third, name in enumerate(("to_q", "to_k", "to_v")):
        assert torch.equal(got[f"mapper.blocks.1.attn1.{name}.bias"], torch.arange(width) + float(width * third))
    assert (got["mapper.blocks.0.ff.net.2.bias"] == 7).all() and (got["uncond_vector"] == 5).all()


def test_what_clip_is_comes_from_its_shapes(tiny: dict[str, Tensor]) -> None:
    encoder = ldm_parts(tiny, "pbe.ckpt").encoder
    assert encoder is not None
    config = encoder[1].config
    got = (config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads)
    assert got == (64, 128, 9, 1)
    assert (config.image_size, config.patch_size, config.hidden_act) == (28, 7, "quick_gelu")


def test_every_tensor_is_used_or_counted_in_a_family(tiny: dict[str, Tensor], tiny_sd: dict[str, Tensor]) -> None:
    pbe, sd = ldm_parts(tiny, "pbe.ckpt"), ldm_parts(tiny_sd, "sd.ckpt")
    for parts, tensors in ((pbe, tiny), (sd, tiny_sd)):
        assert sum(parts.found.values()) + sum(parts.left_out.values()) == len(tensors)
    assert list(pbe.left_out.values()) == [12, 1]  # schedule, position_ids
    assert pbe.found["mapper"] == 5 + 2 * 12 and pbe.found["unet"] == sd.found["unet"]
    assert sorted(sd.left_out.values()) == [1, 2, 12, sd.found["unet"] + 2]  # position_ids, text, schedule, EMA


def test_the_unet_has_the_files_own_memory(tiny_sd: dict[str, Tensor]) -> None:
    """A real file has 3.4 GB, so it is not copied, and no random weights are made first."""
    unet = ldm_parts(tiny_sd, "sd.ckpt").unet
    assert unet.conv_in.weight.data_ptr() == tiny_sd[FIRST_CONVOLUTION].data_ptr()
    assert not any(value.is_meta for value in (*unet.parameters(), *unet.buffers()))


# -- refusals --------------------------------------------------------------------------------------------------------


def _refused(tensors: dict[str, Tensor], *words: str) -> None:
    with pytest.raises(WeightsError) as caught:
        ldm_parts(tensors, "some.ckpt")
    message = str(caught.value)
    assert isinstance(caught.value, UserError) and message.startswith("some.ckpt") and "\n" not in message
    assert all(word in message for word in words), message


TAKEN_AWAY = {
    "model.diffusion_model.input_blocks.0.0.weight": "missing model.diffusion_model.input_blocks.0.0.weight",
    "model.diffusion_model.input_blocks.0.0.bias": "missing 1 such as conv_in.bias",
    "model.diffusion_model.output_blocks.1.1.conv.bias": "missing output_blocks.1.1.conv.bias",
    "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight": "attn2.to_k.weight",
    "first_stage_model.decoder.up.0.block.1.conv2.bias": "missing 1 such as decoder.up_blocks.3.resnets.1.conv2.bias",
    "first_stage_model.post_quant_conv.weight": "missing first_stage_model.post_quant_conv.weight",
    "learnable_vector": "missing 1 such as uncond_vector",
    "proj_out.weight": "missing proj_out.weight",
    "cond_stage_model.mapper.resblocks.1.attn.c_qkv.weight": "missing 3 such as mapper.blocks.1.attn1.to_k.weight",
    "cond_stage_model.transformer.vision_model.post_layernorm.weight": "post_layernorm.weight",
}


@pytest.mark.parametrize(("name", "word"), TAKEN_AWAY.items())
def test_one_missing_tensor_is_refused_by_its_name(name: str, word: str, tiny: dict[str, Tensor]) -> None:
    assert name in tiny
    _refused({key: value for key, value in tiny.items() if key != name}, word)


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.input_blocks.1.2.weight",  # diffusers' conversion would drop it
        "first_stage_model.encoder.extra.weight",
        "cond_stage_model.transformer.vision_model.extra.weight",
        "cond_stage_model.mapper.resblocks.0.extra.weight",
        "cond_stage_model.final_ln.extra",
        "adapter.weight",
    ],
)
def test_one_unexpected_tensor_is_refused_by_its_name(name: str, tiny: dict[str, Tensor]) -> None:
    _refused({**tiny, name: torch.zeros(3)}, "unexpected 1 such as", name.split(".")[-1])


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.time_embed.0.weight",
        "first_stage_model.encoder.mid.attn_1.q.weight",
        "cond_stage_model.mapper.resblocks.0.mlp.c_fc.weight",
        "cond_stage_model.transformer.vision_model.embeddings.class_embedding",
    ],
)
def test_another_shape_is_refused(name: str, tiny: dict[str, Tensor]) -> None:
    _refused({**tiny, name: tiny[name][:-2]}, "of another shape 1 such as")


def test_a_whole_part_that_is_missing_is_refused(tiny: dict[str, Tensor]) -> None:
    for prefix, word in {
        "first_stage_model.": "no VAE in it",
        "model.diffusion_model.": "no model.diffusion_model.*",
        "model.diffusion_model.input_blocks.1.": "input_blocks",
        "cond_stage_model.transformer.": "missing embeddings.patch_embedding.weight",
    }.items():
        _refused({key: value for key, value in tiny.items() if not key.startswith(prefix)}, word)


def _with_channels(tensors: dict[str, Tensor], channels: int, fill: float) -> dict[str, Tensor]:
    first = tensors[FIRST_CONVOLUTION][:, :4]
    more = torch.full((first.shape[0], channels - 4, 3, 3), fill)
    return {**tensors, FIRST_CONVOLUTION: torch.cat([first, more], dim=1)}


def test_an_inpainting_model_of_stable_diffusion_is_refused_with_why(tiny_sd: dict[str, Tensor]) -> None:
    _refused(
        _with_channels(tiny_sd, 9, 0.1), "inpainting", "learnable_vector", "latent, mask (1 = hole), masked latent"
    )
    one = _with_channels(tiny_sd, 9, 0)
    one[FIRST_CONVOLUTION][3, 8, 1, 1] = 1e-6
    _refused(one, "inpainting")


def test_stable_diffusion_as_upstream_widened_it_is_stable_diffusion(tiny_sd: dict[str, Tensor]) -> None:
    parts = ldm_parts(_with_channels(tiny_sd, 9, 0), "sd-v1-4-modified-9channel.ckpt")
    assert torch.equal(parts.unet.conv_in.weight, tiny_sd[FIRST_CONVOLUTION]) and parts.unet.config.in_channels == 4
    (note,) = parts.notes
    assert "5 of the UNet's 9 input channels are zero" in note


def test_paint_by_example_on_four_channels_or_other_tokens_is_refused(tiny: dict[str, Tensor]) -> None:
    _refused({**tiny, FIRST_CONVOLUTION: tiny[FIRST_CONVOLUTION][:, :4]}, "4 channels in, 4 out", "9 in, 4 out")
    other = {"proj_out.weight": torch.zeros(8, 64), "proj_out.bias": torch.zeros(8)}
    _refused({**tiny, **other, "learnable_vector": torch.zeros(1, 1, 8)}, "tokens of width 24", "makes width 8")


def test_other_models_are_called_by_their_names(tiny_sd: dict[str, Tensor]) -> None:
    linear = {name: v[:, :, 0, 0] if name.endswith("proj_in.weight") else v for name, v in tiny_sd.items()}
    zero = torch.zeros(2)
    for tensors, word in (
        ({**tiny_sd, "cond_stage_model.model.transformer.resblocks.0.ln_1.bias": zero}, "Stable Diffusion 2.x"),
        ({**tiny_sd, "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias": zero}, "XL"),
        (linear, "2.x or XL"),
        (_with_channels(tiny_sd, 8, 0), "8 input channels"),
        ({**tiny_sd, "control_model.input_blocks.0.0.weight": zero}, "a ControlNet"),
        ({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight": zero}, "a LoRA"),
        ({"unet.down_blocks.0.attentions.0.attn1.to_q.lora_A.weight": zero}, "a LoRA"),
        ({"unet.down_blocks.0.attn1.processor.to_q_lora.up.weight": zero, "a.lora.up.weight": zero}, "a LoRA"),
        ({"model.diffusion_model.joint_blocks.0.x.weight": zero}, "Stable Diffusion 3"),
        (tiny_unet().state_dict(), "diffusers' names"),
        ({"encoder.down.0.block.0.norm1.weight": zero}, "a VAE alone"),
        ({"vision_model.embeddings.class_embedding": zero}, "CLIP alone"),
        ({"layer1.weight": zero, "fc.bias": zero}, "names such as fc.bias, layer1.weight"),
    ):
        _refused(tensors, word)


def test_channels_that_32_groups_do_not_divide_are_refused(tiny_sd: dict[str, Tensor]) -> None:
    _refused({**tiny_sd, **ldm_layout.vae_names(tiny_vae(8, 4))}, "VAE levels have (8, 8, 8, 8) channels")
