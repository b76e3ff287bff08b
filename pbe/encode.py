"""Encodes pixels into the network's inputs, for the encode stage, the editor and training from pixels.

It returns posterior mean and std, so that training can draw a new sample at every step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import albumentations as A
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pbe.data import images
from pbe.data.masks import HOLE_KINDS, MaskResize, hole_kinds_of, hole_of, keep_mask_latent
from pbe.data.reference import augment_reference
from pbe.data.rng import row_rng
from pbe.data.schema import array_bytes, encoded_schema, without_empty
from pbe.errors import UserError
from pbe.model.backbone import Backbone
from pbe.model.codec import Codec
from pbe.model.settings import Tokens
from pbe.settings import Dtype

CPU = torch.device("cpu")
Levels = Literal["nearest", "below"]  # below: upstream's scripts, whose cast to uint8 truncates

HOLE_COLUMNS = ("masked_mean", "masked_std", "hole_mask_latent")  # of each kind of hole
LATENT_COLUMNS = ("source_mean", "source_std", *(f"{kind}_{what}" for kind in HOLE_KINDS for what in HOLE_COLUMNS))


class EncodeError(UserError, FloatingPointError):
    """A network's output is not finite in the type that is stored."""


@dataclass(frozen=True)
class Posterior:
    """Mean and standard deviation of latents, each (B, C, h, w) float32."""

    mean: Tensor
    std: Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to `device`; to a GPU through pinned memory, because the copy from any other memory would wait
    for the GPU's queued work."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def to_pixels(images: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 RGB to (B, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float() / 127.5 - 1


def to_images(pixels: Tensor, *, levels: Levels = "nearest") -> np.ndarray:
    """(B, 3, H, W) in [-1, 1], clamped, to (B, H, W, 3) uint8. levels: the nearest whole level, or the one below."""
    scaled = (pixels.clamp(-1, 1) + 1) * 127.5
    scaled = (scaled.round() if levels == "nearest" else scaled).to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).contiguous().cpu().numpy()


@torch.no_grad()
def encode_source(codec: Codec, sources: np.ndarray, *, device: torch.device = CPU) -> Posterior:
    """The latents' posterior of sources (B, S, S, 3) uint8."""
    return Posterior(*codec.posterior(to_device(to_pixels(sources), device)))


@torch.no_grad()
def encode_masked(
    codec: Codec,
    sources: np.ndarray,
    hole_masks: np.ndarray,
    *,
    mask_resize: MaskResize = "bilinear",
    device: torch.device = CPU,
) -> tuple[Posterior, Tensor]:
    """The masked photo's posterior and the keep mask at latent size (B, 1, h, w) in [0, 1].

    sources: (B, S, S, 3) uint8. hole_masks: (B, S, S) of 0/1, 1 = hole. As upstream, the hole
    is set to 0.0 in [-1, 1], mid grey, before encoding.
    """
    keep_px = 1.0 - torch.from_numpy(hole_masks.astype(np.float32))[:, None]
    posterior = Posterior(*codec.posterior(to_device(to_pixels(sources) * keep_px, device)))
    keep = np.stack([keep_mask_latent(mask, codec.patch_px, resize=mask_resize) for mask in hole_masks])
    return posterior, to_device(torch.from_numpy(keep), device)


@torch.no_grad()
def encode_references(
    backbone: Backbone, references: np.ndarray, *, tokens: Tokens = "class", device: torch.device = CPU
) -> Tensor:
    """(B, R, R, 3) uint8 references to (B, T, width) float32: the class token alone (T = 1), or all, class token first.

    The class token is the paper's bottleneck; all tokens are its naive baseline (section 4.1).
    """
    pixels = to_device(torch.from_numpy(np.ascontiguousarray(references.transpose(0, 3, 1, 2))), device)
    return backbone(pixels)[:, None] if tokens == "class" else backbone.tokens(pixels)


