"""The patch codec is PCA: the best linear code, fitted in any order, exact on its span, unit rms."""

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from pbe.model.codec import CodecError, PatchCodec, border_filter, codec_bytes, codec_from_bytes, fit_patch_codec


def _pixels(crops: np.ndarray) -> Tensor:
    return torch.from_numpy(crops.transpose(0, 3, 1, 2).copy()).float() / 127.5 - 1


def _patches(crops: np.ndarray, patch_px: int) -> np.ndarray:
    """Patches (N, 3 p p): colour planes one after the other, each row by row; written without torch."""
    count, side = len(crops), crops.shape[1] // patch_px
    cut = crops.reshape(count, side, patch_px, side, patch_px, 3)
    return cut.transpose(0, 1, 3, 5, 2, 4).reshape(-1, 3 * patch_px**2).astype(float)


def _equal(one: PatchCodec, other: PatchCodec) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("mean", "basis", "rms"))


@pytest.mark.parametrize("channels", [1, 5, 12])
def test_the_basis_spans_the_leading_components_of_the_patches(channels: int, crops: np.ndarray) -> None:
    codec, explained = fit_patch_codec(crops, patch_px=2, channels=channels)  # too small to overlap
    patches = _patches(crops, 2)
    centred = patches - patches.mean(0)
    _, singular, components = np.linalg.svd(centred, full_matrices=False)
    assert explained == pytest.approx((singular[:channels] ** 2).sum() / (singular**2).sum(), rel=1e-9)
    basis = codec.basis.double().numpy()
    np.testing.assert_allclose(basis @ basis.T, np.eye(channels), atol=1e-6)
    np.testing.assert_allclose(np.abs((basis * components[:channels]).sum(1)), 1, atol=1e-5)
    np.testing.assert_allclose(codec.mean.numpy(), patches.mean(0) / 127.5 - 1, atol=1e-6)
    assert (codec.patch_px, codec.channels) == (2, channels)


def test_each_components_largest_entry_is_positive(crops: np.ndarray) -> None:
    """An eigenvector's sign is arbitrary; latents must not flip between machines."""
    basis = fit_patch_codec(crops, patch_px=4, channels=48)[0].basis
    assert (basis[torch.arange(48), basis.abs().argmax(1)] > 0).all()


def test_the_fit_does_not_depend_on_the_order_of_the_crops(crops: np.ndarray) -> None:
    codec, explained = fit_patch_codec(crops, patch_px=4, channels=8)
    for seed in range(5):
        other, again = fit_patch_codec(np.random.default_rng(seed).permutation(crops), patch_px=4, channels=8)
        assert _equal(codec, other) and explained == again


