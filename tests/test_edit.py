"""The editor: any photo size; nothing changes outside the hole; nothing hidden reappears; items are independent."""

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image

from pbe.data import images
from pbe.data.boxes import Box
from pbe.data.images import Resampling
from pbe.data.rng import row_rng
from pbe.diffusion.sampling import Sampling, sample
from pbe.diffusion.schedule import SamplerError
from pbe.diffusion.scheduler_config import scheduler_config
from pbe.diffusion.settings import Objective, SamplerName
from pbe.edit import Editor, EditTask, NonFiniteEditError
from pbe.encode import encode_masked, encode_references, to_images
from pbe.model.architecture import Architecture
from pbe.model.backbone import EfficientNetLite
from pbe.model.card import ModelCard
from pbe.model.codec import PatchCodec
from pbe.model.folder import ModelError
from pbe.model.precision import TORCH_DTYPES
from pbe.model.settings import EditDtype
from pbe.model.unet import new_network
from pbe.model.weights import Model, save_model
from pbe.protocol import CONTEXT_FACTOR, DIFFUSERS, OURS, UPSTREAM, EditProtocol, Fit, _window, fit_reference
from tests.tiny_weights import clip_of, mapper_of, paper_model, vae_of

SIZE_PX, STEPS = 16, 3
FITS: tuple[Fit, ...] = get_args(Fit)
RESAMPLINGS: tuple[Resampling, ...] = get_args(Resampling)
SAMPLING = Sampling(guidance_scale=3.0, steps=STEPS)
Edit = Callable[..., np.ndarray]


SCHEDULER = scheduler_config("squaredcos_cap_v2", "x0")


@pytest.fixture(scope="module")
def editor(
    tmp_path_factory: pytest.TempPathFactory, arch: Architecture, codec: PatchCodec, backbone: EfficientNetLite
) -> Editor:
    """An editor with a tiny random network, loaded from a model folder, and the real backbone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = new_network(arch)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    card = ModelCard(
        image_px=SIZE_PX,
        reference_px=224,
        reference_pad_px=10,
        tokens="class",
        scheduler=SCHEDULER,
        run={},
    )
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, Model(network, codec, backbone, card))
    return Editor.load(folder, device="cpu")


def _model_of(editor: Editor) -> Model:
    return Model(editor._network, editor._codec, editor._backbone, editor.card)


@pytest.fixture
def edit(editor: Editor) -> Edit:
    def _edit(
        photo: np.ndarray, hole_mask: np.ndarray, reference: np.ndarray | None = None, **changes: Any
    ) -> np.ndarray:
        settings: dict[str, Any] = {"seed": 7, "sampling": SAMPLING, **changes}
        reference = _photo(30, 20, seed=9) if reference is None else reference
        (out,) = editor.edit(photo, hole_mask, reference, **settings)
        return out

    return _edit


def _photo(height_px: int, width_px: int, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    return images.resize(coarse, width_px=width_px, height_px=height_px)


def _hole(height_px: int, width_px: int, box: tuple[int, int, int, int] | None = None) -> np.ndarray:
    """A mask that is 1 in the box x0, y0, x1, y1, which is off-centre by default."""
    x0, y0, x1, y1 = box or (width_px // 3, height_px // 4, width_px // 3 + width_px // 4 + 1, height_px // 2 + 1)
    hole_mask = np.zeros((height_px, width_px), np.uint8)
    hole_mask[y0:y1, x0:x1] = 1
    return hole_mask


SIZES = [(40, 64), (64, 40), (16, 16), (9, 33), (200, 17), (1, 2), (1, 50), (333, 500)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_any_photo_keeps_its_size_and_every_pixel_outside_the_hole(size: tuple[int, int], edit: Edit) -> None:
    photo, hole_mask = _photo(*size), _hole(*size)
    before = photo.copy(), hole_mask.copy()
    out = edit(photo, hole_mask)
    assert out.shape == photo.shape and out.dtype == np.uint8
    np.testing.assert_array_equal(out[hole_mask == 0], photo[hole_mask == 0])
    assert (out[hole_mask > 0] != photo[hole_mask > 0]).any(axis=-1).mean() > 0.9
    np.testing.assert_array_equal(photo, before[0])  # the caller's arrays are unchanged
    np.testing.assert_array_equal(hole_mask, before[1])


@pytest.mark.parametrize("size", [(97, 131), (131, 97), (23, 29), (12, 12)], ids=str)
def test_what_the_hole_hides_does_not_come_back(size: tuple[int, int], edit: Edit) -> None:
    """The result is the same for any content under the hole, even if its edge cuts through a model pixel."""
    for seed in range(2):
        rng = np.random.default_rng(seed)
        x0, y0 = (int(v) for v in rng.integers(0, (size[1] // 2, size[0] // 2)))
        w, h = (int(v) for v in rng.integers(1, min(size) // 2, 2))
        hole_mask = _hole(*size, (x0, y0, x0 + w, y0 + h))
        photo = _photo(*size)
        other = np.where(hole_mask[..., None] > 0, rng.integers(0, 256, photo.shape).astype(np.uint8), photo)
        np.testing.assert_array_equal(edit(photo, hole_mask), edit(other, hole_mask))


@pytest.mark.parametrize("box", [(10, 150, 290, 151), (150, 10, 151, 290), (150, 150, 151, 151)], ids=str)
def test_a_hole_of_one_pixels_width_is_edited_too(box: tuple[int, int, int, int], edit: Edit) -> None:
    """At the model's size the hole covers a twentieth of a pixel."""
    photo, hole_mask = _photo(300, 300), _hole(300, 300, box)
    other = np.where(hole_mask[..., None] > 0, np.uint8(255) - photo, photo)
    out = edit(photo, hole_mask)
    np.testing.assert_array_equal(out, edit(other, hole_mask))
    assert (out != photo).any()


