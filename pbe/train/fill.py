"""Fills the holes of rows while the network trains, for the grid of edits and for scores.

On a GPU this must fit beside the training's weights: the codec leaves the GPU afterwards, and decodes row by row.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pbe.diffusion.sampling import Condition, Sampling, sample
from pbe.encode import to_images
from pbe.model.card import ModelCard
from pbe.model.codec import Codec
from pbe.train.data.batch import Batch
from pbe.train.loss import Diffusion
from pbe.train.settings import TrainConfig


def quick_sampling(cfg: TrainConfig) -> Sampling:
    """Few steps, for a quick look. A network that always saw its condition has no unconditional prediction to guide
    away from."""
    return Sampling(guidance_scale=3.0 if cfg.condition_dropout_prob > 0 else 1.0, steps=20)


@contextmanager
def codec_on(device: torch.device, codec: Codec, cfg: TrainConfig) -> Iterator[Codec]:
    """Within the block the codec is on `device`; then on the CPU, unless training from pixels runs it at every step."""
    yield codec.to(device)
    if cfg.input == "encoded":
        codec.to(torch.device("cpu"))


def pictures_of(latents: Tensor, codec: Codec) -> np.ndarray:
    """(B, S, S, 3) uint8. One at a time: AutoencoderKL's decoder takes 0.75 GiB for 512 px."""
    return np.concatenate([to_images(codec.decode(latent[None])) for latent in latents])


def fill_holes(network: Any, batch: Batch, *, card: ModelCard, codec: Codec, diffusion: Diffusion) -> Tensor:
    """(B, C, h, w) float32 latents of the batch's rows with their holes filled, sampled from the batch's noise.

    network: the engine, not its module: under ZeRO 3 the engine gathers the weights. Batch and codec are on its device.
    """
    dtype, sampling = diffusion.dtype, quick_sampling(diffusion.cfg)
    given = Condition.of_rows(
        batch.masked_latent, batch.keep_mask_latent, batch.exemplar_tokens, sampling=sampling, dtype=dtype
    )

    def denoise(noisy: Tensor, timestep: Tensor) -> Tensor:
        return network(
            noisy.to(dtype),
            timestep,
            masked_latent=given.masked_latent,
            keep_mask_latent=given.keep_mask_latent,
            exemplar_tokens=given.exemplar_tokens,
            drop_condition=given.drop_condition,
        ).float()

    return sample(denoise, batch.noise, scheduler=card.scheduler, sampling=sampling, project=codec.project)
