"""`Editor.edit` by the protocols `UPSTREAM` and `DIFFUSERS` against those two, on the same weights and noise.

diffusers' pipeline is installed. Upstream's script is written here again from what it does (scripts/inference.py and
ldm/models/diffusion/plms.py of Fantasy-Studio/Paint-by-Example), in float32. Its published examples are photos and
masks of 512 x 512 and references of any shape.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pbe.data.rng import row_rng
from pbe.diffusion.sampling import Sampling
from pbe.edit import Editor
from pbe.model.clip import MEAN, STD
from pbe.model.weights import Model
from pbe.protocol import DIFFUSERS, UPSTREAM, EditProtocol
from tests.tiny_weights import REFERENCE_PX, lively, paper_model, vae_of

pytest.importorskip(
    "diffusers.pipelines.deprecated.paint_by_example", reason="this diffusers has no PaintByExamplePipeline any more"
)
from diffusers import PNDMScheduler
from diffusers.models.autoencoders import vae as diffusers_vae

from tests.diffusers_pipeline import pipeline_of

SEED, SCALE, STEPS, CELL_PX = 321, 5.0, 4, 8
SIDES = [64, pytest.param(512, marks=pytest.mark.slow)]  # px, of the model's square
EXAMPLES = {  # height and width of photo / side, and of the reference in px; of the published ones the first three
    "square reference": ((1.0, 1.0), (512, 512)),
    "wide reference": ((1.0, 1.0), (333, 500)),
    "large tall reference": ((1.0, 1.0), (1400, 900)),
    "wide photo": ((0.83, 1.25), (300, 200)),
    "tall photo": ((1.37, 0.59), (25, 61)),
}


@dataclass(frozen=True)
class Example:
    photo: np.ndarray
    hole_mask: np.ndarray
    reference: np.ndarray
    side_px: int


def _picture(height_px: int, width_px: int, seed: int) -> np.ndarray:
    """Detail of every size, so that ways to resize differ."""
    rng = np.random.default_rng(seed)
    fine = rng.integers(0, 256, (height_px, width_px, 3)).astype(np.float32)
    coarse = cv2.resize(rng.integers(0, 256, (6, 6, 3)).astype(np.float32), (width_px, height_px))
    return (0.3 * fine + 0.7 * coarse).astype(np.uint8)


def _example(name: str, side_px: int) -> Example:
    """An ellipse as hole, off the cells' borders."""
    (high, wide), reference = EXAMPLES[name]
    height_px, width_px = round(high * side_px), round(wide * side_px)
    hole_mask = np.zeros((height_px, width_px), np.uint8)
    centre, axes = (width_px * 2 // 5, height_px * 3 // 5), (width_px // 5 + 3, height_px // 6 + 1)
    cv2.ellipse(hole_mask, centre, axes, 20, 0, 360, 1, -1)
    return Example(_picture(height_px, width_px, 1), hole_mask, _picture(*reference, 2), side_px)


@pytest.fixture(scope="module")
def model() -> Model:
    """A model whose zero-initialised weights, also in mapper and VAE, have noise added."""
    model = paper_model()
    lively(model.network.exemplar, 5)
    lively(vae_of(model), 6)
    return model


def _noise(purpose: str, side_px: int) -> Tensor:
    """The editor's own."""
    shape = (1, 4, side_px // CELL_PX, side_px // CELL_PX)
    return torch.from_numpy(row_rng(SEED, purpose).standard_normal(shape, dtype=np.float32))


def _as_their_users_do(example: Example) -> tuple[Image.Image, Image.Image]:
    """Photo and mask of the model's size."""
    photo, mask = Image.fromarray(example.photo), Image.fromarray(example.hole_mask * np.uint8(255))
    return photo.resize((example.side_px,) * 2), mask.resize((example.side_px,) * 2)


@torch.no_grad()
def _upstream(model: Model, example: Example, steps: int = STEPS) -> np.ndarray:
    """(side, side, 3) uint8, as results/<name>_<seed>.png before the watermark."""
    pipeline = pipeline_of(model, PNDMScheduler.from_config(model.card.scheduler))  # for its encoder of references
    photo, mask = _as_their_users_do(example)
    image = (torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.5
    keep = (1 - torch.from_numpy(np.array(mask)).float() / 255 >= 0.5).float()[None, None]
    reference = np.array(Image.fromarray(example.reference).resize((REFERENCE_PX, REFERENCE_PX)))
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    pixels = (torch.from_numpy(reference).permute(2, 0, 1).float() / 255 - mean) / std
    token, uncond = pipeline.image_encoder(pixels[None], return_uncond_vector=True)
    posterior = vae_of(model).encode(image * keep).latent_dist
    masked = 0.18215 * (posterior.mean + posterior.std * _noise("masked photo", example.side_px))
    keep_latent = torch.nn.functional.interpolate(keep, scale_factor=1 / CELL_PX, mode="bilinear", antialias=False)

    def eps(latent: Tensor, time: int) -> Tensor:
        rows = torch.cat([latent, masked, keep_latent], dim=1).repeat(2, 1, 1, 1)
        given = torch.cat([uncond, token])
        without, with_it = model.network.unet(rows, torch.tensor([time] * 2), encoder_hidden_states=given).sample.chunk(
            2
        )
        return without + SCALE * (with_it - without)

    latent = 1 / 0.18215 * _plms(eps, _noise("edit", example.side_px), steps)
    decoded = ((vae_of(model).decode(latent).sample + 1) / 2).clamp(0, 1)
    return (255.0 * decoded[0].permute(1, 2, 0).numpy()).astype(np.uint8)


def _plms(eps: Callable[[Tensor, int], Tensor], latent: Tensor, steps: int) -> Tensor:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - betas, 0)
    times = [time + 1 for time in range(0, 1000, 1000 // steps)]
    old: list[Tensor] = []

    def step(found: Tensor, now: int, then: int) -> Tensor:
        a, b = float(alpha_bar[now]), float(alpha_bar[then])
        x0 = (latent - (1 - a) ** 0.5 * found) / a**0.5
        return b**0.5 * x0 + (1 - b) ** 0.5 * found

    for now, then in pairwise([*times[::-1], 0]):
        found = eps(latent, now)
        if not old:
            blend = (found + eps(step(found, now, then), then)) / 2
        else:
            weights: Sequence[float] = {1: (3 / 2, -1 / 2), 2: (23 / 12, -16 / 12, 5 / 12)}.get(
                len(old), (55 / 24, -59 / 24, 37 / 24, -9 / 24)
            )
            blend = sum((w * e for w, e in zip(weights, [found, *old[::-1]], strict=True)), torch.zeros(()))
        latent, old = step(blend, now, then), [*old, found][-3:]
    return latent


def _diffusers(model: Model, example: Example, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """(side, side, 3) uint8. The pipeline takes the first noise; that of the posterior it would draw itself."""
    monkeypatch.setattr(diffusers_vae, "randn_tensor", lambda *_, **__: _noise("masked photo", example.side_px))
    photo, mask = _as_their_users_do(example)
    [picture] = pipeline_of(model, PNDMScheduler.from_config(model.card.scheduler))(
        example_image=Image.fromarray(example.reference),
        image=photo,
        mask_image=mask,
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        latents=_noise("edit", example.side_px),
    ).images
    return np.array(picture)


def _edit(model: Model, example: Example, protocol: EditProtocol, steps: int = STEPS) -> np.ndarray:
    [edit] = Editor(model, torch.device("cpu")).edit(
        example.photo, example.hole_mask, example.reference, seed=SEED, sampling=Sampling(SCALE, steps, "pndm"),
        size_px=example.side_px, protocol=protocol,
    )  # fmt: skip
    return edit


def _back(square: np.ndarray, example: Example) -> np.ndarray:
    height_px, width_px = example.hole_mask.shape
    return np.array(Image.fromarray(square).resize((width_px, height_px)))


def _differences(one: np.ndarray, other: np.ndarray) -> tuple[int, float]:
    """The largest one, and the share of values that differ at all."""
    apart = np.abs(one.astype(int) - other)
    return int(apart.max()), float((apart > 0).mean())


@pytest.mark.parametrize("side_px", SIDES)
@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("theirs", ["upstream", "diffusers"])
@pytest.mark.timeout(300)
def test_an_edit_is_what_they_make(
    theirs: str, name: str, side_px: int, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To one level, where the last bits of a float decide."""
    example = _example(name, side_px)
    with monkeypatch.context() as patched:
        expected = _upstream(model, example) if theirs == "upstream" else _diffusers(model, example, patched)
    edit = _edit(model, example, UPSTREAM if theirs == "upstream" else DIFFUSERS)
    assert edit.shape == example.photo.shape
    largest, share = _differences(edit, _back(expected, example))
    assert largest <= 1 and share < 0.01
    assert (edit == example.photo).all(axis=2).mean() < 0.01  # nothing of the photo is pasted back


@pytest.mark.parametrize("steps", [6, 7, 30])
def test_steps_that_do_not_divide_1000_are_upstreams_too(steps: int, model: Model) -> None:
    example = _example("wide reference", 64)
    largest, share = _differences(_edit(model, example, UPSTREAM, steps), _upstream(model, example, steps))
    assert largest <= 1 and share < 0.01
