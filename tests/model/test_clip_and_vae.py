"""CLIP and AutoencoderKL, from folders of the published layouts: equal to transformers' and diffusers' own results."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pbe.model.clip import MEAN, STD, load_clip
from pbe.model.tensors import WeightsError
from pbe.model.vae import load_vae
from tests.tiny_weights import (
    CLIP_WIDTH,
    IMAGE_PX,
    REFERENCE_PX,
    tiny_clip,
    tiny_vae,
    write_clip,
    write_paint_by_example,
    write_stable_diffusion,
)

VAE = "vae/diffusion_pytorch_model.safetensors"


def _pictures(count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (count, 3, REFERENCE_PX, REFERENCE_PX), generator=generator, dtype=torch.uint8)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["clip", "vision model", "vision model as .bin", "paint by example"])
def test_clip_from_every_layout_is_transformers_class_token_and_normalised_patches(kind: str, tmp_path: Path) -> None:
    if kind == "clip":
        folder = write_clip(tmp_path / "clip")
    elif kind == "paint by example":
        folder = write_paint_by_example(tmp_path / "pbe") / "image_encoder"
    else:
        folder = tmp_path / "vision"
        tiny_clip().save_pretrained(folder)
        if kind.endswith(".bin"):
            torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
            (folder / "model.safetensors").unlink()
    backbone, theirs = load_clip(folder), tiny_clip()
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    expected = theirs(pixel_values=(_pictures() / 255 - mean) / std)
    assert (backbone.width, backbone.input_px, backbone.token_count) == (CLIP_WIDTH, REFERENCE_PX, 17)
    pooled, tokens = backbone(_pictures()), backbone.tokens(_pictures())
    assert tokens.shape == (3, 17, CLIP_WIDTH) and len(backbone.digest) == 16
    torch.testing.assert_close(pooled, expected.pooler_output, atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens[:, 0], pooled, atol=1e-5, rtol=0)
    norm = getattr(theirs, "vision_model", theirs).post_layernorm
    torch.testing.assert_close(tokens, norm(expected.last_hidden_state), atol=1e-5, rtol=0)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert not backbone.train().network.training


def test_clip_refuses_pictures_of_another_size_and_folders_of_another_family(tmp_path: Path) -> None:
    folder = write_clip(tmp_path / "clip")
    backbone = load_clip(folder)
    for wrong in (_pictures()[..., 1:], _pictures().float()):
        with pytest.raises(ValueError, match="expected uint8"):
            backbone(wrong)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "siglip"}))
    with pytest.raises(WeightsError, match="siglip model, not CLIP"):
        load_clip(folder)
    config["vision_config"]["num_hidden_layers"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"do not fit: missing 16 such as .*encoder\.layers\.9"):
        load_clip(folder)


@torch.no_grad()
def test_the_vae_is_diffusers_posterior_and_decoder_scaled(tmp_path: Path) -> None:
    codec, theirs = load_vae(write_stable_diffusion(tmp_path / "sd") / "vae"), tiny_vae()
    assert (codec.patch_px, codec.channels, codec.project) == (8, 4, None)
    pixels = torch.rand(2, 3, IMAGE_PX, IMAGE_PX, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mean, std = codec.posterior(pixels)
    expected = theirs.encode(pixels).latent_dist
    assert mean.shape == (2, 4, IMAGE_PX // 8, IMAGE_PX // 8)
    torch.testing.assert_close(mean, 0.18215 * expected.mean)
    torch.testing.assert_close(std, 0.18215 * expected.std)
    torch.testing.assert_close(codec.decode(mean), theirs.decode(expected.mean).sample)


@torch.no_grad()
def test_the_vae_is_read_under_the_names_of_2022_and_in_half_precision(tmp_path: Path) -> None:
    folder = write_stable_diffusion(tmp_path / "sd") / "vae"
    expected = load_vae(folder).vae.state_dict()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, value in load_file(tmp_path / "sd" / VAE).items():
        for new, before in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        tensors[name] = value.half()
    assert any(".query." in name for name in tensors)
    save_file(tensors, tmp_path / "sd" / VAE)
    got = load_vae(folder).vae.state_dict()
    assert got.keys() == expected.keys() and {value.dtype for value in got.values()} == {torch.float32}
    assert all(torch.equal(got[name], expected[name].half().float()) for name in got)
