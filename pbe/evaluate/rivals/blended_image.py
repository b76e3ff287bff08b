"""blended_image: blended latent diffusion, drawn to the reference by the gradient of a cosine, in the text's place.

    x_0'  what the model predicts from x_t without a condition, decoded; the photo outside the hole
    c     cosine between the features of the hole's box in x_0' and of the reference
    eps   - scale * sqrt(1 - ab_t) * dc/dx_t                         the guided noise (Dhariwal & Nichol 2021)
    x_t-1 outside the hole: the photo, noised to t - 1               blended after every step

The latent form of Avrahami et al. 2022 (github.com/omriav/blended-diffusion, MIT), which the paper compares with. That
is a pixel model; it starts at a photo noised by 75 of 100 steps, averages the gradient over 8 augmented views of the
masked x_0', adds a loss on values out of range, and keeps the best of 32. Here: from noise, one view, the hole's box.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate, max_pool2d

from pbe.data.boxes import Box
from pbe.data.rng import row_rng
from pbe.diffusion.objective import add_noise, predicted_x0, target
from pbe.diffusion.sampling import Denoiser, Sampling, sample
from pbe.diffusion.schedule import alphas_cumprod, objective_of
from pbe.encode import encode_masked, encode_source, to_device, to_images, to_pixels
from pbe.evaluate.rivals.fill import FillTask, RivalError, pasted, sized
from pbe.evaluate.settings import BlendedImageBaseline
from pbe.model.backbone import Backbone
from pbe.model.codec import Codec
from pbe.model.exemplar import ExemplarMapper
from pbe.model.precision import float32_products
from pbe.model.tensors import read_json
from pbe.model.text import TextEncoder
from pbe.model.weights import load_model

CHANNELS = 4  # into a text-to-image model's UNet


class Guide(Protocol):
    """A network whose cosine guides."""

    @property
    def input_px(self) -> int: ...

    def of_pixels(self, pixels: Tensor) -> Tensor:
        """(B, 3, R, R) float32 in [0, 1] to (B, width) features, with a gradient."""
        ...


@dataclass(frozen=True)
class Unconditional:
    """A latent diffusion model without its condition, on its device.

    denoiser: makes, of sources (B, S, S, 3) uint8 and hole masks (B, S, S) of 0/1, the function that predicts.
    backbone: its exemplar encoder, if it has one.
    """

    codec: Codec
    scheduler: dict[str, Any]
    image_px: int
    denoiser: Callable[[np.ndarray, np.ndarray], Denoiser]
    backbone: Backbone | None


def open_unconditional(folder: Path, device: torch.device) -> Unconditional:
    """One of this project's models, with its unconditional vector; or Stable Diffusion, with the empty prompt.

    Raises RivalError, ModelError.
    """
    return _own(folder, device) if (folder / "image_encoder").is_dir() else _stable_diffusion(folder, device)


def _own(folder: Path, device: torch.device) -> Unconditional:
    model = load_model(folder)
    network = model.network.to(device).requires_grad_(False)
    exemplar = network.exemplar
    # what a folder with an image_encoder has
    assert isinstance(exemplar, ExemplarMapper) and not isinstance(model.backbone, TextEncoder)
    codec, backbone = model.codec.to(device), model.backbone.to(device)

    def denoiser(sources: np.ndarray, hole_masks: np.ndarray) -> Denoiser:
        masked, keep = encode_masked(codec, sources, hole_masks, device=device)
        context = exemplar.uncond_vector.expand(len(sources), -1, -1)
        return lambda noisy, timestep: network.denoise(
            noisy, timestep, masked_latent=masked.mean, keep_mask_latent=keep, context=context
        )

    return Unconditional(codec, dict(model.card.scheduler), model.card.image_px, denoiser, backbone)


def _stable_diffusion(folder: Path, device: torch.device) -> Unconditional:
    from diffusers import StableDiffusionInpaintPipeline

    from pbe.evaluate.rivals.pipelines import open_pipeline
    from pbe.model.vae import KlCodec

    pipeline = open_pipeline(StableDiffusionInpaintPipeline, folder, device, "float32")
    unet, codec = pipeline.unet, KlCodec(pipeline.vae, digest="")
    if unet.config.in_channels != CHANNELS:
        raise RivalError(
            f"{folder}: its UNet takes {unet.config.in_channels} channels, kind blended_image needs {CHANNELS}, as "
            "CompVis/stable-diffusion-v1-4 has, or one of this project's models"
        )
    with torch.no_grad():
        nothing, _ = pipeline.encode_prompt("", device, 1, do_classifier_free_guidance=False)

    def denoiser(sources: np.ndarray, _: np.ndarray) -> Denoiser:
        context = nothing.expand(len(sources), -1, -1)
        return lambda noisy, timestep: unet(noisy, timestep, encoder_hidden_states=context).sample

    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    return Unconditional(codec, scheduler, unet.config.sample_size * codec.patch_px, denoiser, None)


class BlendedImage:
    """A Rival of an unconditional model and a guide, both on `device`."""

    reads_reference = True

    def __init__(
        self, model: Unconditional, guide: Guide | None, cfg: BlendedImageBaseline, device: torch.device
    ) -> None:
        """guide: None for the model's own backbone. Raises RivalError if it has none."""
        if guide is None and model.backbone is None:
            raise RivalError("kind blended_image: Stable Diffusion has no backbone that could guide; set clip")
        found: Any = guide or model.backbone
        self.guide: Guide = found
        self._model, self._cfg, self._device = model, cfg, device
        self._alpha_bar = alphas_cumprod(model.scheduler).to(device)
        self._objective = objective_of(model.scheduler)

    def __call__(self, tasks: Sequence[FillTask]) -> list[np.ndarray | None]:
        given = [sized(task, self._model.image_px) for task in tasks]
        sources, hole_masks = np.stack([source for source, _ in given]), np.stack([hole for _, hole in given])
        with float32_products(tf32=self._cfg.dtype == "tf32"):
            aim = Aim(self.guide, sources, hole_masks, [task.reference for task in tasks], self._device)
            fills = [
                self._sampled(aim, sources, hole_masks, [task.seed for task in tasks], candidate)
                for candidate in range(self._cfg.candidates)
            ]
            with torch.no_grad():
                best = torch.stack([aim.cosine(pixels) for pixels in fills]).argmax(0).tolist()
        chosen = torch.stack([fills[candidate][row] for row, candidate in enumerate(best)])
        if not chosen.isfinite().all():
            raise RivalError(
                f"kind blended_image: NaN or infinite values; lower gradient_scale, now {self._cfg.gradient_scale:g}"
            )
        return [pasted(fill, task) for fill, task in zip(to_images(chosen), tasks, strict=True)]

    def _sampled(
        self, aim: "Aim", sources: np.ndarray, hole_masks: np.ndarray, seeds: Sequence[int], candidate: int
    ) -> Tensor:
        """One candidate per row: pixels (B, 3, S, S), not clamped."""
        codec = self._model.codec
        known = encode_source(codec, sources, device=self._device).mean
        pixels = torch.from_numpy(hole_masks.astype(np.float32))[:, None]
        hole = to_device(max_pool2d(pixels, codec.patch_px), self._device)  # cells with any hole in them
        generators = [row_rng(seed, "candidate", candidate) for seed in seeds]
        rows = [generator.standard_normal(known.shape[1:], dtype=np.float32) for generator in generators]
        noise = to_device(torch.from_numpy(np.stack(rows)), self._device)

        def blend(latent: Tensor, alpha_bar: Tensor) -> Tensor:
            return (1 - hole) * add_noise(known, noise, alpha_bar.expand(len(known))) + hole * latent

        latent = sample(
            self._guided(self._model.denoiser(sources, hole_masks), aim),
            noise,
            scheduler=self._model.scheduler,
            sampling=Sampling(guidance_scale=1, steps=self._cfg.steps),
            project=codec.project,
            blend=blend,
        )
        with torch.no_grad():
            return codec.decode(latent)

    def _guided(self, denoise: Denoiser, aim: "Aim") -> Denoiser:
        scale = self._cfg.gradient_scale
        if not scale:
            return denoise

        def guided(noisy: Tensor, timestep: Tensor) -> Tensor:
            alpha_bar = self._alpha_bar[timestep].clamp_min(1e-8)  # as `predicted_x0`
            with torch.enable_grad():
                leaf = noisy.detach().requires_grad_()
                prediction = denoise(leaf, timestep)
                x0 = predicted_x0(self._objective, prediction=prediction, noisy=leaf, alpha_bar=alpha_bar)
                [gradient] = torch.autograd.grad(aim.cosine(self._model.codec.decode(x0)).sum(), leaf)
            ab = alpha_bar[:, None, None, None]
            noise = -scale * (1 - ab).sqrt() * gradient
            # at the same x_t, x_0 moves with the noise; `target` is linear
            shift = target(self._objective, x0=-((1 - ab) / ab).sqrt() * noise, noise=noise, alpha_bar=alpha_bar)
            return prediction.detach() + shift

        return guided


