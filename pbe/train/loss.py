"""The loss of one batch, which training minimizes and validation reports. Formulas: pbe/diffusion/objective.py."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pbe.diffusion.objective import add_noise, loss_per_row, min_snr_weight, predicted_x0, target
from pbe.train.data.batch import Batch
from pbe.train.perceptual import PerceptualLoss
from pbe.train.settings import TrainConfig


@dataclass(frozen=True)
class Diffusion:
    """The diffusion process to learn, and the precision of training."""

    cfg: TrainConfig
    grey_latent: Tensor  # (1, C, h, w): the latent of a wholly hidden photo
    alpha_bar: Tensor  # (T,)
    device: torch.device
    perceptual: PerceptualLoss | None = None  # set if train.perceptual_weight is above 0

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the network's inputs."""
        return torch.bfloat16 if self.cfg.precision in ("bf16", "bf16_pure") else torch.float32


def row_losses(network: Any, batch: Batch, diffusion: Diffusion) -> Tensor:
    """(B,) float32: each row's loss. `batch` is on the diffusion's device.

    The squared error, min-SNR weighted if `min_snr_gamma` is set, and `perceptual_weight` times the perceptual loss.
    network: a ConditionedUNet, or the engine around it.
    """
    cfg, dtype = diffusion.cfg, diffusion.dtype
    hide = batch.drop_context[:, None, None, None]
    ab = diffusion.alpha_bar[batch.timestep]
    keep_mask = torch.where(hide, torch.zeros_like(batch.keep_mask_latent), batch.keep_mask_latent)
    noisy = add_noise(batch.x0, batch.noise, ab)
    prediction = network(
        noisy.to(dtype),
        batch.timestep,
        masked_latent=torch.where(hide, diffusion.grey_latent, batch.masked_latent).to(dtype),
        keep_mask_latent=keep_mask.to(dtype),
        exemplar_tokens=batch.exemplar_tokens.to(dtype),
        drop_condition=batch.drop_condition,
    )
    loss = loss_per_row(prediction, target(cfg.objective, x0=batch.x0, noise=batch.noise, alpha_bar=ab))
    if cfg.min_snr_gamma is not None:
        loss = loss * min_snr_weight(cfg.objective, alpha_bar=ab, gamma=cfg.min_snr_gamma)
    if diffusion.perceptual is not None:
        x0 = predicted_x0(cfg.objective, prediction=prediction.float(), noisy=noisy, alpha_bar=ab)
        loss = loss + cfg.perceptual_weight * diffusion.perceptual(x0, batch.x0)
    return loss
