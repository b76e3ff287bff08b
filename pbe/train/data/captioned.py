"""Encoded training rows of a text-conditioned model: the tokens of a caption stand in the exemplar's place.

Encoded rows have no captions: label, reference and written caption are read from the triplets that they were made from,
and the text encoder runs in the training thread. Captions of labels are few, so that it mostly answers from memory.
"""

import threading
from collections.abc import Sequence
from dataclasses import replace

from pbe.data import images
from pbe.data.captions import caption
from pbe.data.rng import row_rng
from pbe.data.schema import CaptionForm
from pbe.data.slots import require_same_rows, slot_files
from pbe.model.text import TextEncoder
from pbe.store import Manifest, Store
from pbe.train.data.batch import Batch
from pbe.train.data.draws import Draw
from pbe.train.data.encoded import EncodedRows
from pbe.train.data.reader import RowReader, StoredRow

TRIPLETS_CACHE_BYTES = 64 << 20  # of references, 10 kB each


class CaptionedRows:
    """A RowSource around EncodedRows. A row draws one of the forms, the same in every epoch: each of its photo's slots
    draws anew."""

    def __init__(
        self,
        source: EncodedRows,
        store: Store,
        encoded: Manifest,
        triplets: Manifest,
        *,
        encoder: TextEncoder,
        forms: Sequence[CaptionForm],
        seed: int,
        keep_rows: int,
    ) -> None:
        """The encoder is on the training device. keep_rows: as RowReader's. Raises InputError unless `encoded` was made
        from `triplets`."""
        require_same_rows(encoded, triplets)
        self.files, self.rows_per_group, self.stored_per_group = (
            source.files, source.rows_per_group, source.stored_per_group
        )  # fmt: skip
        self.columns: Sequence[str] | None = source.columns
        self._source, self._encoder, self._forms, self._seed = source, encoder, forms, seed
        # a part in which no row has a written caption lacks the column, and is read without it
        columns = ["image_id", "slot", "label_name", "caption"]
        columns += ["reference"] if "label_colour" in forms else []
        self._triplets = RowReader(
            store, slot_files(triplets), TRIPLETS_CACHE_BYTES, keep_rows=keep_rows, columns=columns
        )
        self._reading = threading.Lock()

    def prepare(self, rows: Sequence[tuple[StoredRow, Draw]]) -> tuple[Batch, list[str]]:
        return self._source.prepare(rows), [self._caption_of(row) for row, _ in rows]

    def pin(self, prepared: tuple[Batch, list[str]]) -> tuple[Batch, list[str]]:
        batch, captions = prepared
        return self._source.pin(batch), captions

    def finish(self, prepared: tuple[Batch, list[str]]) -> Batch:
        batch, captions = prepared
        return replace(self._source.finish(batch), exemplar_tokens=self._encoder(captions))

    def _caption_of(self, encoded: StoredRow) -> str:
        slot, file, row = encoded.place
        with self._reading:  # validation rows are read while the prefetch thread reads ahead
            triplet = self._triplets.read(slot=slot, file=file, row=row).values()
        rng = row_rng(self._seed, triplet["image_id"], triplet["slot"], "caption")
        form = self._forms[int(rng.integers(len(self._forms)))]
        picture = images.decode(triplet["reference"]) if form == "label_colour" else None
        return caption(triplet["label_name"], form, picture, written=triplet.get("caption"))
