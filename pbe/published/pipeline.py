"""Paint by Example (arXiv 2211.13227) for diffusers: fills a hole in a photo after a reference image. By pbe.

    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    edited, = pipe(image=photo, mask_image=mask, example_image=reference).images

The whole photo is squashed to the model's square, edited, and resized back; photos, masks and references are resized by
Pillow's bicubic filter. pbe's own editor works on the square around the hole, which keeps more detail of a large photo.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DConditionModel
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class PaintByExamplePipeline(DiffusionPipeline):
    model_cpu_offload_seq = "image_encoder->unet->vae"

    def __init__(
        self, vae: AutoencoderKL, image_encoder: Any, unet: UNet2DConditionModel, scheduler: SchedulerMixin
    ) -> None:
        super().__init__()
        self.register_modules(vae=vae, image_encoder=image_encoder, unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        image: Image.Image,
        mask_image: Image.Image,
        example_image: Image.Image,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        paste_back: bool = True,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """num_images_per_prompt edits of one photo.

        image; mask_image of its size, white where the edit goes; example_image of any size. guidance_scale: 1 = none.
        latents: the noise to begin with, (num_images_per_prompt, 4, h, w) ~ N(0, I); None: drawn from generator.
        paste_back: keep the photo's own pixels outside the hole. output_type: "pil", pictures of the photo's size, or
        "pt", the decoded squares (n, 3, S, S) in [0, 1], nothing pasted back.
        """
        if mask_image.size != image.size:
            raise ValueError(f"mask_image is {mask_image.size}, image {image.size}: the sizes must match")
        if output_type not in ("pil", "pt"):
            raise ValueError(f"output_type {output_type!r}: allowed are 'pil' and 'pt'")
        device, dtype, n = self._execution_device, self.unet.dtype, num_images_per_prompt
        cell_px = 2 ** (len(self.vae.config.block_out_channels) - 1)
        side_px, cells = self.unet.config.sample_size * cell_px, self.unet.config.sample_size
        hole = Image.fromarray((np.asarray(mask_image.convert("L")) >= 128).astype(np.uint8) * 255)
        keep = (_pixels(hole, side_px) < 0.5).float()
        photo = _pixels(image.convert("RGB"), side_px)

        mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
        reference = (_pixels(example_image.convert("RGB"), self.image_encoder.config.image_size) - mean) / std
        context = self.image_encoder(reference.to(device, self.image_encoder.dtype)).to(dtype).repeat(n, 1, 1)
        masked = self.vae.encode(((2 * photo - 1) * keep).to(device, self.vae.dtype)).latent_dist.mean
        masked = masked.repeat(n, 1, 1, 1).to(dtype) * self.vae.config.scaling_factor
        keep = torch.nn.functional.interpolate(keep, (cells, cells), mode="bilinear").to(device, dtype)
        known = torch.cat([masked, keep.repeat(n, 1, 1, 1)], dim=1)
        guided = guidance_scale != 1
        if guided:
            nothing = self.image_encoder.uncond_vector.to(device, dtype).expand_as(context)
            context, known = torch.cat([nothing, context]), torch.cat([known, known])
        labels = context[:, 0] if self.unet.config.class_embed_type == "projection" else None

        if latents is None:
            shape = (n, self.vae.config.latent_channels, cells, cells)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        self.scheduler.set_timesteps(num_inference_steps)
        latents = latents.to(device, torch.float32) * self.scheduler.init_noise_sigma
        for timestep in self.progress_bar(self.scheduler.timesteps):
            rows = self.scheduler.scale_model_input(torch.cat([latents] * (1 + guided)), timestep).to(dtype)
            prediction = self.unet(
                torch.cat([rows, known], dim=1), timestep, encoder_hidden_states=context, class_labels=labels
            ).sample.float()  # the sampler's steps are in float32 always
            if guided:
                without, with_it = prediction.chunk(2)
                prediction = without + guidance_scale * (with_it - without)
            latents = self.scheduler.step(prediction, timestep, latents).prev_sample
        decoded = self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype)).sample.float()
        self.maybe_free_model_hooks()
        if not decoded.isfinite().all():
            raise FloatingPointError("the edit has NaN or infinite values; load the pipeline with another torch_dtype")
        squares = (decoded.clamp(-1, 1) + 1) / 2
        images = squares if output_type == "pt" else [_picture(square, image.size) for square in squares]
        if paste_back and output_type == "pil":
            images = [Image.composite(edited, image.convert("RGB"), hole) for edited in images]
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def _pixels(picture: Image.Image, side_px: int) -> Tensor:
    """(1, C, side_px, side_px) float32 in [0, 1]."""
    square = np.atleast_3d(np.asarray(picture.resize((side_px, side_px), Image.Resampling.BICUBIC)))
    return torch.from_numpy(square.transpose(2, 0, 1).copy())[None].float() / 255


def _picture(square: Tensor, size: tuple[int, int]) -> Image.Image:
    levels = (square * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(levels).resize(size, Image.Resampling.BICUBIC)