def encode_triplets(
    triplets: pa.Table,
    *,
    image_px: int,
    codec: Codec,
    backbone: Backbone,
    tokens: Tokens,
    augmenter: A.Compose,
    draws: int,
    batch_rows: int,
    seed: int,
    clean_tokens: dict[bytes, np.ndarray],
    dtype: Dtype = "float16",
    device: torch.device = CPU,
) -> pa.Table:
    """Encode a TRIPLETS table; the encoded table has the same rows in the same order.

    draws: references per row; draw 0 is clean, the others are augmented. clean_tokens: cache of draw 0 by reference
    bytes, updated here, because slots that share a box share its clean reference. Images go through the networks in
    batches of `batch_rows`. dtype: of the stored arrays. Raises EncodeError for values that it cannot hold.
    """

    def encoded_tokens(references: list[np.ndarray]) -> list[np.ndarray]:
        out: list[np.ndarray] = []
        for start in range(0, len(references), batch_rows):
            batch = np.stack(references[start : start + batch_rows])
            out += list(encode_references(backbone, batch, tokens=tokens, device=device).cpu().numpy())
        return out

    def tokens_of(column: str, purpose: str) -> list[np.ndarray | None]:
        """Tokens of the pictures of a column, (draws, T, width) each; None where a row has none."""
        having = [row for row in rows if row.get(column) is not None]
        references = [images.decode(row[column]) for row in having]
        new = {row[column]: reference for row, reference in zip(having, references, strict=True)}
        wanted = [data for data in new if data not in clean_tokens]
        clean_tokens.update(zip(wanted, encoded_tokens([new[data] for data in wanted]), strict=True))
        augmented = [
            augment_reference(
                reference, augmenter=augmenter, rng=row_rng(seed, row["image_id"], row["slot"], purpose, draw)
            )
            for row, reference in zip(having, references, strict=True)
            for draw in range(1, draws)
        ]
        drawn = encoded_tokens(augmented)
        found = iter(
            np.stack([clean_tokens[row[column]], *drawn[index * (draws - 1) : (index + 1) * (draws - 1)]])
            for index, row in enumerate(having)
        )
        return [None if row.get(column) is None else next(found) for row in rows]

    rows = triplets.to_pylist()
    columns = _latent_columns(rows, codec, batch_rows, device)
    columns["exemplar_tokens"] = tokens_of("reference", "reference")
    columns["pair_tokens"] = tokens_of("pair_reference", "pair")
    latent_px = image_px // codec.patch_px
    schema = encoded_schema(
        (codec.channels, latent_px, latent_px),
        (draws, 1 if tokens == "class" else backbone.token_count, backbone.width),
        dtype,
    )
    arrays: dict[str, list[object]] = {name: [row[name] for row in rows] for name in ("image_id", "slot", "box_index")}
    for name, values in columns.items():
        _refuse_non_finite(name, values, rows, dtype)
        arrays[name] = [None if value is None else array_bytes(schema.field(name), value) for value in values]
    return without_empty(pa.table([pa.array(arrays[field.name], field.type) for field in schema], schema=schema))


def _refuse_non_finite(name: str, values: list[np.ndarray | None], rows: list[dict[str, Any]], dtype: Dtype) -> None:
    for row, value in zip(rows, values, strict=True):
        if value is not None and not np.abs(value).max() <= np.finfo(dtype).max:  # of NaN too
            raise EncodeError(
                f"{row['image_id']}, slot {row['slot']}: {name} has NaN, infinite or too large values for {dtype}; the "
                "weights of encode.codec or encode.backbone are damaged, or set encode.dtype: float32"
            )


def _latent_columns(
    rows: list[dict[str, Any]], codec: Codec, batch_rows: int, device: torch.device
) -> dict[str, list[np.ndarray | None]]:
    """Posteriors and hole masks at latent size, by column name of the encoded schema; None: it has no such hole."""
    columns: dict[str, list[np.ndarray | None]] = {name: [] for name in LATENT_COLUMNS}
    for start in range(0, len(rows), batch_rows):
        batch = rows[start : start + batch_rows]
        sources = np.stack([images.decode(row["source"]) for row in batch])
        posterior = encode_source(codec, sources, device=device)
        _extend(columns, range(len(batch)), len(batch), source_mean=posterior.mean, source_std=posterior.std)
        for kind in HOLE_KINDS:
            having = [index for index, row in enumerate(batch) if kind in hole_kinds_of(row)]
            arrays: dict[str, Tensor] = {}
            if having:
                holes = np.stack([hole_of(batch[index], kind, sources[index]) for index in having])
                masked, keep = encode_masked(codec, sources[having], holes, device=device)
                arrays = {"masked_mean": masked.mean, "masked_std": masked.std, "hole_mask_latent": 1.0 - keep}
            named = {f"{kind}_{what}": arrays.get(what) for what in HOLE_COLUMNS}
            _extend(columns, having, len(batch), **named)
    return columns


def _extend(
    columns: dict[str, list[np.ndarray | None]], places: Sequence[int], rows: int, **arrays: Tensor | None
) -> None:
    """Add `rows` values to each named column: those of its array at `places`, and None elsewhere."""
    for name, array in arrays.items():
        values: list[np.ndarray | None] = [None] * rows
        for place, value in zip(places, array.cpu().numpy() if array is not None else (), strict=True):
            values[place] = value
        columns[name] += values
