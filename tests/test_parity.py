"""Sampling here against diffusers' PaintByExamplePipeline, on the same weights, pictures and noise.

The pipeline prepares its inputs in its own way, which is repeated here by this project's functions: the reference
cropped to its middle, the masked latent drawn from the posterior, the mask taken to latent size by its nearest pixel.
"""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pbe.data.rng import row_rng
from pbe.diffusion.sampling import Sampling, sample
from pbe.diffusion.settings import SamplerName
from pbe.edit import Editor
from pbe.encode import encode_masked, encode_references
from pbe.model.vae import KlCodec
from pbe.model.weights import Model
from tests.tiny_weights import IMAGE_PX, REFERENCE_PX, clip_backbone_of, lively, paper_model, vae_of

pytest.importorskip(
    "diffusers.pipelines.deprecated.paint_by_example", reason="this diffusers has no PaintByExamplePipeline any more"
)
from diffusers import DDIMScheduler, PNDMScheduler

from tests.diffusers_pipeline import Condition, conditions_seen, pipeline_of

ROWS, STEPS, CELL_PX, POSTERIOR_SEED = 2, 12, 8, 3
SCHEDULERS = {"pndm": PNDMScheduler, "ddim": DDIMScheduler}


@pytest.fixture(scope="module")
def model() -> Model:
    """A model whose zero-initialised weights, also in mapper and VAE, have noise added."""
    model = paper_model()
    lively(model.network.exemplar, 5)
    lively(vae_of(model), 6)
    return model


def _pictures(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def _holes(*boxes: tuple[int, int, int, int]) -> np.ndarray:
    holes = np.zeros((len(boxes), IMAGE_PX, IMAGE_PX), np.uint8)
    for hole, (x0, y0, x1, y1) in zip(holes, boxes, strict=True):
        hole[y0:y1, x0:x1] = 1
    return holes


def _pil(pictures: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(picture) for picture in pictures]


def _condition(model: Model, sources: np.ndarray, holes: np.ndarray, references: np.ndarray, scale: float) -> Condition:
    """references: (B, R, R, 3) uint8, at the encoder's size."""
    masked, _ = encode_masked(model.codec, sources, holes)
    generator = torch.Generator().manual_seed(POSTERIOR_SEED)
    drawn = masked.mean + masked.std * torch.randn(masked.mean.shape, generator=generator)
    keep = 1 - torch.from_numpy(holes[:, None, ::CELL_PX, ::CELL_PX]).float()
    copies = Sampling(scale).forwards_per_step
    drop = torch.arange(copies * ROWS) < (copies - 1) * ROWS
    with torch.no_grad():
        tokens = encode_references(clip_backbone_of(model), references)
        context = model.network.exemplar(tokens.repeat(copies, 1, 1), drop)
    return Condition(drawn.repeat(copies, 1, 1, 1), keep.repeat(copies, 1, 1, 1), context)


@pytest.mark.parametrize("scale", [5.0, 1.0])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_conditions_latents_and_pictures_are_those_of_diffusers(
    sampler: SamplerName, scale: float, model: Model
) -> None:
    pipeline = pipeline_of(model, SCHEDULERS[sampler].from_config(model.card.scheduler))
    sources = _pictures(ROWS, IMAGE_PX, IMAGE_PX, 3, seed=0)
    holes = _holes((5, 9, 23, 30), (0, 4, 13, 20))  # off the cells' borders, where ways to shrink a mask differ
    references = [*_pil(_pictures(1, 40, 61, 3, seed=1)), *_pil(_pictures(1, 90, 33, 3, seed=2))]
    noise = torch.randn(ROWS, 4, 4, 4, generator=torch.Generator().manual_seed(7))
    with conditions_seen(model.network.unet) as seen:
        expected = pipeline(
            example_image=references,
            image=_pil(sources),
            mask_image=_pil(holes * 255),
            num_inference_steps=STEPS,
            guidance_scale=scale,
            latents=noise,
            generator=torch.Generator().manual_seed(POSTERIOR_SEED),
            output_type="latent",
        ).images
    assert expected.isfinite().all() and expected.std() > 1

    cropped = pipeline.feature_extractor(references, do_rescale=False, do_normalize=False).pixel_values
    ours, theirs = _condition(model, sources, holes, np.stack(cropped).transpose(0, 2, 3, 1), scale), seen[0]
    torch.testing.assert_close(ours.masked_latent, theirs.masked_latent, atol=2e-6, rtol=0)
    torch.testing.assert_close(ours.keep_mask_latent, theirs.keep_mask_latent, atol=0, rtol=0)
    torch.testing.assert_close(ours.context, theirs.context, atol=2e-6, rtol=0)

    def latents(condition: Condition) -> Tensor:
        return sample(
            lambda noisy, timestep: model.network.denoise(noisy, timestep, **vars(condition)),
            noise,
            scheduler=model.card.scheduler,
            sampling=Sampling(scale, STEPS, sampler),
        )

    torch.testing.assert_close(latents(theirs), expected, atol=1e-6, rtol=0)  # one loop, equal to the last bit here
    # 12 steps at scale 5 make some hundred times as much of the conditions' rounding; of a picture's range it is little
    pictures = [model.codec.decode(latent) for latent in (latents(ours), expected)]
    torch.testing.assert_close(*pictures, atol=1e-4, rtol=0)


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_the_editor_fills_holes_as_diffusers_does(sampler: SamplerName, model: Model) -> None:
    """Inputs on which both agree: a posterior without width, holes of whole cells, references of the encoder's size."""
    vae = copy.deepcopy(vae_of(model))
    with torch.no_grad():
        vae.quant_conv.weight[4:], vae.quant_conv.bias[4:] = 0, -30  # the log variance
    model = replace(model, codec=KlCodec(vae, digest="tiny"))
    sources, seeds = _pictures(ROWS, IMAGE_PX, IMAGE_PX, 3, seed=0), [11, 12]
    holes = _holes((8, 8, 24, 32), (0, 16, 16, 24))
    references = _pictures(ROWS, REFERENCE_PX, REFERENCE_PX, 3, seed=1)
    noise = np.stack([row_rng(seed, "edit").standard_normal((4, 4, 4), dtype=np.float32) for seed in seeds])
    expected = pipeline_of(model, SCHEDULERS[sampler].from_config(model.card.scheduler))(
        example_image=_pil(references),
        image=_pil(sources),
        mask_image=_pil(holes * 255),
        num_inference_steps=STEPS,
        latents=torch.from_numpy(noise),
    ).images
    edited = Editor(model, torch.device("cpu")).edit_crops(
        sources, holes, list(references), seeds=seeds, sampling=Sampling(5.0, STEPS, sampler)
    )
    hole = holes > 0
    np.testing.assert_array_equal(edited[~hole], sources[~hole])
    assert np.abs(edited.astype(int) - np.stack(expected))[hole].max() <= 1  # rounding of a value between two levels
    assert (edited != sources)[hole].mean() > 0.9