@pytest.mark.parametrize("hole_mask", [np.zeros((20, 30)), np.ones((20, 30))], ids=["empty", "everything"])
def test_a_hole_of_nothing_or_of_everything_is_refused(hole_mask: np.ndarray, edit: Edit) -> None:
    with pytest.raises(ValueError, match=r"hole_mask (is empty|covers the whole photo)"):
        edit(_photo(20, 30), hole_mask)


def test_the_fill_comes_in_over_a_feathered_edge_inside_the_hole(edit: Edit) -> None:
    photo = np.full((400, 400, 3), (200, 40, 90), np.uint8)
    hole_mask = _hole(400, 400, (100, 100, 300, 300))
    hard, soft = (edit(photo, hole_mask, protocol=EditProtocol(feather_frac=frac)) for frac in (0.0, 0.05))
    np.testing.assert_array_equal(soft[hole_mask == 0], photo[hole_mask == 0])
    np.testing.assert_array_equal(soft[120:280, 120:280], hard[120:280, 120:280])
    far = np.abs(hard.astype(int) - photo).sum(axis=2)[101:115, 200]  # from the edge inwards
    near = np.abs(soft.astype(int) - photo).sum(axis=2)[101:115, 200]
    share = near / np.maximum(far, 1)
    assert far.min() > 20 and share[0] < 0.25 and (np.diff(share) > -0.05).all() and share[-1] > 0.7


@pytest.mark.parametrize("frac", [0.0, 0.05])
def test_a_feathered_edge_does_not_bring_back_what_the_hole_hides(frac: float, edit: Edit) -> None:
    photo, hole_mask = _photo(97, 131), _hole(97, 131, (30, 20, 80, 70))
    other = np.where(hole_mask[..., None] > 0, 255 - photo, photo)
    protocol = EditProtocol(feather_frac=frac)
    np.testing.assert_array_equal(edit(photo, hole_mask, protocol=protocol), edit(other, hole_mask, protocol=protocol))


