"""Training rows from the arrays that the encode stage stored; no encoder runs."""

from collections.abc import Sequence

import numpy as np
import torch

from pbe.data.schema import encoded_schema
from pbe.data.slots import slot_files
from pbe.encode import Posterior
from pbe.model.settings import Tokens
from pbe.store import Manifest
from pbe.train.data.batch import Batch, make_batch
from pbe.train.data.draws import Draw, RowForm
from pbe.train.data.reader import StoredRow


class EncodedRows:
    """A RowSource: the training thread only copies batches to its device."""

    def __init__(self, encoded: Manifest, *, tokens: Tokens, device: torch.device) -> None:
        """tokens: "class" reads only the first of the stored tokens."""
        self.files = slot_files(encoded)
        self.rows_per_group = self.stored_per_group = int(encoded.config["rows_per_group"])
        self._tokens = slice(1) if tokens == "class" else slice(None)
        # all standard deviations of the patch codec are 0: half of the bytes
        self._has_spread = encoded.config["codec"]["kind"] != "patch"
        names = encoded_schema((1, 1, 1), (1, 1, 1)).names
        self.columns: Sequence[str] | None = (
            names if self._has_spread else [name for name in names if not name.endswith("_std")]
        )
        self._device = device

    def prepare(self, rows: Sequence[tuple[StoredRow, Draw]]) -> Batch:
        """A batch on the CPU."""
        draws, arrays = [], []
        for row, draw in rows:
            source_mean, tokens = row.array("source_mean"), row.array("exemplar_tokens")
            drawn = draw(
                RowForm(
                    hole_kinds=row.hole_kinds,
                    latent_shape=source_mean.shape,
                    stored_references=len(tokens),
                    posterior_has_spread=self._has_spread,
                )
            )
            hole = drawn.hole_kind
            draws.append(drawn)
            if drawn.wants_pair and row.has_pair:
                tokens = row.array("pair_tokens")
            means = (source_mean, row.array(f"{hole}_masked_mean"))
            stds = (row.array("source_std"), row.array(f"{hole}_masked_std")) if self._has_spread else ()
            exemplar = tokens[drawn.stored_reference, self._tokens]
            arrays.append((row.array(f"{hole}_hole_mask_latent"), exemplar, *means, *stds))
        # to float32 all rows at once: one by one it took longer than all else here
        columns = (torch.from_numpy(np.stack(column)).float() for column in zip(*arrays, strict=True))
        hole_masks, exemplars, source_means, masked_means, *rest = columns
        source_stds, masked_stds = rest or (torch.zeros_like(source_means), torch.zeros_like(masked_means))
        return make_batch(
            draws,
            source=Posterior(source_means, source_stds),
            masked=Posterior(masked_means, masked_stds),
            keep_mask_latent=1.0 - hole_masks,
            exemplar_tokens=exemplars,
        )

    def pin(self, prepared: Batch) -> Batch:
        if self._device.type != "cuda":
            return prepared
        torch.cuda.set_device(self._device)  # for this thread: otherwise pinning opens a context on GPU 0
        return prepared.pinned()

    def finish(self, prepared: Batch) -> Batch:
        return prepared.to(self._device)
