"""Training rows from the arrays that the encode stage stored; no encoder runs."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch

from pbe.data.schema import array_value
from pbe.data.slots import slot_files
from pbe.encode import Posterior
from pbe.model.settings import Tokens
from pbe.store import Manifest
from pbe.train.data.batch import Batch, make_batch
from pbe.train.data.draws import Draw


class EncodedRows:
    """A RowSource: the prefetch thread builds the batches, the training thread only copies them to its device."""

    def __init__(self, encoded: Manifest, *, tokens: Tokens, device: torch.device) -> None:
        """tokens: "class" reads only the first of the stored tokens."""
        self.files = slot_files(encoded)
        self.rows_per_group = self.stored_per_group = int(encoded.config["rows_per_group"])
        self._tokens = slice(1) if tokens == "class" else slice(None)
        self._device = device

    def prepare(self, rows: Sequence[tuple[pa.Table, Draw]]) -> Batch:
        """A batch on the CPU, pinned if training runs on a GPU (`Batch.pinned`)."""
        draws, arrays = [], []
        for row, draw in rows:
            source_mean, tokens = _array(row, "source_mean"), _array(row, "exemplar_tokens")
            drawn = draw(latent_shape=source_mean.shape, stored_references=len(tokens))
            kind = drawn.hole_kind
            masked_mean, masked_std = _array(row, f"{kind}_masked_mean"), _array(row, f"{kind}_masked_std")
            keep_mask = 1.0 - _array(row, f"{kind}_hole_mask_latent")
            exemplar = tokens[drawn.stored_reference, self._tokens]
            draws.append(drawn)
            arrays.append((source_mean, _array(row, "source_std"), masked_mean, masked_std, keep_mask, exemplar))
        columns = (torch.from_numpy(np.stack(column)) for column in zip(*arrays, strict=True))
        source_means, source_stds, masked_means, masked_stds, keep_masks, exemplars = columns
        batch = make_batch(
            draws,
            source=Posterior(source_means, source_stds),
            masked=Posterior(masked_means, masked_stds),
            keep_mask_latent=keep_masks,
            exemplar_tokens=exemplars,
        )
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # for this thread: otherwise pinning opens a context on GPU 0
            batch = batch.pinned()
        return batch

    def finish(self, prepared: Batch) -> Batch:
        return prepared.to(self._device)


def _array(row: pa.Table, column: str) -> np.ndarray:
    return array_value(row.schema.field(column), row.column(column)[0].as_py())
