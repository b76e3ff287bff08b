"""Codecs, pixels to latents and back: the protocol, and the sample profile's codec. Stable Diffusion's is in vae.py.

The sample profile's codec has a closed form: PCA of p x p x 3 patches, fitted on training crops, with one global scale
that gives latents unit rms. Patches overlap: an orthogonal filter across their borders makes it a lapped transform
(Malvar & Staelin 1989; in this form Tran, Liang & Tu 2003, as in JPEG XR), so that an edit shows no grid. It replaces
the paper's AutoencoderKL (Stable Diffusion), which cannot be trained in minutes. The report lists this deviation.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, Self

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from pbe.errors import UserError
from pbe.model.tensors import WeightsError, refuse_non_finite

FIT_SCALE = 64  # of filtered values that the fit sums as integers: to 1/128 of a level
FIT_PIXELS = 1 << 19  # of crops that the fit takes at a time


class Codec(Protocol):
    """A frozen codec. Pixels (B, 3, S, S) float in [-1, 1]; latents (B, C, S/p, S/p), about unit rms."""

    @property
    def patch_px(self) -> int:
        """p, the side of a latent cell in pixels."""
        ...

    @property
    def channels(self) -> int:
        """C, the channels of a latent."""
        ...

    @property
    def project(self) -> Callable[[Tensor], Tensor] | None:
        """Maps latents to latents of valid pixels; None if the decoder always gives valid pixels."""
        ...

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels, not clamped."""
        ...

    def to(self, device: torch.device) -> Self: ...

    def compute_in(self, dtype: torch.dtype) -> Self:
        """Compute in `dtype` where that saves time; latents and pixels stay float32."""
        ...


class CodecError(UserError, ValueError):
    """A codec's file is damaged."""


