"""Validation during training: the loss on fixed rows, timesteps and noise, and a grid of fixed edits.

The rows are training rows, as only photos of the train split are materialized. The loss shows, with less noise than the
training loss, whether the run learns and whether two runs differ; it says nothing about unseen photos.
"""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pbe.data.contact import sheet
from pbe.diffusion.sampling import Condition, Sampling, sample
from pbe.encode import to_images
from pbe.model.card import ModelCard
from pbe.model.codec import Codec
from pbe.train.data.batch import Batch
from pbe.train.loss import Diffusion, row_losses
from pbe.train.ranks import Ranks

GRID_SAMPLING = Sampling(guidance_scale=3.0, steps=20)  # few steps: the grid is for a quick look, not for metrics


class Validation:
    """Holds `train.validation_rows` rows, the same on every rank and for any number of ranks."""

    def __init__(self, card: ModelCard, codec: Codec, diffusion: Diffusion, batch: Batch) -> None:
        """batch: all rows, on the CPU."""
        cfg, count = diffusion.cfg, len(batch.rows)
        self._card, self._codec, self._diffusion = card, codec, diffusion
        starts = range(0, count, cfg.micro_batch)
        self._chunks = [batch.take(range(start, min(start + cfg.micro_batch, count))) for start in starts]
        self._rows = count
        shown = np.linspace(0, count - 1, min(cfg.grid_rows, count)).round().astype(int)
        self._shown = batch.take(shown.tolist()) if len(shown) else None

    @torch.no_grad()
    def loss(self, network: Any, ranks: Ranks) -> float:
        """Mean loss over all rows. Collective: every rank runs the network equally often, as ZeRO 3 requires."""
        total = torch.zeros((), dtype=torch.float64, device=self._diffusion.device)
        for first in range(0, len(self._chunks), ranks.world):
            mine = first + ranks.rank
            losses = row_losses(network, self._on_device(self._chunks[mine % len(self._chunks)]), self._diffusion)
            if mine < len(self._chunks):
                total += losses.double().sum()
        total = total.float()
        dist.all_reduce(total)
        return float(total) / self._rows

    @torch.no_grad()
    def grid(self, network: Any) -> np.ndarray | None:
        """(H, W, 3) uint8: a row of photos, one of the masked photos, one of the edits; None if `train.grid_rows` is 0.

        Collective: every rank does the same work.
        """
        if self._shown is None:
            return None
        batch, codec = self._on_device(self._shown), self._codec.to(self._diffusion.device)
        filled = self._filled(network, batch, codec)
        pictures = [to_images(codec.decode(latent)) for latent in (batch.x0, batch.masked_latent, filled)]
        return sheet([list(row) for row in pictures])

    def _filled(self, network: Any, batch: Batch, codec: Codec) -> Tensor:
        """(B, C, h, w) float32 latents of the batch's rows with their holes filled, sampled from the batch's noise."""
        dtype = self._diffusion.dtype
        given = Condition.of_rows(
            batch.masked_latent, batch.keep_mask_latent, batch.exemplar_tokens, sampling=GRID_SAMPLING, dtype=dtype
        )

        def denoise(noisy: Tensor, timestep: Tensor) -> Tensor:
            # call the engine, not its module: under ZeRO 3 the engine gathers the weights
            return network(
                noisy.to(dtype),
                timestep,
                masked_latent=given.masked_latent,
                keep_mask_latent=given.keep_mask_latent,
                exemplar_tokens=given.exemplar_tokens,
                drop_condition=given.drop_condition,
            ).float()

        return sample(
            denoise, batch.noise, scheduler=self._card.scheduler, sampling=GRID_SAMPLING, project=codec.project
        )

    def _on_device(self, batch: Batch) -> Batch:
        return batch.to(self._diffusion.device)
