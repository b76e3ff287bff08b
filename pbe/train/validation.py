"""Validation during training: the loss on fixed rows, timesteps and noise, and a grid of fixed edits.

The rows are training rows, as only photos of the train split are materialized. The loss shows, with less noise than the
training loss, whether the run learns and whether two runs differ; it says nothing about unseen photos.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pbe.data.contact import sheet
from pbe.model.card import ModelCard
from pbe.model.codec import Codec
from pbe.train.data.batch import Batch
from pbe.train.fill import codec_on, fill_holes, pictures_of
from pbe.train.loss import Diffusion, row_losses
from pbe.train.ranks import Ranks


class Validation:
    """Holds `train.validation_rows` rows, the same on every rank and for any number of ranks."""

    def __init__(self, card: ModelCard, codec: Codec, diffusion: Diffusion, batch: Batch) -> None:
        """batch: all rows, on the CPU."""
        cfg, count = diffusion.cfg, len(batch.rows)
        self._card, self._codec, self._diffusion = card, codec, diffusion
        self._chunks = _chunks(batch, range(count), cfg.micro_batch)
        self._rows = count
        shown = np.linspace(0, count - 1, min(cfg.grid_rows, count)).round().astype(int)
        self._shown = _chunks(batch, shown.tolist(), cfg.micro_batch)

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
        if not self._shown:
            return None
        columns = []
        with codec_on(self._diffusion.device, self._codec, self._diffusion.cfg) as codec:
            for chunk in self._shown:
                batch = self._on_device(chunk)
                filled = fill_holes(network, batch, card=self._card, codec=codec, diffusion=self._diffusion)
                columns.append([pictures_of(latent, codec) for latent in (batch.x0, batch.masked_latent, filled)])
        return sheet([list(np.concatenate(row)) for row in zip(*columns, strict=True)])

    def _on_device(self, batch: Batch) -> Batch:
        return batch.to(self._diffusion.device)


def _chunks(batch: Batch, rows: Sequence[int], size: int) -> list[Batch]:
    """These rows, at most `size` at once."""
    return [batch.take(rows[start : start + size]) for start in range(0, len(rows), size)]
