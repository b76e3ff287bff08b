"""Codecs, pixels to latents and back: the protocol, and the sample profile's codec. Stable Diffusion's is in vae.py.

The sample profile's codec has a closed form: PCA of p x p x 3 patches, fitted on training crops, with one global scale
that gives latents unit rms. It replaces the paper's AutoencoderKL (Stable Diffusion), which cannot be trained in
minutes. The report lists this deviation.
"""

from collections.abc import Callable, Iterable
from typing import Protocol, Self

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from pbe.errors import UserError
from pbe.model.tensors import WeightsError, refuse_non_finite

CODEC_FILE = "codec/codec.safetensors"  # the patch codec's, in a model folder


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

    def bfloat16(self) -> Self:
        """Compute in bfloat16 where that saves time; latents and pixels stay float32."""
        ...


class CodecError(UserError, ValueError):
    """A codec's file is damaged."""


class PatchCodec(nn.Module):
    """An orthonormal linear codec. Pixels (B, 3, S, S) float in [-1, 1]; latents (B, C, S/p, S/p), unit rms."""

    mean: Tensor  # (3 p p,)
    basis: Tensor  # (C, 3 p p), orthonormal rows
    rms: Tensor  # () scale of the raw coefficients

    def __init__(self, mean: Tensor, basis: Tensor, rms: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.float())
        self.register_buffer("basis", basis.float())
        self.register_buffer("rms", rms.float())

    @property
    def patch_px(self) -> int:
        return int((self.basis.shape[1] / 3) ** 0.5)

    @property
    def channels(self) -> int:
        return self.basis.shape[0]

    def bfloat16(self) -> "PatchCodec":
        return self  # one small matrix product gains nothing

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latent's posterior; this codec is deterministic, so std is 0."""
        patches = nn.functional.pixel_unshuffle(pixels, self.patch_px) - self.mean[:, None, None]
        mean = torch.einsum("cd,bdhw->bchw", self.basis, patches) / self.rms
        return mean, torch.zeros_like(mean)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to pixels, not clamped."""
        patches = torch.einsum("cd,bchw->bdhw", self.basis, latents * self.rms) + self.mean[:, None, None]
        return nn.functional.pixel_shuffle(patches, self.patch_px)

    def project(self, latents: Tensor) -> Tensor:
        """The latent of the decoded image after clamping it to valid pixels [-1, 1]."""
        return self.posterior(self.decode(latents).clamp(-1, 1))[0]


def codec_bytes(codec: PatchCodec) -> bytes:
    """The codec as a safetensors file."""
    return save({name: value.contiguous() for name, value in codec.state_dict().items()})


def codec_from_bytes(data: bytes, where: str) -> PatchCodec:
    """Inverse of codec_bytes. Raises CodecError, which names `where`, if the data is damaged."""
    try:
        tensors = load(data)
        refuse_non_finite(tensors, "its values")
        mean, basis, rms = (tensors[name] for name in ("mean", "basis", "rms"))
    except (SafetensorError, KeyError, WeightsError) as error:
        raise CodecError(f"{where}: damaged codec ({error}); delete it and repeat the stage that wrote it") from None
    if basis.ndim != 2 or mean.shape != basis.shape[1:] or rms.ndim:
        raise CodecError(f"{where}: damaged codec (its shapes differ); delete it and repeat the stage that wrote it")
    return PatchCodec(mean, basis, rms)


def fit_patch_codec(crops: Iterable[np.ndarray], *, patch_px: int, channels: int) -> tuple[PatchCodec, float]:
    """Fit a codec on (S, S, 3) uint8 crops; also returns the fraction of variance that its components explain.

    Moments are summed in integers, so the result does not depend on the order of the crops. Each component's largest
    entry is positive, which fixes its sign. Raises ValueError without crops.
    """
    dims = 3 * patch_px**2
    count = 0
    total = np.zeros(dims, np.int64)
    outer = np.zeros((dims, dims), np.int64)
    for crop in crops:
        pixels = torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1))).float()[None]
        patches = nn.functional.pixel_unshuffle(pixels, patch_px)[0].flatten(1).numpy().astype(np.int64)
        count += patches.shape[1]
        total += patches.sum(1)
        outer += patches @ patches.T
    if not count:
        raise ValueError("no crops to fit the codec on")
    mean = total / count
    covariance = outer / count - np.outer(mean, mean)
    values, vectors = np.linalg.eigh(covariance)
    order = np.argsort(values)[::-1][:channels]
    basis = vectors[:, order].T
    largest = np.abs(basis).argmax(axis=1)
    basis = basis * np.sign(basis[np.arange(channels), largest])[:, None]
    explained = float(values[order].sum() / max(values.sum(), 1e-12))
    rms = np.sqrt(max(values[order].mean(), 1e-12)) / 127.5
    codec = PatchCodec(
        torch.from_numpy(mean / 127.5 - 1), torch.from_numpy(np.ascontiguousarray(basis)), torch.tensor(rms)
    )
    return codec, explained
