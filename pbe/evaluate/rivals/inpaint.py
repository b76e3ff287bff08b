"""inpaint, and blended by text: Stable Diffusion through diffusers' StableDiffusionInpaintPipeline.

By the channels of its UNet that pipeline is one or the other: 9, the inpainting model, which sees the masked photo; 4,
blended latent diffusion (Avrahami et al. 2023), which puts the noised photo back outside the hole after every step.

Differences from calling it by hand: each item has its own noise generator, so that an edit does not depend on its
batch; the photo is put back outside the hole; a 4-channel model gets a photo without what the hole hides, and a hole of
whole latent cells, as its known cells would show it.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionInpaintPipeline

from pbe.evaluate.rivals.fill import FillTask, RivalError, pasted, sized, whole_cells
from pbe.evaluate.rivals.pipelines import generators, levels, open_pipeline, pillow
from pbe.evaluate.settings import BlendedTextBaseline, InpaintBaseline
from pbe.model.precision import float32_products

CHANNELS = {"inpaint": 9, "blended_text": 4}  # into the UNet: noisy latent, mask, masked photo; noisy latent alone
SUCH_AS = {
    "inpaint": "stable-diffusion-v1-5/stable-diffusion-inpainting",
    "blended_text": "CompVis/stable-diffusion-v1-4",
}


class Inpaint:
    """The pipeline of a folder, as a Rival."""

    reads_reference = False

    def __init__(self, folder: Path, cfg: InpaintBaseline | BlendedTextBaseline, device: torch.device) -> None:
        """Raises RivalError for a model of another kind."""
        self._pipeline, self._cfg = open_pipeline(StableDiffusionInpaintPipeline, folder, device, cfg.dtype), cfg
        unet = self._pipeline.unet.config
        if unet.in_channels != CHANNELS[cfg.kind]:
            raise RivalError(
                f"{folder}: its UNet takes {unet.in_channels} channels, kind {cfg.kind} needs {CHANNELS[cfg.kind]}, as "
                f"{SUCH_AS[cfg.kind]} has"
            )
        self._cell_px = self._pipeline.vae_scale_factor
        self._side_px = unet.sample_size * self._cell_px

    def __call__(self, tasks: Sequence[FillTask]) -> list[np.ndarray | None]:
        given = [sized(task, self._side_px) for task in tasks]
        if self._cfg.kind == "blended_text":
            given = [(source, whole_cells(hole, self._cell_px)) for source, hole in given]
        with float32_products(tf32=self._cfg.dtype == "tf32"):
            result = self._pipeline(
                prompt=[self._cfg.prompt.format(label_name=task.label_name) for task in tasks],
                image=[pillow(source) for source, _ in given],
                mask_image=[pillow(hole * np.uint8(255)) for _, hole in given],
                num_inference_steps=self._cfg.steps,
                guidance_scale=self._cfg.guidance_scale,
                generator=generators(tasks),
                output_type="np",
            )
        withheld = result.nsfw_content_detected or [False] * len(tasks)
        return [
            None if unsafe else pasted(levels(picture), task)
            for picture, unsafe, task in zip(result.images, withheld, tasks, strict=True)
        ]
