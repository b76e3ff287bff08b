"""A batch of training rows, assembled from their encodings and their random draws."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pbe.encode import Posterior, to_device
from pbe.train.data.draws import Draws


@dataclass(frozen=True)
class Batch:
    """One batch, float32 unless noted. B rows, C latent channels, h x w latent pixels."""

    x0: Tensor  # (B, C, h, w) a sample of the source's posterior
    masked_latent: Tensor  # (B, C, h, w)
    keep_mask_latent: Tensor  # (B, 1, h, w) in [0, 1], 1 = known
    exemplar_tokens: Tensor  # (B, T, width); with train.condition: text, those of captions
    noise: Tensor  # (B, C, h, w)
    timestep: Tensor  # (B,) int64
    drop_condition: Tensor  # (B,) bool: use the unconditional vector
    drop_context: Tensor  # (B,) bool: hide the whole photo (sample profile)
    rows: tuple[str, ...]  # which rows, used in messages

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`. A pinned batch is copied to a GPU without waiting."""
        wait = device.type == "cpu"  # an asynchronous copy from a GPU would not have its values yet
        tensors = {
            name: value.to(device, non_blocking=not wait) for name, value in vars(self).items() if name != "rows"
        }
        return Batch(**tensors, rows=self.rows)

    def pinned(self) -> "Batch":
        """The batch in page-locked memory: copying from other memory would first stop the GPU's stream."""
        tensors = {name: value.pin_memory() for name, value in vars(self).items() if name != "rows"}
        return Batch(**tensors, rows=self.rows)

    def take(self, indices: Sequence[int]) -> "Batch":
        """The rows at `indices`, in that order."""
        tensors = {name: value[list(indices)] for name, value in vars(self).items() if name != "rows"}
        return Batch(**tensors, rows=tuple(self.rows[index] for index in indices))


def make_batch(
    draws: Sequence[Draws],
    *,
    source: Posterior,
    masked: Posterior,
    keep_mask_latent: Tensor,
    exemplar_tokens: Tensor,
) -> Batch:
    """The rows, with latents sampled from their posteriors; on the posteriors' device.

    Either all draws have normals for the two posteriors, or none has, which takes the means.
    """

    def stacked(values: list[Any]) -> Tensor:
        return to_device(torch.from_numpy(np.stack(values)), source.mean.device)

    def sampled(posterior: Posterior, normals: list[Any]) -> Tensor:
        return posterior.mean if normals[0] is None else posterior.mean + posterior.std * stacked(normals)

    return Batch(
        x0=sampled(source, [drawn.source_normal for drawn in draws]),
        masked_latent=sampled(masked, [drawn.masked_normal for drawn in draws]),
        keep_mask_latent=keep_mask_latent,
        exemplar_tokens=exemplar_tokens,
        noise=stacked([drawn.noise for drawn in draws]),
        timestep=stacked([np.int64(drawn.timestep) for drawn in draws]),
        drop_condition=stacked([np.bool_(drawn.drop_condition) for drawn in draws]),
        drop_context=stacked([np.bool_(drawn.drop_context) for drawn in draws]),
        rows=tuple(drawn.row for drawn in draws),
    )


def joined(batches: Sequence[Batch]) -> Batch:
    """The rows of all batches, in order, as one batch."""
    names = [f.name for f in fields(Batch) if f.name != "rows"]
    tensors = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in names}
    return Batch(**tensors, rows=tuple(row for batch in batches for row in batch.rows))