def test_upstreams_protocol_leaves_what_the_codec_decodes(editor: Editor, crops: np.ndarray) -> None:
    hole_masks = _hole(16, 16, (2, 1, 14, 9))[None]
    run = partial(editor.edit_crops, crops[:1], hole_masks, [_photo(9, 9)], seeds=[1], sampling=SAMPLING)
    ours, theirs = run(), run(protocol=replace(UPSTREAM, resampling="bilinear", levels="nearest"))
    assert (theirs != crops[:1])[hole_masks == 0].any()
    np.testing.assert_array_equal(theirs[hole_masks > 0], ours[hole_masks > 0])  # this codec's std is 0
    below = run(protocol=replace(UPSTREAM, resampling="bilinear"))
    assert set(np.unique(theirs.astype(int) - below)) == {0, 1}
    (edit,) = editor.edit(crops[0], hole_masks[0], _photo(9, 9), seed=1, sampling=SAMPLING, protocol=UPSTREAM)
    np.testing.assert_array_equal(edit, run(protocol=UPSTREAM)[0])


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("protocol", [UPSTREAM, DIFFUSERS], ids=["upstream", "diffusers"])
def test_the_protocols_of_others_edit_the_whole_photo(
    protocol: EditProtocol, size: tuple[int, int], edit: Edit
) -> None:
    photo, hole_mask = _photo(*size), _hole(*size)
    out = edit(photo, hole_mask, protocol=protocol)
    assert out.shape == photo.shape
    assert (out == photo).all(axis=2).mean() < 0.05


def test_a_hole_that_the_squashed_photo_loses_is_refused_before_any_forward(editor: Editor) -> None:
    """Both would decode the photo as it is; `OURS` keeps such a hole."""
    seen, photo, hole_mask = [], _photo(300, 300), _hole(300, 300, (150, 10, 151, 290))
    tasks = [EditTask(photo, mask, _photo(9, 9), seed=1) for mask in (_hole(300, 300), hole_mask)]
    with pytest.raises(ValueError, match="hole_mask vanishes where the photo becomes 16 x 16 px"):
        editor.edit_batch(tasks, sampling=SAMPLING, protocol=UPSTREAM, on_step=lambda: seen.append(1))
    assert not seen


def test_photos_of_many_sizes_go_in_one_batch_each_as_if_alone(editor: Editor, edit: Edit) -> None:
    tasks = [
        EditTask(_photo(h, w, seed=k), _hole(h, w), _photo(30, 20, seed=k), seed=k)
        for k, (h, w) in enumerate([(40, 64), (64, 40), (16, 16)] * 3 + [(97, 131)])
    ]
    spent: list[int] = []
    together = editor.edit_batch(tasks, sampling=SAMPLING, on_step=lambda: spent.append(1))
    assert len(spent) == 2 * STEPS  # ten tasks, eight at a time
    for task, out in zip(tasks, together, strict=True):
        alone = edit(task.photo, task.hole_mask, task.reference, seed=task.seed)
        np.testing.assert_allclose(out.astype(int), alone, atol=1)


def test_the_network_works_at_another_size_when_asked(edit: Edit) -> None:
    photo, hole_mask = _photo(64, 64), _hole(64, 64)
    one, two = edit(photo, hole_mask), edit(photo, hole_mask, size_px=32)
    assert (one != two).any()
    np.testing.assert_array_equal(two[hole_mask == 0], photo[hole_mask == 0])
    for size_px in (0, 12, 33):
        with pytest.raises(ValueError, match=rf"size {size_px} px: this model needs a multiple of 8 px"):
            edit(photo, hole_mask, size_px=size_px)


def test_the_reference_is_squashed_padded_or_cropped() -> None:
    reference = np.zeros((20, 60, 3), np.uint8)
    reference[:, 20:40], reference[:, 40:] = 100, 200  # left, middle and right third
    squash, pad, crop = (fit_reference(reference, 30, EditProtocol(reference_fit=fit)) for fit in FITS)
    assert squash[:, 0].max() == 0 and squash[:, -1].min() == 200
    assert (pad[:10] == 128).all() and (pad[20:] == 128).all() and pad[15, 0, 0] == 0 and pad[15, -1, 0] == 200
    assert (crop == 100).all()
    photo = _photo(331, 500, seed=3)
    bicubic = {fit: fit_reference(photo, 30, EditProtocol(reference_fit=fit, resampling="bicubic")) for fit in FITS}
    picture = Image.fromarray(photo)
    np.testing.assert_array_equal(bicubic["squash"], picture.resize((30, 30)))  # as upstream
    np.testing.assert_array_equal(bicubic["crop"], np.array(picture.resize((45, 30)))[:, 7:37])  # as CLIP's processor
    np.testing.assert_array_equal(bicubic["pad"][5:25], picture.resize((30, 20)))
    for fit, resampling in itertools.product(FITS, RESAMPLINGS):
        protocol = EditProtocol(reference_fit=fit, resampling=resampling)
        assert fit_reference(np.zeros((1, 5000, 3), np.uint8), 30, protocol).shape == (30, 30, 3)


