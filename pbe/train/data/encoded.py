"""Training rows from the arrays that the encode stage stored; no encoder runs."""

from collections.abc import Sequence

import numpy as np
import torch

from pbe.data.slots import slot_files
from pbe.encode import Posterior
from pbe.model.settings import Tokens
from pbe.store import Manifest
from pbe.train.data.batch import Batch, make_batch
from pbe.train.data.draws import Draw, RowForm
from pbe.train.data.reader import StoredRow


class EncodedRows:
    """A RowSource: the prefetch thread builds the batches, the training thread only copies them to its device."""

    def __init__(self, encoded: Manifest, *, tokens: Tokens, device: torch.device) -> None:
        """tokens: "class" reads only the first of the stored tokens."""
        self.files = slot_files(encoded)
        self.rows_per_group = self.stored_per_group = int(encoded.config["rows_per_group"])
        self._tokens = slice(1) if tokens == "class" else slice(None)
        self._device = device

    def prepare(self, rows: Sequence[tuple[StoredRow, Draw]]) -> Batch:
        """A batch on the CPU, pinned if training runs on a GPU (`Batch.pinned`)."""
        draws, arrays = [], []
        for row, draw in rows:
            source_mean, source_std, tokens = (
                row.array(name) for name in ("source_mean", "source_std", "exemplar_tokens")
            )
            drawn = draw(
                RowForm(
                    hole_kinds=row.hole_kinds,
                    latent_shape=source_mean.shape,
                    stored_references=len(tokens),
                    posterior_has_spread=bool(source_std.any()),
                )
            )
            masked = (
                row.array(f"{drawn.hole_kind}_{what}") for what in ("masked_mean", "masked_std", "hole_mask_latent")
            )
            draws.append(drawn)
            if drawn.wants_pair and row.has_pair:
                tokens = row.array("pair_tokens")
            arrays.append((source_mean, source_std, *masked, tokens[drawn.stored_reference, self._tokens]))
        # to float32 all rows at once: one by one it took longer than all else here
        columns = (torch.from_numpy(np.stack(column)).float() for column in zip(*arrays, strict=True))
        source_means, source_stds, masked_means, masked_stds, hole_masks, exemplars = columns
        batch = make_batch(
            draws,
            source=Posterior(source_means, source_stds),
            masked=Posterior(masked_means, masked_stds),
            keep_mask_latent=1.0 - hole_masks,
            exemplar_tokens=exemplars,
        )
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # for this thread: otherwise pinning opens a context on GPU 0
            batch = batch.pinned()
        return batch

    def finish(self, prepared: Batch) -> Batch:
        return prepared.to(self._device)