@pytest.mark.parametrize("patch_px", [1, 2, 4])
def test_with_all_components_the_round_trip_is_exact(patch_px: int, crops: np.ndarray) -> None:
    codec, _ = fit_patch_codec(crops, patch_px=patch_px, channels=3 * patch_px**2)
    pixels = _pixels(np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3)).astype(np.uint8))
    mean, std = codec.posterior(pixels)
    assert mean.shape == std.shape == (3, 3 * patch_px**2, 16 // patch_px, 16 // patch_px)
    assert not std.any()
    torch.testing.assert_close(codec.decode(mean), pixels, atol=1e-4, rtol=0)


def test_on_its_span_the_round_trip_is_exact_and_the_rest_is_lost_best(codec: PatchCodec, crops: np.ndarray) -> None:
    latents = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(codec.posterior(codec.decode(latents))[0], latents, atol=1e-4, rtol=0)
    pixels = _pixels(crops)
    once = codec.decode(codec.posterior(pixels)[0])
    torch.testing.assert_close(codec.decode(codec.posterior(once)[0]), once, atol=1e-4, rtol=0)
    # no code of this size loses less: moving a latent in any direction loses more
    error = (once - pixels).pow(2).sum()
    moved = codec.decode(codec.posterior(pixels)[0] + 0.1 * torch.ones(1, 8, 1, 1))
    assert 0 < error < (moved - pixels).pow(2).sum()


def test_latents_of_the_fitted_crops_have_unit_rms_and_no_mean(codec: PatchCodec, crops: np.ndarray) -> None:
    latents = codec.posterior(_pixels(crops))[0]
    assert latents.pow(2).mean().sqrt().item() == pytest.approx(1, abs=1e-4)
    np.testing.assert_allclose(latents.mean((0, 2, 3)), 0, atol=1e-4)


def test_a_cell_depends_on_half_a_patch_beyond_its_own(codec: PatchCodec, crops: np.ndarray) -> None:
    """In a file from before patches overlapped, on its own alone."""
    pixels = _pixels(crops[:1])
    changed = pixels.clone()
    changed[:, :, 4:6, 8:10] += 0.5  # the upper left quarter of cell 1, 2
    apart = {name: value for name, value in load(codec_bytes(codec)).items() if name != "border"}
    seen = {}
    for name, one in (("lapped", codec), ("apart", codec_from_bytes(save(apart), "x"))):
        difference = (one.posterior(changed)[0] - one.posterior(pixels)[0]).abs().sum((0, 1))
        seen[name] = torch.nonzero(difference > 1e-6).tolist()
    assert seen == {"lapped": [[0, 1], [0, 2], [1, 1], [1, 2]], "apart": [[1, 2]]}


@pytest.mark.parametrize("patch_px", [2, 3, 4, 8])
def test_the_border_filter_is_orthogonal_and_keeps_constants(patch_px: int) -> None:
    border = border_filter(patch_px)
    torch.testing.assert_close(border @ border.T, torch.eye(patch_px, dtype=torch.float64))
    torch.testing.assert_close(border.sum(1), torch.ones(patch_px, dtype=torch.float64))


def test_overlapping_patches_lose_less_and_show_no_grid(crops: np.ndarray) -> None:
    """Against PCA of patches that do not overlap. The grid: how far a wrong latent makes borders jump."""
    patches = _patches(crops, 4) / 127.5 - 1
    _, _, components = np.linalg.svd(patches - patches.mean(0), full_matrices=False)
    lapped, _ = fit_patch_codec(crops, patch_px=4, channels=12)
    mean, basis = torch.from_numpy(patches.mean(0)), torch.from_numpy(components[:12])
    apart = PatchCodec(mean, basis, lapped.rms, torch.eye(4))
    pixels, wrong = _pixels(crops), torch.randn(12, 12, 4, 4, generator=torch.Generator().manual_seed(0))
    lost, grid = [], []
    for codec in (lapped, apart):
        latents = codec.posterior(pixels)[0]
        lost.append((codec.decode(latents) - pixels).pow(2).mean().item())
        error = codec.decode(latents + wrong) - codec.decode(latents)
        jump = error.diff(dim=-1).pow(2).mean((0, 1, 2)).sqrt()
        at_border = torch.arange(len(jump)) % 4 == 3
        grid.append((jump[at_border].mean() / jump[~at_border].mean()).item())
    assert lost[0] < 0.95 * lost[1], lost
    assert grid[0] < 1.2 < 1.4 < grid[1], grid


def test_projection_keeps_what_decodes_to_valid_pixels_and_pulls_the_rest_closer(codec: PatchCodec) -> None:
    generator = torch.Generator().manual_seed(1)
    inside = 0.05 * torch.randn(2, 8, 4, 4, generator=generator)
    assert codec.decode(inside).abs().max() < 1
    torch.testing.assert_close(codec.project(inside), inside, atol=1e-4, rtol=0)

    def excess(latents: Tensor) -> float:
        return (codec.decode(latents).abs() - 1).clamp_min(0).sum().item()

    outside = 6 * torch.randn(2, 8, 4, 4, generator=generator)
    once = codec.project(outside)
    twice = codec.project(once)
    assert excess(outside) > 2 * excess(once) > 0
    # clamp and orthogonal projection alternate, so each step is shorter than the one before
    assert (twice - once).norm() < 0.5 * (once - outside).norm()


def test_with_all_components_projection_is_idempotent(crops: np.ndarray) -> None:
    full, _ = fit_patch_codec(crops, patch_px=2, channels=12)
    once = full.project(4 * torch.randn(2, 12, 8, 8, generator=torch.Generator().manual_seed(2)))
    torch.testing.assert_close(full.project(once), once, atol=1e-4, rtol=0)
    assert full.decode(once).abs().max() < 1 + 1e-4


def test_bytes_and_back_is_exact(codec: PatchCodec) -> None:
    data = codec_bytes(codec)
    assert _equal(codec_from_bytes(data, "x"), codec) and codec_bytes(codec_from_bytes(data, "x")) == data


def test_without_crops_there_is_no_codec() -> None:
    with pytest.raises(ValueError, match="no crops"):
        fit_patch_codec([], patch_px=2, channels=3)


def test_crops_of_one_colour_give_finite_latents() -> None:
    codec, explained = fit_patch_codec([np.full((4, 4, 3), 77, np.uint8)], patch_px=2, channels=3)
    latents = codec.posterior(_pixels(np.full((1, 4, 4, 3), 78, np.uint8)))[0]
    assert torch.isfinite(latents).all() and np.isfinite(explained)


@pytest.mark.parametrize("name", ["mean", "basis", "rms"])
def test_a_codec_that_is_not_finite_or_of_other_shapes_is_refused(codec: PatchCodec, name: str) -> None:
    tensors = load(codec_bytes(codec))
    for damaged in (tensors[name] * float("nan"), tensors[name][None]):
        with pytest.raises(CodecError, match=r"^parts/codec: damaged codec"):
            codec_from_bytes(save(tensors | {name: damaged}), "parts/codec")


@pytest.mark.parametrize("cut", [0, 100, -1])
def test_a_damaged_file_is_one_error_with_its_place(codec: PatchCodec, cut: int) -> None:
    with pytest.raises(CodecError, match=r"^parts/codec: damaged codec"):
        codec_from_bytes(codec_bytes(codec)[:cut], "parts/codec")