def test_a_sampled_masked_latent_depends_on_the_seed_alone() -> None:
    """With AutoencoderKL, whose posterior has a width, a different sample is a different edit."""
    editor = Editor(paper_model(), torch.device("cpu"))
    photos = np.stack([_photo(32, 32, seed=k) for k in range(3)])
    holes, references = np.stack([_hole(32, 32)] * 3), [_photo(30, 20, seed=k) for k in range(3)]
    mean = EditProtocol(paste_back=False)

    def run(rows: list[int], protocol: EditProtocol) -> np.ndarray:
        return editor.edit_crops(
            photos[rows], holes[rows], [references[k] for k in rows], seeds=[5 + k for k in rows],
            sampling=Sampling(3.0, steps=2), protocol=protocol,
        )  # fmt: skip

    sampled = run([0, 1, 2], replace(mean, masked_latent="sample"))
    np.testing.assert_allclose(run([2], replace(mean, masked_latent="sample"))[0].astype(int), sampled[2], atol=1)
    assert (run([0, 1, 2], mean) != sampled).any()
    assert (run([0, 1, 2], replace(mean, mask_resize="nearest")) != run([0, 1, 2], mean)).any()


def test_the_seed_decides(edit: Edit) -> None:
    photo, hole_mask = _photo(40, 64), _hole(40, 64)
    torch.manual_seed(0)
    one = edit(photo, hole_mask, seed=7)
    torch.manual_seed(1)
    np.testing.assert_array_equal(edit(photo, hole_mask, seed=7), one)
    assert (edit(photo, hole_mask, seed=8) != one).any()


def test_reference_scale_and_steps_matter(edit: Edit) -> None:
    photo, hole_mask = _photo(40, 64), _hole(40, 64)
    one = edit(photo, hole_mask)
    for other in (
        edit(photo, hole_mask, _photo(50, 50, seed=11)),
        edit(photo, hole_mask, sampling=replace(SAMPLING, guidance_scale=9.0)),
        edit(photo, hole_mask, sampling=replace(SAMPLING, steps=1)),
    ):
        assert (other != one).any()


def test_the_shape_of_the_reference_does_not_matter_to_a_plain_colour(edit: Edit) -> None:
    """The reference is squashed to the encoder's size."""
    photo, hole_mask = _photo(40, 64), _hole(40, 64)
    wide, tall = (np.full((*shape, 3), (200, 30, 30), np.uint8) for shape in ((10, 300), (224, 224)))
    np.testing.assert_array_equal(edit(photo, hole_mask, wide), edit(photo, hole_mask, tall))


@pytest.mark.parametrize(
    "convert",
    [lambda m: m.astype(bool), lambda m: m * 255, lambda m: -m.astype(np.int8), lambda m: m * 0.25],
)
def test_non_zero_is_the_hole_in_any_type(convert: Callable[[np.ndarray], np.ndarray], edit: Edit) -> None:
    photo, hole_mask = _photo(40, 64), _hole(40, 64)
    np.testing.assert_array_equal(edit(photo, convert(hole_mask)), edit(photo, hole_mask))


def test_an_item_is_the_same_alone_and_in_a_batch(editor: Editor, crops: np.ndarray) -> None:
    """Equal to one grey level, because the last bits of a convolution's sums depend on the batch."""
    sources, references = crops[:5], [_photo(30 + 10 * k, 40, seed=20 + k) for k in range(5)]
    hole_masks = np.stack([_hole(SIZE_PX, SIZE_PX, (k, 2, k + 8, 12)) for k in range(5)])
    run = partial(editor.edit_crops, sampling=SAMPLING)
    together = run(sources, hole_masks, references, seeds=range(5))
    assert together.shape == sources.shape and together.dtype == np.uint8
    np.testing.assert_array_equal(together[hole_masks == 0], sources[hole_masks == 0])
    for k in range(5):
        item = slice(k, k + 1)
        alone = run(sources[item], hole_masks[item], references[item], seeds=[k])
        np.testing.assert_allclose(alone[0].astype(int), together[k], atol=1)
    order = [3, 0, 4, 1, 2]
    shuffled = run(sources[order], hole_masks[order], [references[k] for k in order], seeds=order)
    np.testing.assert_allclose(shuffled.astype(int), together[order], atol=1)