class Aim:
    """The references of a batch, and how near pixels come to them."""

    def __init__(
        self,
        guide: Guide,
        sources: np.ndarray,
        hole_masks: np.ndarray,
        references: Sequence[np.ndarray],
        device: torch.device,
    ) -> None:
        self._guide = guide
        self._source = to_device(to_pixels(sources), device)
        self._hole = to_device(torch.from_numpy(hole_masks)[:, None] > 0, device)
        self._boxes = [_box_of(hole) for hole in hole_masks]
        squares = torch.cat([self._square(to_device(to_pixels(picture[None]), device)) for picture in references])
        with torch.no_grad():
            self._wanted = guide.of_pixels(squares)

    def cosine(self, pixels: Tensor) -> Tensor:
        """(B,) cosine between the hole's box of pixels (B, 3, S, S) in [-1, 1] and the reference."""
        seen = torch.where(self._hole, pixels, self._source)
        crops = [
            self._square(seen[row : row + 1, :, box.y0 : box.y1, box.x0 : box.x1])
            for row, box in enumerate(self._boxes)
        ]
        return cosine_similarity(self._guide.of_pixels(torch.cat(crops)), self._wanted)

    def _square(self, pixels: Tensor) -> Tensor:
        side = self._guide.input_px
        return interpolate((pixels + 1) / 2, (side, side), mode="bilinear", align_corners=False, antialias=True)


def _box_of(hole_mask: np.ndarray) -> Box:
    ys, xs = np.flatnonzero(hole_mask.any(1)), np.flatnonzero(hole_mask.any(0))
    return Box(int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1)
