"""Stable Diffusion's frozen image codec, diffusers' AutoencoderKL, as in the paper: 8 px per cell, 4 channels."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from pbe.model.folder import STEM
from pbe.model.tensors import folder_digest, new_loaded, read_folder, read_json


class KlCodec(nn.Module):
    """An AutoencoderKL as codec. Pixels (B, 3, S, S) float in [-1, 1]; latents (B, 4, S/8, S/8) of about unit rms.

    Latents are scaled by the VAE's factor, 0.18215 for SD 1.x. Takes and returns float32, and computes in
    it or as `compute_in` says. `digest` identifies the weights.
    """

    project = None  # not needed: the decoder's output is in the range of images

    def __init__(self, vae: AutoencoderKL, *, digest: str) -> None:
        super().__init__()
        self.vae = vae.float().eval().requires_grad_(False)
        self.digest = digest

    @property
    def patch_px(self) -> int:
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def channels(self) -> int:
        return self.vae.config.latent_channels

    def train(self, mode: bool = True) -> "KlCodec":
        return super().train(False)

    def compute_in(self, dtype: torch.dtype) -> "KlCodec":
        return self.to(dtype)

    @torch.no_grad()
    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled mean and standard deviation of the latent's posterior (upstream samples it at every step)."""
        distribution = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        scale = self.vae.config.scaling_factor
        return distribution.mean.float() * scale, distribution.std.float() * scale

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to pixels, not clamped; differentiable."""
        return self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype)).sample.float()


def load_vae(folder: Path) -> KlCodec:
    """Load the `vae` folder of a model in the hub's layout. Raises WeightsError."""
    config = read_json(folder / "config.json")
    vae = new_loaded(lambda: AutoencoderKL.from_config(config), vae_tensors(read_folder(folder, STEM)), str(folder))
    return KlCodec(vae, digest=folder_digest(folder, STEM))


def vae_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under today's names. Before diffusers 0.15 the middle attention had query, key, value, proj_attn."""
    new = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    out = {}
    for name, value in tensors.items():
        parts = name.split(".")
        if "attentions" in parts and parts[-2] in new:
            name = ".".join([*parts[:-2], new[parts[-2]], parts[-1]])
        out[name] = value
    return out