def test_the_edit_is_the_sampler_with_guidance_between_condition_and_unconditional_vector(
    editor: Editor, codec: PatchCodec, backbone: EfficientNetLite, crops: np.ndarray
) -> None:
    """The edit is rebuilt from its parts, with two calls of the network per step. At scale 40 most predicted x_0
    are far from valid pixels, so that the projection matters."""
    sources, hole_masks, reference = crops[:2], np.stack([_hole(16, 16), _hole(16, 16).T]), _photo(224, 224, seed=4)
    masked, keep = encode_masked(codec, sources, hole_masks)
    tokens = encode_references(backbone, np.stack([reference, reference[::-1]]))
    noise = [row_rng(seed, "edit").standard_normal(masked.mean.shape[1:], dtype=np.float32) for seed in (3, 4)]

    def denoise(noisy: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        halves = [
            editor._network(
                noisy[:2],
                timestep[:2],
                masked_latent=masked.mean,
                keep_mask_latent=keep,
                exemplar_tokens=tokens,
                drop_condition=torch.full((2,), drop),
            )
            for drop in (True, False)
        ]
        return torch.cat(halves)

    latent = sample(
        denoise,
        torch.from_numpy(np.stack(noise)),
        scheduler=SCHEDULER,
        sampling=Sampling(40.0, STEPS, "ddim"),
        project=codec.project,
    )
    expected = np.where(hole_masks[..., None] > 0, to_images(codec.decode(latent)), sources)
    got = editor.edit_crops(
        sources, hole_masks, [reference, reference[::-1]], seeds=[3, 4], sampling=Sampling(40.0, STEPS)
    )
    np.testing.assert_allclose(got.astype(int), expected, atol=1)


def test_a_photo_of_the_models_size_is_edited_as_a_crop(editor: Editor, edit: Edit, crops: np.ndarray) -> None:
    hole_mask, reference = _hole(SIZE_PX, SIZE_PX, (2, 1, 14, 9)), _photo(60, 30, seed=3)
    crop = editor.edit_crops(crops[:1], hole_mask[None], [reference], seeds=[7], sampling=SAMPLING)
    np.testing.assert_array_equal(edit(crops[0], hole_mask, reference), crop[0])


def test_scale_one_does_not_use_the_unconditional_vector(
    tmp_path: Path, editor: Editor, codec: PatchCodec, crops: np.ndarray
) -> None:
    """Only with guidance does another unconditional vector change the edit."""
    save_model(tmp_path, _model_of(editor))
    other = Editor.load(tmp_path, device="cpu")
    with torch.no_grad():
        mapper_of(_model_of(other)).uncond_vector.add_(3.0)
    for scale, same in ((1.0, True), (5.0, False)):
        one, two = (
            e.edit_crops(crops[:1], _hole(16, 16)[None], [_photo(9, 9)], seeds=[1], sampling=Sampling(scale, STEPS))
            for e in (editor, other)
        )
        assert np.array_equal(one, two) == same


def test_edit_k_of_n_is_the_one_of_seed_plus_k_drawn_alone(editor: Editor, edit: Edit) -> None:
    photo, hole_mask, spent = _photo(40, 64), _hole(40, 64), []
    together = editor.edit(
        photo, hole_mask, _photo(30, 20, seed=9), seed=7, n=4, sampling=SAMPLING,
        on_step=lambda: spent.append(1),
    )  # fmt: skip
    assert len(together) == 4 and len(spent) == STEPS
    assert len({out.tobytes() for out in together}) == 4
    for k, out in enumerate(together):  # batches of another size may differ in the last bit
        np.testing.assert_allclose(out.astype(int), edit(photo, hole_mask, seed=7 + k), atol=1)


@pytest.mark.parametrize("sampler", ["dpm++", "unipc"])
def test_the_sampler_is_a_choice(sampler: SamplerName, edit: Edit) -> None:
    photo, hole_mask = _photo(40, 64), _hole(40, 64)
    default = edit(photo, hole_mask)
    np.testing.assert_array_equal(default, edit(photo, hole_mask, sampling=replace(SAMPLING, sampler="ddim")))
    assert (default != edit(photo, hole_mask, sampling=replace(SAMPLING, sampler=sampler))).any()


def test_a_sampler_that_cannot_do_what_the_model_predicts_and_no_edit_at_all_are_refused(edit: Edit) -> None:
    with pytest.raises(SamplerError, match="use ddim"):
        edit(_photo(20, 30), _hole(20, 30), sampling=Sampling(sampler="pndm"))
    with pytest.raises(ValueError, match="n = 0"):
        edit(_photo(20, 30), _hole(20, 30), n=0)


@pytest.mark.parametrize(
    ("photo", "hole_mask", "words"),
    [
        (_photo(20, 30), np.zeros((20, 30)), "hole_mask is empty"),
        (_photo(20, 30), np.ones((30, 20)), r"hole_mask is \(30, 20\), the photo \(20, 30\): the sizes must match"),
        (_photo(20, 30), np.ones((20, 30, 3)), "the sizes must match"),
        (_photo(20, 30)[..., 0], np.ones((20, 30)), r"photo must be \(H, W, 3\) uint8"),
        (_photo(20, 30).astype(np.float32), np.ones((20, 30)), "not .* float32"),
        (np.zeros((20, 30, 4), np.uint8), np.ones((20, 30)), "not .*4"),
    ],
    ids=["empty", "transposed", "three channels", "grey", "float", "alpha"],
)
def test_arrays_that_do_not_fit_are_refused(photo: np.ndarray, hole_mask: np.ndarray, words: str, edit: Edit) -> None:
    with pytest.raises(ValueError, match=words):
        edit(photo, hole_mask)


def test_crops_of_another_size_are_refused(editor: Editor) -> None:
    with pytest.raises(ModelError, match=r"edits 16 x 16 crops, not \(32, 32\)"):
        editor.edit_crops(
            np.zeros((1, 32, 32, 3), np.uint8),
            np.ones((1, 32, 32)),
            [_photo(9, 9)],
            seeds=[0],
            sampling=SAMPLING,
        )


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no unet/config\.json"):
        Editor.load(tmp_path)


@pytest.mark.parametrize("objective", ["eps", "v"])
def test_the_card_says_what_the_network_predicts(objective: Objective, editor: Editor, crops: np.ndarray) -> None:
    card = replace(editor.card, scheduler=scheduler_config("squaredcos_cap_v2", objective))
    other = Editor(replace(_model_of(editor), card=card), torch.device("cpu"))
    one, two = (
        e.edit_crops(crops[:1], _hole(16, 16)[None], [_photo(9, 9)], seeds=[1], sampling=Sampling(1.0, STEPS))
        for e in (editor, other)
    )
    assert (one != two).any()


def test_the_window_holds_the_hole_and_is_a_square_with_context_where_the_photo_has_room() -> None:
    rng, kinds = np.random.default_rng(0), {"square": 0, "whole": 0, "full context": 0}
    for _ in range(2000):
        height_px, width_px = (int(side) for side in rng.choice([1, 2, 5, 30, 64, 200], 2))
        xs, ys = (np.sort(rng.choice(side + 1, 2, replace=False)) for side in (width_px, height_px))
        hole = _hole(height_px, width_px, (int(xs[0]), int(ys[0]), int(xs[1]), int(ys[1])))
        factor = float(rng.choice([1.0, CONTEXT_FACTOR, 5.0, np.inf]))
        window, longest = _window(hole, factor), int(max(xs[1] - xs[0], ys[1] - ys[0]))
        assert window.x0 >= 0 and window.x1 <= width_px and window.y0 >= 0 and window.y1 <= height_px
        assert hole[window.y0 : window.y1, window.x0 : window.x1].sum() == hole.sum()
        narrow = longest == xs[1] - xs[0] == ys[1] - ys[0] == min(height_px, width_px)  # the square shows only the hole
        if longest > min(height_px, width_px) or narrow:
            assert (window.width_px, window.height_px) == (width_px, height_px)
            kinds["whole"] += 1
            continue
        assert not hole[window.y0 : window.y1, window.x0 : window.x1].all()
        side = round(min(max(longest * factor, longest + 2), height_px, width_px))
        assert window.width_px == window.height_px == side
        kinds["square"] += 1
        inside = window.x0 > 0 and window.x1 < width_px and window.y0 > 0 and window.y1 < height_px
        if inside:  # then the hole is in its middle
            assert (
                abs((window.x0 + window.x1) - (xs[0] + xs[1])) <= 1
                and abs((window.y0 + window.y1) - (ys[0] + ys[1])) <= 1
            )
            kinds["full context"] += 1
    assert min(kinds.values()) > 50, kinds


def _holes(*boxes: tuple[int, int, int, int]) -> np.ndarray:
    return np.maximum.reduce([_hole(60, 90, box) for box in boxes])


@pytest.mark.parametrize(
    ("hole_mask", "factor", "window"),
    [
        (_holes((40, 20, 50, 26)), 2.0, (35, 13, 55, 33)),
        (_holes((40, 20, 50, 26)), 1.0, (39, 17, 51, 29)),  # room for a rim that the feather can blend with
        (_holes((40, 20, 50, 26)), np.inf, (15, 0, 75, 60)),
        (_holes((0, 0, 10, 6)), 2.0, (0, 0, 20, 20)),  # a corner of the photo
        (_holes((80, 30, 90, 36)), 2.0, (70, 23, 90, 43)),  # its border
        (_holes((10, 10, 15, 15), (30, 20, 50, 26)), 1.5, (0, 0, 60, 60)),  # both holes
        (_holes((10, 10, 15, 15), (20, 20, 22, 22)), 1.5, (7, 7, 25, 25)),
        (_holes((10, 10, 75, 20)), 1.0, (0, 0, 90, 60)),  # longer than the photo is high: the whole
        (_holes((20, 0, 80, 60)), 1.6, (0, 0, 90, 60)),  # a square would show nothing but the hole
    ],
)  # fmt: skip
def test_the_window_by_hand_and_nothing_changes_outside_the_hole(
    hole_mask: np.ndarray, factor: float, window: tuple[int, int, int, int], edit: Edit
) -> None:
    assert _window(hole_mask, factor) == Box(*window)
    photo = _photo(60, 90)
    out = edit(photo, hole_mask, context_factor=factor)
    np.testing.assert_array_equal(out[hole_mask == 0], photo[hole_mask == 0])
    assert (out[hole_mask > 0] != photo[hole_mask > 0]).any(axis=-1).mean() > 0.9


def test_context_is_what_the_network_sees_of_the_photo(editor: Editor, edit: Edit) -> None:
    """Less context: what lies outside the square cannot matter, and the square is edited as if it were the photo."""
    photo, hole_mask = _photo(60, 90), _holes((40, 20, 50, 26))
    near = edit(photo, hole_mask, context_factor=2)
    far = photo.copy()
    far[:13], far[:, :35] = 0, 0
    np.testing.assert_array_equal(edit(far, hole_mask, context_factor=2)[20:26, 40:50], near[20:26, 40:50])
    rows, columns = slice(13, 33), slice(35, 55)
    square = edit(photo[rows, columns], hole_mask[rows, columns], context_factor=np.inf)
    np.testing.assert_array_equal(square, near[rows, columns])
    assert (edit(far, hole_mask, context_factor=4) != near)[20:26, 40:50].any()
    np.testing.assert_array_equal(edit(photo, hole_mask, context_factor=CONTEXT_FACTOR), edit(photo, hole_mask))
    tasks = [EditTask(photo, hole_mask, _photo(30, 20, seed=9), 7)]
    np.testing.assert_array_equal(editor.edit_batch(tasks, sampling=SAMPLING, context_factor=2)[0], near)


@pytest.mark.parametrize(
    ("factor", "protocol", "words"),
    [
        (0.9, OURS, "context_factor 0.9: must be 1 or more"),
        (-np.inf, OURS, "context_factor -inf: must be 1 or more"),
        (np.nan, OURS, "context_factor nan: must be 1 or more"),
        (2, UPSTREAM, "context_factor 2: this protocol edits the whole photo"),
        (2, DIFFUSERS, "leave one of the two out"),
    ],
)
def test_context_that_means_nothing_is_refused(factor: float, protocol: EditProtocol, words: str, edit: Edit) -> None:
    with pytest.raises(ValueError, match=words):
        edit(_photo(40, 64), _hole(40, 64), context_factor=factor, protocol=protocol)


@pytest.mark.parametrize("where", ["unet", "decoder"])
def test_an_edit_that_overflows_on_its_way_is_an_error(where: str) -> None:
    """Finite weights that are too large: clamping would turn NaN into black pixels."""
    model = paper_model()
    layer = model.network.unet.conv_out if where == "unet" else vae_of(model).decoder.conv_out
    layer.weight.data.fill_(3e38)
    editor = Editor(model, torch.device("cpu"), dtype="bfloat16")
    with pytest.raises(NonFiniteEditError, match=r"NaN or infinite values \(seeds 7\).*try dtype float32"):
        editor.edit(_photo(32, 32), _hole(32, 32), _photo(9, 9), seed=7, sampling=Sampling(steps=2))


def test_what_overflows_in_float16_alone_is_told_which_dtype_holds_it() -> None:
    """Warming finds it too, before anybody's edit."""
    model = paper_model()
    model.network.unet.conv_out.bias.data.fill_(1e5)
    with pytest.raises(NonFiniteEditError, match="float16 is too narrow for it: try dtype bfloat16 or float32"):
        Editor(copy.deepcopy(model), torch.device("cpu"), dtype="float16").warm()
    Editor(model, torch.device("cpu"), dtype="bfloat16").warm()


def test_every_network_computes_in_the_dtype_and_edits_stay_near() -> None:
    photos, holes = np.stack([_photo(32, 32)]), np.stack([_hole(32, 32)])
    edits = {}
    dtypes: tuple[EditDtype | None, ...] = (None, "float32", "tf32", "bfloat16", "float16")
    for dtype in dtypes:
        model = paper_model()
        seen: set[torch.dtype] = set()
        parts = (model.network.unet, model.network.exemplar, vae_of(model), clip_of(model))
        for part in parts:
            for layer in part.modules():
                if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
                    layer.register_forward_hook(lambda _, inputs, out, seen=seen: seen.add(out.dtype))
        editor = Editor(model, torch.device("cpu"), dtype=dtype)
        edits[dtype] = editor.edit_crops(
            photos, holes, [_photo(30, 20)], seeds=[1], sampling=Sampling(3.0, steps=4), protocol=UPSTREAM
        ).astype(float)
        assert seen == {TORCH_DTYPES[editor.dtype]}
    assert (edits[None] == edits["float32"]).all()  # the CPU's default
    assert (edits["tf32"] == edits["float32"]).all()  # no TF32 on a CPU
    away = {dtype: np.abs(edits[dtype] - edits["float32"]).mean() for dtype in ("bfloat16", "float16")}  # of 255
    assert 0 < away["float16"] < away["bfloat16"] < 4, away


def test_warming_has_the_shapes_of_the_edits_and_changes_none(editor: Editor, edit: Edit) -> None:
    """What torch compiles or tunes for one shape serves no other."""
    shapes: list[torch.Size] = []
    unet = _model_of(editor).network.unet
    hook = unet.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    before = edit(_photo(40, 64), _hole(40, 64))
    editor.warm(n=3, sampling=SAMPLING, size_px=32)
    hook.remove()
    side = 32 // _model_of(editor).codec.patch_px
    assert shapes[-1] == (3 * SAMPLING.forwards_per_step, 2 * _model_of(editor).codec.channels + 1, side, side)
    np.testing.assert_array_equal(edit(_photo(40, 64), _hole(40, 64)), before)
