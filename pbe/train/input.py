"""What a training step reads: the encode stage's rows, or the same rows encoded anew from their pixels.

Both give the same rows in the same order with the same draws. From pixels, `pbe/encode.py` runs in every step: decoding
and reference augmentation in the prefetch thread, codec and frozen backbone on the training device. References are then
drawn afresh at each visit; of a row's first visit it is draw 1, which is also the first that the encode stage stores.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from pbe.data import images
from pbe.data.batches import (
    Batch,
    DrawConfig,
    Draws,
    Prefetched,
    RowReader,
    collate,
    draw,
    joined,
    pinned_batches,
    rank_batches,
    row_name,
    rows_kept,
    validation_draw,
    validation_places,
    validation_rows,
)
from pbe.data.masks import unpack_mask
from pbe.data.order import rank_rows
from pbe.data.reference import augment_reference, make_augmenter
from pbe.data.rng import row_rng
from pbe.data.slots import TRIPLETS_PER_GROUP, InputError, group_rows, require_same_rows, slot_files
from pbe.diffusion.schedule import TRAIN_TIMESTEPS
from pbe.encode import encode_masked, encode_references, encode_source, to_device
from pbe.model.backbone import Backbone
from pbe.model.codec import Codec
from pbe.model.frozen import open_backbone
from pbe.model.settings import Tokens
from pbe.store import File, Manifest, Store
from pbe.train.settings import TrainConfig

PREFETCHED_BATCHES = 4


class TrainInput(Protocol):
    """Micro-batches of one rank, endlessly from one optimizer step on; float32 and on the training device."""

    def next(self) -> Batch: ...

    def validation(self) -> Batch:
        """The validation rows, the same on every rank; on the CPU."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Share:
    """Which part of the rows one rank reads, from which optimizer step on."""

    rank: int
    world: int
    start_step: int


def open_input(
    store: Store,
    encoded: Manifest,
    triplets: Manifest | None,
    *,
    cfg: TrainConfig,
    seed: int,
    share: Share,
    codec: Codec,
    device: torch.device,
) -> TrainInput:
    """By `train.input`. triplets: None for encoded rows. codec: what the rows were encoded with; moved to `device`.

    Raises InputError, BackboneError, StoreError, WeightsError.
    """
    if cfg.input == "encoded":
        return EncodedInput(store, encoded, cfg=cfg, seed=seed, share=share, device=device)
    if triplets is None:
        raise InputError("train.input = pixels needs the manifest of the triplets")
    backbone = open_backbone(store, encoded.config["backbone"])
    return PixelInput(
        store,
        encoded,
        triplets,
        cfg=cfg,
        seed=seed,
        share=share,
        encoder=OnlineEncoder(codec.to(device), backbone.to(device), cfg.exemplar.tokens, device),
    )


def draw_config(cfg: TrainConfig, seed: int) -> DrawConfig:
    return DrawConfig(
        seed=seed,
        timesteps=TRAIN_TIMESTEPS,
        bezier_prob=cfg.bezier_prob,
        condition_dropout_prob=cfg.condition_dropout_prob,
        context_dropout_prob=cfg.context_dropout_prob,
        reference_augmentation=cfg.reference_augmentation,
        class_token_only=cfg.exemplar.tokens == "class",
    )


# -- encoded rows ------------------------------------------------------------------------------------------------------


class EncodedInput:
    """Reads what the encode stage stored; runs no encoder."""

    def __init__(
        self, store: Store, encoded: Manifest, *, cfg: TrainConfig, seed: int, share: Share, device: torch.device
    ) -> None:
        self._store, self._encoded, self._cfg, self._device = store, encoded, cfg, device
        self._draw = draw_config(cfg, seed)
        batches = rank_batches(
            store,
            encoded,
            cfg=self._draw,
            batch=cfg.batch,
            micro_batch=cfg.micro_batch,
            lanes=cfg.lanes,
            rank=share.rank,
            world=share.world,
            rows_per_group=int(encoded.config["rows_per_group"]),
            start_step=share.start_step,
        )
        if device.type == "cuda":
            batches = pinned_batches(batches, device)
        self._batches = Prefetched(batches, depth=PREFETCHED_BATCHES)

    def next(self) -> Batch:
        return self._batches.next().to(self._device)

    def validation(self) -> Batch:
        rows = validation_rows(
            self._store,
            self._encoded,
            cfg=self._draw,
            rows=self._cfg.validation_rows,
            rows_per_group=int(self._encoded.config["rows_per_group"]),
        )
        return collate(rows)

    def close(self) -> None:
        self._batches.close()


# -- pixels ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PixelRow:
    """One training example before the networks."""

    name: str
    source: np.ndarray  # (S, S, 3) uint8
    hole_mask: np.ndarray  # (S, S) uint8, 1 = hole; of the drawn kind
    reference: np.ndarray  # (R, R, 3) uint8, augmented where that is on
    draws: Draws


