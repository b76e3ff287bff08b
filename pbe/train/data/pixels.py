"""Training rows from pixels, encoded by `pbe/encode.py` at every step.

The prefetch thread decodes triplets and augments their references; codec and frozen backbone run on the training
device. Each visit to a row draws a new reference; the first visit uses draw 1, the first augmented draw that the encode
stage stores.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pbe.data import images
from pbe.data.masks import hole_of
from pbe.data.reference import augment_reference, make_augmenter
from pbe.data.rng import row_rng
from pbe.data.slots import TRIPLETS_PER_GROUP, require_same_rows, slot_files
from pbe.encode import encode_masked, encode_references, encode_source
from pbe.model.backbone import Backbone
from pbe.model.codec import Codec, PatchCodec
from pbe.model.settings import Tokens
from pbe.store import Manifest
from pbe.train.data.batch import Batch, make_batch
from pbe.train.data.draws import Draw, Draws, RowForm
from pbe.train.data.reader import StoredRow


@dataclass(frozen=True)
class PixelRow:
    """One training row before encoding."""

    draws: Draws
    source: np.ndarray  # (S, S, 3) uint8
    hole_mask: np.ndarray  # (S, S) uint8 of the drawn kind, 1 = hole
    reference: np.ndarray  # (R, R, 3) uint8, augmented if `draws` says so


class PixelRows:
    """A RowSource: the prefetch thread decodes, the training thread encodes."""

    def __init__(
        self,
        encoded: Manifest,
        triplets: Manifest,
        *,
        codec: Codec,
        backbone: Backbone,
        tokens: Tokens,
        device: torch.device,
    ) -> None:
        """Codec and backbone are on `device`. Raises InputError unless `encoded` was made from `triplets`."""
        require_same_rows(encoded, triplets)
        self.files = slot_files(triplets)
        self.rows_per_group, self.stored_per_group = int(encoded.config["rows_per_group"]), TRIPLETS_PER_GROUP
        self.columns: Sequence[str] | None = None
        self._codec, self._backbone, self._tokens, self._device = codec, backbone, tokens, device
        self._data_seed = int(encoded.config["seed"])  # not train.seed: references are drawn as in encode
        # the number of stored draws affects a row's later draws, such as its timestep
        self._stored_references = int(encoded.config["reference_draws"])
        self._augmenter = make_augmenter()

    def prepare(self, rows: Sequence[tuple[StoredRow, Draw]]) -> list[PixelRow]:
        return [self._decoded(row, draw) for row, draw in rows]

    def pin(self, prepared: list[PixelRow]) -> list[PixelRow]:
        return prepared

    def finish(self, prepared: list[PixelRow]) -> Batch:
        sources = np.stack([row.source for row in prepared])
        hole_masks = np.stack([row.hole_mask for row in prepared])
        references = np.stack([row.reference for row in prepared])
        masked, keep_masks = encode_masked(self._codec, sources, hole_masks, device=self._device)
        return make_batch(
            [row.draws for row in prepared],
            source=encode_source(self._codec, sources, device=self._device),
            masked=masked,
            keep_mask_latent=keep_masks,
            exemplar_tokens=encode_references(self._backbone, references, tokens=self._tokens, device=self._device),
        )

    def _decoded(self, stored: StoredRow, draw: Draw) -> PixelRow:
        row = stored.values()
        source = images.decode(row["source"])
        height, width = (side_px // self._codec.patch_px for side_px in source.shape[:2])
        drawn = draw(
            RowForm(
                hole_kinds=stored.hole_kinds,
                latent_shape=(self._codec.channels, height, width),
                stored_references=self._stored_references,
                posterior_has_spread=not isinstance(self._codec, PatchCodec),  # as encode stores it
            )
        )
        pair = drawn.wants_pair and stored.has_pair
        reference = images.decode(row["pair_reference" if pair else "reference"])
        if drawn.augment_reference:
            visit = 1 + drawn.epoch // len(self.files)  # draw 0 is the clean one
            rng = row_rng(self._data_seed, row["image_id"], row["slot"], "pair" if pair else "reference", visit)
            reference = augment_reference(reference, augmenter=self._augmenter, rng=rng)
        return PixelRow(drawn, source, hole_of(row, drawn.hole_kind, source), reference)
