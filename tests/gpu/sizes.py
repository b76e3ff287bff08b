"""Sizes: the paper's for a GPU, and tiny ones to rehearse the program on a CPU."""

from dataclasses import dataclass, replace
from typing import Any

from infra.memory import PAPER
from pbe.model.architecture import Architecture
from pbe.model.settings import ExemplarConfig, UNetConfig


@dataclass(frozen=True)
class Sizes:
    arch: Architecture
    image_px: int
    encoded_rows: int
    rows_per_group: int
    micro_batch: int
    larger_micro_batches: tuple[int, ...]
    window_steps: int  # optimizer steps between two points of the curve; each point is a measurement
    windows: int  # after the first, which warms up
    vae: dict[str, Any]  # of diffusers' AutoencoderKL
    clip: dict[str, Any]  # of transformers' CLIPVisionConfig
    reference_draws: int
    encode_rows: int
    edit_steps: int
    edits: tuple[int, ...]  # how many at once
    product_side: int  # of the matrix product that measures peak performance
    speedrun_batch: int

    def of(self, arch: Architecture, image_px: int) -> "Sizes":
        """For another network and picture size."""
        return replace(self, arch=arch, image_px=image_px)


PAPER_SIZES = Sizes(
    arch=PAPER,
    image_px=512,
    encoded_rows=1024,
    rows_per_group=16,
    micro_batch=4,
    larger_micro_batches=(8, 16, 32),
    window_steps=5,
    windows=4,
    vae={  # Stable Diffusion 1.x
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "norm_num_groups": 32,
        "sample_size": 512,
        "scaling_factor": 0.18215,
    },
    clip={  # ViT-L/14
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
        "projection_dim": 768,
    },
    reference_draws=6,
    encode_rows=32,
    edit_steps=50,
    edits=(1, 8),
    product_side=8192,
    speedrun_batch=512,
)

TINY_SIZES = replace(
    PAPER_SIZES,
    arch=replace(
        PAPER,
        latent_px=8,
        backbone_width=64,
        unet=UNetConfig(
            block_channels=(32, 64),
            attention=(True, False),
            layers_per_block=1,
            attention_heads=4,
            norm_groups=8,
            context_width=24,
            class_embedding=False,
        ),
        exemplar=ExemplarConfig(mapper_width=64, mapper_blocks=2),  # diffusers' number for nine layers of CLIP
    ),
    image_px=64,
    encoded_rows=64,
    rows_per_group=4,
    micro_batch=2,
    larger_micro_batches=(4,),
    window_steps=2,
    windows=2,
    vae=PAPER_SIZES.vae | {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4},
    clip=PAPER_SIZES.clip
    | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 9, "num_attention_heads": 1, "image_size": 28}
    | {"patch_size": 7, "projection_dim": 24},
    reference_draws=2,
    encode_rows=4,
    edit_steps=4,
    edits=(1, 2),
    product_side=256,
    speedrun_batch=4,
)