@dataclass(frozen=True)
class OnlineEncoder:
    """The encode stage's networks on the training device, frozen."""

    codec: Codec
    backbone: Backbone
    tokens: Tokens
    device: torch.device

    def batch(self, rows: Sequence[PixelRow]) -> Batch:
        """On `device`."""
        sources = np.stack([row.source for row in rows])
        source = encode_source(self.codec, sources, device=self.device)
        masked, keep = encode_masked(self.codec, sources, np.stack([row.hole_mask for row in rows]), device=self.device)
        references = np.stack([row.reference for row in rows])
        draws = [row.draws for row in rows]

        def on_device(values: list[Any]) -> torch.Tensor:
            return to_device(torch.from_numpy(np.stack(values)), self.device)

        return Batch(
            x0=source.mean + source.std * on_device([drawn.source_normal for drawn in draws]),
            masked_latent=masked.mean + masked.std * on_device([drawn.masked_normal for drawn in draws]),
            keep_mask_latent=keep,
            exemplar_tokens=encode_references(self.backbone, references, tokens=self.tokens, device=self.device),
            noise=on_device([drawn.noise for drawn in draws]),
            timestep=on_device([np.int64(drawn.timestep) for drawn in draws]),
            drop_condition=on_device([np.bool_(drawn.drop_condition) for drawn in draws]),
            drop_context=on_device([np.bool_(drawn.drop_context) for drawn in draws]),
            rows=tuple(row.name for row in rows),
        )


class PixelInput:
    """Reads triplets in the order of the encoded rows, and encodes them in every step."""

    def __init__(
        self,
        store: Store,
        encoded: Manifest,
        triplets: Manifest,
        *,
        cfg: TrainConfig,
        seed: int,
        share: Share,
        encoder: OnlineEncoder,
    ) -> None:
        require_same_rows(encoded, triplets)
        self._store, self._cfg, self._encoder = store, cfg, encoder
        self._files = slot_files(triplets)
        self._draw = draw_config(cfg, seed)
        self._rows_per_group = int(encoded.config["rows_per_group"])
        self._data_seed = int(encoded.config["seed"])  # references are drawn as encode draws them, whatever train.seed
        # how many draws are stored moves the later draws of a row, such as its timestep
        self._stored_references = int(encoded.config["reference_draws"])
        self._augmenter = make_augmenter()
        self._batches = Prefetched(self._micro_batches(share), depth=PREFETCHED_BATCHES)

    def next(self) -> Batch:
        return self._encoder.batch(self._batches.next())

    def close(self) -> None:
        self._batches.close()

    def validation(self) -> Batch:
        files = self._files[0]
        places = validation_places(files, self._cfg.validation_rows, rows_per_group=self._rows_per_group)
        reader = self._reader(keep_rows=1, files=[files])
        batches = []
        for start in range(0, len(places), self._cfg.micro_batch):
            rows = []
            for number, (file, index) in enumerate(places[start : start + self._cfg.micro_batch], start):
                row = reader.read_at(slot=0, file=file, row=index)
                source = images.decode(row["source"])
                drawn = validation_draw(
                    row["image_id"],
                    row["slot"],
                    number=number,
                    count=len(places),
                    latent_shape=self._latent_shape(source),
                    stored_references=self._stored_references,
                    cfg=self._draw,
                )
                rows.append(_pixel_row(row, source, images.decode(row["reference"]), drawn, epoch=0))
            batches.append(self._encoder.batch(rows).to(torch.device("cpu")))
        return joined(batches)

    def _micro_batches(self, share: Share) -> Iterator[list[PixelRow]]:
        cfg, per_group = self._cfg, self._rows_per_group
        order = rank_rows(
            [[group_rows(file, per_group) for file in slot] for slot in self._files],
            batch=cfg.batch,
            lanes=cfg.lanes,
            rank=share.rank,
            world=share.world,
            seed=self._draw.seed,
            start_step=share.start_step,
        )
        keep_rows = rows_kept(
            batch=cfg.batch, lanes=cfg.lanes, world=share.world, rows_per_group=max(per_group, TRIPLETS_PER_GROUP)
        )
        reader = self._reader(keep_rows=keep_rows, files=self._files)
        for refs in order:
            for start in range(0, len(refs), cfg.micro_batch):
                yield [
                    self._training_row(
                        reader.read_at(slot=ref.slot, file=ref.file, row=ref.group * per_group + ref.row), ref.epoch
                    )
                    for ref in refs[start : start + cfg.micro_batch]
                ]

    def _reader(self, *, keep_rows: int, files: Sequence[Sequence[File]]) -> RowReader:
        return RowReader(self._store, files, keep_rows=keep_rows)

    def _training_row(self, row: dict[str, Any], epoch: int) -> PixelRow:
        source, reference = images.decode(row["source"]), images.decode(row["reference"])
        drawn = draw(
            row["image_id"],
            row["slot"],
            epoch=epoch,
            latent_shape=self._latent_shape(source),
            stored_references=self._stored_references,
            cfg=self._draw,
        )
        if self._draw.reference_augmentation:
            visit = 1 + epoch // len(self._files)  # draw 0 is the clean one
            rng = row_rng(self._data_seed, row["image_id"], row["slot"], "reference", visit)
            reference = augment_reference(reference, augmenter=self._augmenter, rng=rng)
        return _pixel_row(row, source, reference, drawn, epoch=epoch)

    def _latent_shape(self, source: np.ndarray) -> tuple[int, int, int]:
        codec = self._encoder.codec
        return codec.channels, source.shape[0] // codec.patch_px, source.shape[1] // codec.patch_px


def _pixel_row(row: dict[str, Any], source: np.ndarray, reference: np.ndarray, drawn: Draws, *, epoch: int) -> PixelRow:
    height_px, width_px = source.shape[:2]
    packed = row[f"{drawn.hole_kind}_hole_mask"]
    return PixelRow(
        name=row_name(row["image_id"], row["slot"], epoch),
        source=source,
        hole_mask=unpack_mask(packed, width_px=width_px, height_px=height_px),
        reference=reference,
        draws=drawn,
    )
