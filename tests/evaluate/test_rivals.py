"""Other people's models on tiny random weights of their own classes: what they compute means nothing, how they are
called does."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from safetensors.torch import load_file, save_file

from pbe.data.rng import row_rng
from pbe.encode import encode_source, to_images, to_pixels
from pbe.evaluate.features.clip import load_clip_extractor
from pbe.evaluate.rivals.blended_image import Aim, BlendedImage, open_unconditional
from pbe.evaluate.rivals.fill import FillTask, Rival, RivalError, pasted, without_answer
from pbe.evaluate.rivals.inpaint import Inpaint
from pbe.evaluate.rivals.pipelines import generators, pillow
from pbe.evaluate.rivals.reference_inpaint import ReferenceInpaint, reference_pipeline
from pbe.evaluate.settings import BlendedImageBaseline, BlendedTextBaseline, DiffusersBaseline, InpaintBaseline
from pbe.model.tensors import WeightsError
from pbe.model.vae import load_vae
from tests.tiny_weights import (
    IMAGE_PX,
    write_clip_extractor,
    write_inpainting,
    write_klein,
    write_paint_by_example,
    write_text_to_image,
)

CPU = torch.device("cpu")
STEPS = 3
COMMON = {"model": "x", "license": "none", "steps": STEPS}
INPAINT = InpaintBaseline(kind="inpaint", **COMMON)
BLENDED_TEXT = BlendedTextBaseline(kind="blended_text", **COMMON)
BLENDED_IMAGE = BlendedImageBaseline(kind="blended_image", **COMMON)
KLEIN = DiffusersBaseline(kind="diffusers", pipeline="Flux2KleinInpaintPipeline", **COMMON)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("weights")
    write_inpainting(home / "inpainting")
    write_text_to_image(home / "sd")
    write_klein(home / "klein")
    write_clip_extractor(home / "clip")
    write_paint_by_example(home / "own")
    return home


def rivals(weights: Path) -> dict[str, Callable[[], Rival]]:
    clip = weights / "clip"
    return {
        "inpaint": lambda: Inpaint(weights / "inpainting", INPAINT, CPU),
        "blended_text": lambda: Inpaint(weights / "sd", BLENDED_TEXT, CPU),
        "blended_image": lambda: BlendedImage(
            open_unconditional(weights / "sd", CPU), load_clip_extractor(clip), BLENDED_IMAGE, CPU
        ),
        "own": lambda: BlendedImage(open_unconditional(weights / "own", CPU), None, BLENDED_IMAGE, CPU),
        "klein": lambda: ReferenceInpaint(weights / "klein", KLEIN, CPU),
    }


KINDS = ("inpaint", "blended_text", "blended_image", "own", "klein")


def tasks(number: int = 2, *, left: int = 5) -> list[FillTask]:
    """Smooth photos, each with a hole that no latent cell ends with."""
    rng = np.random.default_rng(1)
    hole = np.zeros((IMAGE_PX, IMAGE_PX), np.uint8)
    hole[6:22, left : left + 13] = 1
    out = []
    for seed in range(number):
        coarse = rng.integers(0, 256, (2, 4, 4, 3)).astype(np.uint8)
        source, reference = (np.kron(picture, np.ones((8, 8, 1), np.uint8)) for picture in coarse)
        out.append(FillTask(source, hole, reference, ("dog", "cat")[seed % 2], seed))
    return out


def edited(rival: Rival, given: Sequence[FillTask]) -> np.ndarray:
    edits = rival(given)
    assert all(edit is not None for edit in edits)
    return np.stack(edits)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_a_fill_keeps_the_photo_and_depends_on_what_it_may(weights: Path, kind: str) -> None:
    """Not on what the hole hides, nor on its batch; on its noise; and on the class or on the reference."""
    rival, given = rivals(weights)[kind](), tasks()
    edits, hole = edited(rival, given), given[0].hole_mask > 0
    for edit, task in zip(edits, given, strict=True):
        np.testing.assert_array_equal(edit[~hole], task.source[~hole])
        assert (edit[hole] != task.source[hole]).any()
    hidden = [replace(task, source=np.where(hole[..., None], 255 - task.source, task.source)) for task in given]
    np.testing.assert_array_equal(edited(rival, hidden), edits)
    alone = np.concatenate([edited(rival, [task]) for task in given])
    assert np.abs(alone.astype(int) - edits).max() <= 1
    first = given[0]
    assert (edited(rival, [replace(first, seed=9)])[0] != alone[0]).any()
    other_class = edited(rival, [replace(first, label_name="cat")])[0]
    other_reference = edited(rival, [replace(first, reference=given[1].reference)])[0]
    assert (other_class != alone[0]).any() == (kind in ("inpaint", "blended_text", "klein"))
    assert (other_reference != alone[0]).any() == rival.reads_reference


def test_a_photo_of_another_size_is_edited_at_the_models_own(weights: Path) -> None:
    twice = np.ones((2, 2), np.uint8)
    given = [
        replace(task, source=np.kron(task.source, twice[..., None]), hole_mask=np.kron(task.hole_mask, twice))
        for task in tasks()
    ]
    known = given[0].hole_mask == 0
    for kind in ("inpaint", "blended_text", "own"):
        rival = rivals(weights)[kind]()
        small, large = edited(rival, tasks()), edited(rival, given)
        assert np.abs(large[:, ::2, ::2].astype(int) - small).mean() < 2  # the fill, resized back by bilinear weights
        np.testing.assert_array_equal(large[0][known], given[0].source[known])


def test_inpaint_is_diffusers_called_by_hand(weights: Path) -> None:
    """With the photo as it is: what the hole hides is masked there."""
    given = tasks()
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(weights / "inpainting")
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompt=["a photo of a dog", "a photo of a cat"],
        image=[pillow(task.source) for task in given],
        mask_image=[pillow(task.hole_mask * np.uint8(255)) for task in given],
        num_inference_steps=STEPS,
        guidance_scale=7.5,
        generator=generators(given),
        output_type="np",
    ).images
    edits = edited(Inpaint(weights / "inpainting", INPAINT, CPU), given)
    inside = given[0].hole_mask > 0
    assert np.abs(edits[:, inside] / 255 - expected[:, inside]).max() <= 0.5 / 255 + 1e-5  # whole levels


def test_without_gradient_blended_image_is_plain_blended_sampling(weights: Path) -> None:
    """diffusers', without a prompt, from the same noise and the same latent of the photo."""
    given = [replace(task, hole_mask=np.kron(np.eye(4, dtype=np.uint8), np.ones((8, 8), np.uint8))) for task in tasks()]
    cfg = BLENDED_IMAGE.model_copy(update={"gradient_scale": 0.0})
    clip = load_clip_extractor(weights / "clip")
    edits = edited(BlendedImage(open_unconditional(weights / "sd", CPU), clip, cfg, CPU), given)
    codec = load_vae(weights / "sd" / "vae")
    photos = encode_source(codec, np.stack([without_answer(task.source, task.hole_mask) for task in given])).mean
    noise = [row_rng(task.seed, "candidate", 0).standard_normal((4, 4, 4), dtype=np.float32) for task in given]
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(weights / "sd", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    for row, task in enumerate(given):
        latent = pipeline(
            prompt="",
            image=photos[row : row + 1],
            mask_image=pillow(task.hole_mask * np.uint8(255)),
            masked_image_latents=photos[row : row + 1],
            latents=torch.from_numpy(noise[row])[None],
            height=IMAGE_PX,
            width=IMAGE_PX,
            num_inference_steps=STEPS,
            guidance_scale=1.0,
            output_type="latent",
        ).images
        with torch.no_grad():
            expected = pasted(to_images(codec.decode(latent))[0], task)
        assert np.abs(expected.astype(int) - edits[row]).max() <= 1


@pytest.mark.parametrize("kind", ["blended_image", "own"])
def test_the_gradient_raises_the_cosine_to_the_reference(weights: Path, kind: str) -> None:
    """Of 50 noises, on average by more than three standard errors of the paired differences."""
    given = [replace(tasks(1)[0], seed=seed) for seed in range(50)]
    model = open_unconditional(weights / ("own" if kind == "own" else "sd"), CPU)
    guide = None if kind == "own" else load_clip_extractor(weights / "clip")
    cosines = {}
    for scale in (0.0, 3000.0):
        rival = BlendedImage(model, guide, BLENDED_IMAGE.model_copy(update={"gradient_scale": scale}), CPU)
        cosines[scale] = _cosines(rival, given, edited(rival, given))
    gains = cosines[3000.0] - cosines[0.0]
    assert gains.mean() > 3 * gains.std(ddof=1) / np.sqrt(len(gains))


def test_the_best_of_more_candidates_is_never_worse(weights: Path) -> None:
    model, given = open_unconditional(weights / "own", CPU), tasks(8)
    found = []
    for candidates in (1, 4):
        rival = BlendedImage(model, None, BLENDED_IMAGE.model_copy(update={"candidates": candidates}), CPU)
        found.append(_cosines(rival, given, edited(rival, given)))
    assert (found[1] > found[0] - 1e-3).all() and (found[1] > found[0] + 1e-3).sum() >= 4


def _cosines(rival: BlendedImage, given: Sequence[FillTask], edits: np.ndarray) -> np.ndarray:
    aim = Aim(
        rival.guide,
        np.stack([task.source for task in given]),
        np.stack([task.hole_mask for task in given]),
        [task.reference for task in given],
        CPU,
    )
    with torch.no_grad():
        return aim.cosine(to_pixels(edits)).double().numpy()


def test_what_the_safety_checker_withholds_is_no_edit(tmp_path: Path) -> None:
    folder = write_inpainting(tmp_path / "strict", withholds_above=-1.1)
    assert Inpaint(folder, INPAINT, CPU)(tasks()) == [None, None]


def test_a_model_of_another_kind_is_one_line(weights: Path) -> None:
    with pytest.raises(RivalError, match="its UNet takes 4 channels, kind inpaint needs 9, as stable-diffusion-v1-5/"):
        Inpaint(weights / "sd", INPAINT, CPU)
    with pytest.raises(RivalError, match="its UNet takes 9 channels, kind blended_text needs 4, as CompVis/"):
        Inpaint(weights / "inpainting", BLENDED_TEXT, CPU)
    with pytest.raises(RivalError, match="its UNet takes 9 channels, kind blended_image needs 4, as CompVis/"):
        open_unconditional(weights / "inpainting", CPU)


def test_without_a_guide_stable_diffusion_is_refused(weights: Path) -> None:
    with pytest.raises(RivalError, match="no backbone that could guide; set clip"):
        BlendedImage(open_unconditional(weights / "sd", CPU), None, BLENDED_IMAGE, CPU)


def test_a_missing_tensor_is_named_and_not_drawn_at_random(tmp_path: Path) -> None:
    for part, file in (("unet", "diffusion_pytorch_model.safetensors"), ("text_encoder", "model.safetensors")):
        folder = write_inpainting(tmp_path / part)
        tensors = load_file(folder / part / file)
        gone = next(name for name in tensors if name.endswith("weight"))
        del tensors[gone]
        save_file(tensors, folder / part / file, metadata={"format": "pt"})
        with pytest.raises(RivalError, match=rf"{part}: 1 tensors are missing or misshapen"):
            Inpaint(folder, INPAINT, CPU)


def test_weights_with_nan_are_one_line_and_no_black_picture(tmp_path: Path) -> None:
    folder = write_inpainting(tmp_path / "damaged")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["decoder.conv_out.bias"][0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"vae: 1 of \d+ tensors have NaN"):
        Inpaint(folder, INPAINT, CPU)


def test_a_part_that_the_index_names_and_the_folder_lacks_is_one_line(tmp_path: Path) -> None:
    folder = write_inpainting(tmp_path / "partial")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"unet": ["diffusers", "NoSuchUNet"]}))
    with pytest.raises(RivalError, match=r"partial: StableDiffusionInpaintPipeline cannot open it \(.*NoSuchUNet"):
        Inpaint(folder, INPAINT, CPU)


@pytest.mark.parametrize("name", ["FluxKontextInpaint", "StableDiffusionInpaintPipeline", "utils"])
def test_a_pipeline_without_a_reference_is_refused_and_the_usable_ones_named(name: str) -> None:
    with pytest.raises(RivalError, match=rf"pipeline {name}: .*Flux2KleinInpaintPipeline.*FluxKontextInpaintPipeline"):
        reference_pipeline(name)