class PatchCodec(nn.Module):
    """An orthonormal linear codec. Pixels (B, 3, S, S) float in [-1, 1]; latents (B, C, S/p, S/p), unit rms."""

    mean: Tensor  # (3 p p,)
    basis: Tensor  # (C, 3 p p), orthonormal rows
    rms: Tensor  # () scale of the raw coefficients
    border: Tensor  # (p, p) orthogonal: border_filter, or the identity, which keeps patches apart

    def __init__(self, mean: Tensor, basis: Tensor, rms: Tensor, border: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.float())
        self.register_buffer("basis", basis.float())
        self.register_buffer("rms", rms.float())
        self.register_buffer("border", border.float())

    @property
    def patch_px(self) -> int:
        return self.border.shape[0]

    @property
    def channels(self) -> int:
        return self.basis.shape[0]

    def compute_in(self, dtype: torch.dtype) -> "PatchCodec":
        return self  # one small matrix product gains nothing

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latent's posterior; this codec is deterministic, so std is 0."""
        lapped = across_borders(pixels, self.border)
        patches = nn.functional.pixel_unshuffle(lapped, self.patch_px) - self.mean[:, None, None]
        mean = torch.einsum("cd,bdhw->bchw", self.basis, patches) / self.rms
        return mean, torch.zeros_like(mean)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to pixels, not clamped."""
        patches = torch.einsum("cd,bchw->bdhw", self.basis, latents * self.rms) + self.mean[:, None, None]
        return across_borders(nn.functional.pixel_shuffle(patches, self.patch_px), self.border.T)

    def project(self, latents: Tensor) -> Tensor:
        """The latent of the decoded image after clamping it to valid pixels [-1, 1]."""
        return self.posterior(self.decode(latents).clamp(-1, 1))[0]


def border_filter(patch_px: int) -> Tensor:
    """(p, p) float64: the orthogonal filter of the p pixels around a border between two patches, p/2 of each.

    With h = p/2, J the reversal and C2, C4 the orthonormal DCTs of size h: B diag(I, J C2^T C4 J) B / 2, where
    B = [[I, J], [J, -I]] (Tran, Liang & Tu, "Lapped transform via time-domain pre- and post-filtering", IEEE TSP 2003,
    the orthogonal one). Before the patches' transform it takes out what two neighbours have in common; its transpose,
    after the inverse, blends them. It keeps constants. For a p that is odd or below 4: the identity.
    """
    if patch_px % 2 or patch_px < 4:
        return torch.eye(patch_px, dtype=torch.float64)
    half = patch_px // 2
    k, i = torch.arange(half, dtype=torch.float64)[:, None], torch.arange(half, dtype=torch.float64)
    dct2 = torch.cos(math.pi * k * (2 * i + 1) / patch_px) * math.sqrt(2 / half)
    dct2[0] /= math.sqrt(2)
    dct4 = torch.cos(math.pi * (2 * k + 1) * (2 * i + 1) / (2 * patch_px)) * math.sqrt(2 / half)
    one = torch.eye(half, dtype=torch.float64)
    butterfly = torch.cat([torch.cat([one, one.flip(0)], 1), torch.cat([one.flip(0), -one], 1)])
    return butterfly @ torch.block_diag(one, (dct2.T @ dct4).flip(0, 1)) @ butterfly / 2


def across_borders(pixels: Tensor, border: Tensor) -> Tensor:
    """Multiply the pixels around each border between two patches by `border` (p, p), along both axes of (..., S, S)."""
    half = border.shape[0] // 2
    if half == 0 or pixels.shape[-1] == border.shape[0]:
        return pixels
    for _ in range(2):
        inner = pixels[..., half:-half].unflatten(-1, (-1, border.shape[0])) @ border.T
        pixels = torch.cat([pixels[..., :half], inner.flatten(-2), pixels[..., -half:]], -1).transpose(-1, -2)
    return pixels


def codec_bytes(codec: PatchCodec) -> bytes:
    """The codec as a safetensors file."""
    return save({name: value.contiguous() for name, value in codec.state_dict().items()})


def codec_from_bytes(data: bytes, where: str) -> PatchCodec:
    """Inverse of codec_bytes. Raises CodecError, which names `where`, if the data is damaged."""
    try:
        tensors = load(data)
        refuse_non_finite(tensors, "its values")
        mean, basis, rms = (tensors[name] for name in ("mean", "basis", "rms"))
        patch_px = math.isqrt(mean.numel() // 3)
        border = tensors.get("border", torch.eye(patch_px))  # files of before patches overlapped have none
    except (SafetensorError, KeyError, WeightsError) as error:
        raise CodecError(f"{where}: damaged codec ({error}); delete it and repeat the stage that wrote it") from None
    fits = basis.ndim == 2 and mean.shape == basis.shape[1:] == (3 * patch_px**2,) and not rms.ndim
    if not fits or border.shape != (patch_px, patch_px):
        raise CodecError(f"{where}: damaged codec (its shapes differ); delete it and repeat the stage that wrote it")
    return PatchCodec(mean, basis, rms, border)


def fit_patch_codec(crops: Iterable[np.ndarray], *, patch_px: int, channels: int) -> tuple[PatchCodec, float]:
    """Fit a codec on (S, S, 3) uint8 crops; also returns the fraction of variance that its components explain.

    Moments are summed in integers of 1/64 level, so the result does not depend on the order of the crops. Each
    component's largest entry is positive, which fixes its sign. Raises ValueError without crops.
    """
    dims = 3 * patch_px**2
    count = 0
    total = np.zeros(dims, np.int64)
    outer = np.zeros((dims, dims), np.int64)
    border = border_filter(patch_px)
    for batch in _batches(crops):
        lapped = (FIT_SCALE * across_borders(torch.from_numpy(batch).permute(0, 3, 1, 2).double(), border)).round()
        patches = nn.functional.pixel_unshuffle(lapped, patch_px).transpose(0, 1).flatten(1)
        count += patches.shape[1]
        total += patches.sum(1).numpy().astype(np.int64)
        outer += (patches @ patches.T).numpy().astype(np.int64)  # exact: integers below 2^53
    if not count:
        raise ValueError("no crops to fit the codec on")
    mean = total / count / FIT_SCALE
    covariance = outer / count / FIT_SCALE**2 - np.outer(mean, mean)
    values, vectors = np.linalg.eigh(covariance)
    order = np.argsort(values)[::-1][:channels]
    basis = vectors[:, order].T
    largest = np.abs(basis).argmax(axis=1)
    basis = basis * np.sign(basis[np.arange(channels), largest])[:, None]
    explained = float(values[order].sum() / max(values.sum(), 1e-12))
    rms = np.sqrt(max(values[order].mean(), 1e-12)) / 127.5
    codec = PatchCodec(
        torch.from_numpy(mean / 127.5 - 1), torch.from_numpy(np.ascontiguousarray(basis)), torch.tensor(rms), border
    )
    return codec, explained


def _batches(crops: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Stacked crops, about FIT_PIXELS at a time: one by one, threads would wait for each other most of the time."""
    held: list[np.ndarray] = []
    for crop in crops:
        held.append(crop)
        if len(held) * crop.shape[0] * crop.shape[1] >= FIT_PIXELS:
            yield np.stack(held)
            held = []
    if held:
        yield np.stack(held)
