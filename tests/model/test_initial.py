"""Initial weights of training: Stable Diffusion's UNet widened to 9 channels, or all of a Paint by Example model."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from pbe.model.architecture import Architecture
from pbe.model.initial import load_initial
from pbe.model.settings import ExemplarConfig, UNetConfig
from pbe.model.tensors import WeightsError
from pbe.model.unet import ConditionedUNet, new_network
from tests.tiny_weights import CLIP_WIDTH, CONTEXT_WIDTH, paper_model, tiny_unet, write_paint_by_example

ARCH = Architecture(
    latent_channels=4,
    latent_px=4,
    backbone_width=CLIP_WIDTH,
    unet=UNetConfig(
        block_channels=(32, 64),
        attention=(True, False),
        layers_per_block=1,
        attention_heads=8,
        norm_groups=32,
        context_width=CONTEXT_WIDTH,
        class_embedding=False,
    ),
    exemplar=ExemplarConfig(mapper_width=CLIP_WIDTH, mapper_blocks=2),
)


@pytest.fixture
def network() -> ConditionedUNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return new_network(ARCH).eval()


@pytest.fixture
def stable_diffusion(tmp_path: Path) -> Path:
    tiny_unet().save_pretrained(tmp_path / "unet")
    return tmp_path / "unet"


def test_from_stable_diffusion_the_network_computes_what_it_did_whatever_the_new_channels_see(
    network: ConditionedUNet, stable_diffusion: Path
) -> None:
    load_initial(network, stable_diffusion, None)
    generator = torch.Generator().manual_seed(1)
    noisy, timestep = torch.randn(2, 4, 4, 4, generator=generator), torch.tensor([5, 900])
    context = torch.randn(2, 1, CONTEXT_WIDTH, generator=generator)
    with torch.no_grad():
        wanted = tiny_unet()(noisy, timestep, encoder_hidden_states=context).sample
        for scale in (0.0, 1.0, 100.0):
            masked, keep = scale * torch.randn(2, 4, 4, 4), scale * torch.rand(2, 1, 4, 4)
            got = network.denoise(noisy, timestep, masked_latent=masked, keep_mask_latent=keep, context=context)
            torch.testing.assert_close(got, wanted, atol=1e-6, rtol=0)


def test_from_stable_diffusion_the_mapper_stays_random(network: ConditionedUNet, stable_diffusion: Path) -> None:
    before = {name: value.clone() for name, value in network.exemplar.state_dict().items()}
    load_initial(network, stable_diffusion, None)
    assert all(torch.equal(value, before[name]) for name, value in network.exemplar.state_dict().items())


def test_from_a_whole_model_every_tensor_is_its(network: ConditionedUNet, tmp_path: Path) -> None:
    folder = write_paint_by_example(tmp_path / "model")
    load_initial(network, folder / "unet", folder / "image_encoder")
    wanted = paper_model().network.state_dict()
    assert network.state_dict().keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in network.state_dict().items())


def _config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


def _inpainting(folder: Path) -> None:
    tiny_unet(in_channels=9).save_pretrained(folder)


def _smaller(folder: Path) -> None:
    small = dict(tiny_unet().config) | {"cross_attention_dim": 16}
    UNet2DConditionModel.from_config(small).save_pretrained(folder)


def _cut(folder: Path) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # shapes do not show the number of heads
        (_config(attention_head_dim=4), "attention_head_dim is 4, but 8 here; set train.unet.attention_heads"),
        (_smaller, "cross_attention_dim is 16, but 24 here; set train.unet.context_width"),
        (
            _config(use_linear_projection=True),
            "use_linear_projection is True, but False here, and pbe supports no other value",
        ),
        (_config(block_out_channels=[32, 64, 64]), "not a UNet's config"),
        (_inpainting, "9 input channels and no image_encoder next to it: neither Stable Diffusion, which has 4, nor"),
        (_cut, "damaged or incomplete weight file"),
    ],
)
def test_other_weights_are_refused_in_one_line(
    change: Callable[[Path], None], message: str, network: ConditionedUNet, stable_diffusion: Path
) -> None:
    change(stable_diffusion)
    with pytest.raises(WeightsError, match=message) as caught:
        load_initial(network, stable_diffusion, None)
    assert "\n" not in str(caught.value) and str(stable_diffusion) in str(caught.value)


def test_a_mapper_of_another_size_is_refused(tmp_path: Path) -> None:
    folder = write_paint_by_example(tmp_path / "model")
    other = new_network(replace(ARCH, exemplar=ARCH.exemplar.model_copy(update={"mapper_blocks": 1})))
    with pytest.raises(WeightsError, match=r"train\.exemplar must match its sizes"):
        load_initial(other, folder / "unet", folder / "image_encoder")
