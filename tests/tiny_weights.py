"""Weight folders of the real layouts, tiny and random: Stable Diffusion 1.x, CLIP, Paint by Example.

Same classes, same file names, same keys as the published ones; only smaller. What they compute means nothing.
`python -m tests.tiny_weights FOLDER` writes what the paper-tiny profile names.
"""

import json
import sys
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

from pbe.data.images import resize
from pbe.diffusion.scheduler_config import scheduler_config
from pbe.evaluate.features.clip import load_clip_extractor
from pbe.evaluate.metrics.mixture import Mixture, save_mixture
from pbe.model.card import ModelCard
from pbe.model.clip import ClipBackbone, new_clip
from pbe.model.exemplar import ExemplarMapper
from pbe.model.unet import ConditionedUNet
from pbe.model.vae import KlCodec
from pbe.model.weights import Model, save_model

CONTEXT_WIDTH, CLIP_WIDTH, CLIP_LAYERS, REFERENCE_PX, IMAGE_PX = 24, 64, 9, 28, 32
EXTRACTOR_PX, EXTRACTOR_WIDTH = 32, 12
UNET = {
    "sample_size": IMAGE_PX // 8,
    "out_channels": 4,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": CONTEXT_WIDTH,
    "attention_head_dim": 8,
}


N = TypeVar("N", bound=torch.nn.Module)


def lively(module: N, seed: int, scale: float = 0.05) -> N:
    """Every parameter gets a say: some layers start at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def tiny_unet(in_channels: int = 4, seed: int = 1) -> UNet2DConditionModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return lively(UNet2DConditionModel(in_channels=in_channels, **UNET), seed)


def tiny_vae(width: int = 8, norm_groups: int = 4) -> AutoencoderKL:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return AutoencoderKL(
            block_out_channels=(width,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            norm_num_groups=norm_groups,
            layers_per_block=1,
            sample_size=IMAGE_PX,
            scaling_factor=0.18215,
        ).eval()


def tiny_clip() -> CLIPVisionModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = CLIPVisionConfig(
            hidden_size=CLIP_WIDTH,
            intermediate_size=2 * CLIP_WIDTH,
            num_hidden_layers=CLIP_LAYERS,
            num_attention_heads=CLIP_WIDTH // 64,
            image_size=REFERENCE_PX,
            patch_size=7,
            projection_dim=CONTEXT_WIDTH,
        )
        return lively(new_clip(config), 3)


def tiny_exemplar() -> ExemplarMapper:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return ExemplarMapper(
            backbone_width=CLIP_WIDTH,
            mapper_width=CLIP_WIDTH,
            mapper_blocks=(CLIP_LAYERS + 1) // 5,
            context_width=CONTEXT_WIDTH,
        ).eval()


def paper_model() -> Model:
    """All parts of the paper's path."""
    return Model(
        ConditionedUNet(tiny_unet(in_channels=9), tiny_exemplar()),
        KlCodec(tiny_vae(), digest="tiny"),
        ClipBackbone(tiny_clip(), digest="tiny"),
        ModelCard(IMAGE_PX, REFERENCE_PX, 10, "class", scheduler_config("scaled_linear", "eps"), run={}),
    )


def vae_of(model: Model) -> AutoencoderKL:
    assert isinstance(model.codec, KlCodec)
    return model.codec.vae


def clip_of(model: Model) -> CLIPVisionModel:
    assert isinstance(model.backbone, ClipBackbone)
    return model.backbone.network


def state_of(model: Model) -> dict[str, torch.Tensor]:
    """Every tensor of the model."""
    parts = {"network": model.network, "codec": model.codec, "backbone": model.backbone}
    out: dict[str, torch.Tensor] = {}
    for part, module in parts.items():
        assert isinstance(module, torch.nn.Module), part
        out |= {f"{part}.{name}": value for name, value in module.state_dict().items()}
    return out


def write_stable_diffusion(folder: Path) -> Path:
    """As CompVis/stable-diffusion-v1-4 in diffusers' layout, with the parts that matter here."""
    tiny_unet().save_pretrained(folder / "unet")
    tiny_vae().save_pretrained(folder / "vae")
    return folder


def write_clip(folder: Path) -> Path:
    """As openai/clip-vit-large-patch14, which has a text model beside the vision model; old, nested names."""
    network = tiny_clip()
    tensors = {f"vision_model.{name.removeprefix('vision_model.')}": v for name, v in network.state_dict().items()}
    tensors["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    tensors["text_model.embeddings.token_embedding.weight"] = torch.zeros(3, 4)
    tensors["logit_scale"] = torch.zeros(())
    folder.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    vision = network.config.to_dict()
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision, "text_config": {}}))
    return folder


def write_paint_by_example(folder: Path) -> Path:
    """As this project exports it."""
    save_model(folder, paper_model())
    return folder


def write_clip_extractor(folder: Path) -> Path:
    """As openai/clip-vit-base-patch32: the vision model with its projection, which the metrics use."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        config = CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=EXTRACTOR_PX,
            patch_size=8,
            projection_dim=EXTRACTOR_WIDTH,
        )
        network = lively(CLIPVisionModelWithProjection(config), 5, scale=0.2)
        network.visual_projection.weight.data *= 0.01  # small features: their likelihood is then above 0, as CLIP's is
    tensors = {}
    for name, value in network.state_dict().items():
        inner = name.removeprefix("vision_model.").removeprefix("vision_model.")
        tensors[name if name.startswith("visual_projection") else f"vision_model.{inner}"] = value.contiguous()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": config.to_dict()}))
    return folder


def write_mixture(path: Path, extractor: Path) -> Path:
    """As `pbe import-mixture` writes the published mixture: over the extractor's features of smooth pictures."""
    rng = np.random.default_rng(6)
    pictures = [resize(rng.integers(0, 256, (4, 4, 3)).astype(np.uint8), width_px=48, height_px=48) for _ in range(48)]
    features = load_clip_extractor(extractor)(pictures, batch_rows=16)
    means, roots = features[:3], np.stack([np.diag(1 / (2 * features.std(0)))] * 3)
    save_mixture(path, Mixture(np.array([0.5, 0.3, 0.2]), means, roots, "full"), source_sha256="0" * 64)
    return path


class _Pool3(torch.nn.Module):
    """Stands for TF's Inception, with the call of its published TorchScript file."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 16, 5, stride=4)

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        resized = torch.nn.functional.interpolate(img.float(), [75, 75], mode="bilinear", align_corners=False)
        features = torch.relu(self.convolution((resized - 128.0) / 128.0)).mean((2, 3))
        return features if return_features else features.softmax(1)


def write_inception(path: Path) -> Path:
    """As inception-2015-12-05.pt: takes uint8 pictures of any size, gives pool3 with return_features=True."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        torch.jit.script(_Pool3().eval()).save(str(path))
    return path


if __name__ == "__main__":
    home = Path(sys.argv[1])
    print(write_stable_diffusion(home / "sd"), write_clip(home / "clip"))
    extractor = write_clip_extractor(home / "clip-extractor")
    print(extractor, write_mixture(home / "mixture.npz", extractor))
