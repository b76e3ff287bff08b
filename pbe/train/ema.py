"""An exponential moving average of the weights: float32, and partitioned over the ranks like the master weights.

    mean <- decay_n * mean + (1 - decay_n) * weights,  decay_n = min(decay, (1 + n) / (10 + n)),  n = 1, 2, ...

after every optimizer step, without communication: 4 bytes per parameter, divided by the ranks at ZeRO 1 to 3. The
formula of decay_n is that of TensorFlow's ExponentialMovingAverage and of ldm/modules/ema.py, which upstream has and
turns off. At decay 0 the mean is the weights.

DeepSpeed's converter to another number of ranks knows only masters and moments, so a checkpoint holds the mean by
parameter name instead, whole: to write it rank 0 needs 4 bytes per parameter on the CPU, as for the export.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pbe.train.checkpoints import CheckpointError
from pbe.train.engine import full_parameters, masters_of, refresh_weights, set_full_parameters

FILE = "ema.safetensors"


class Ema:
    """Begins as a copy of the engine's weights."""

    def __init__(self, engine: Any, decay: float) -> None:
        self._engine, self._decay, self._updates = engine, decay, 0
        self._means = [master.detach().clone() for master in masters_of(engine)]

    @torch.no_grad()
    def update(self) -> None:
        """Call after every optimizer step."""
        self._updates += 1
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        for mean, master in zip(self._means, masters_of(self._engine), strict=True):
            mean.lerp_(master, 1 - decay)

    @contextmanager
    def as_masters(self) -> Iterator[None]:
        """Within the block the masters are the mean, so that `full_parameters` gives it.

        Meanwhile one partition at a time is held twice. An error within the block ends training: nothing is put back.
        """
        self._exchange()
        yield
        self._exchange()

    @contextmanager
    def in_network(self) -> Iterator[None]:
        """Within the block the network computes with the mean; after it with exactly what it had. Collective."""
        with self.as_masters():
            refresh_weights(self._engine)
            yield
        refresh_weights(self._engine)

    def save(self, folder: Path, *, rank: int) -> None:
        """Rank 0 writes the mean to `folder`. Collective. Raises CheckpointError."""
        with self.as_masters():
            means = full_parameters(self._engine)
        if rank == 0:
            plain = {name: mean.contiguous() for name, mean in means.items()}
            try:
                save_file(plain, folder / FILE, metadata={"updates": str(self._updates)})
            except (OSError, SafetensorError) as error:  # a full disk is a SafetensorError
                raise CheckpointError(f"{folder}: cannot write the checkpoint: {error}") from error

    def load(self, folder: Path) -> bool:
        """Take the mean from a checkpoint's folder, which every rank reads; return whether it has one.

        Call before the first update.
        """
        if not (folder / FILE).is_file():
            return False
        with safe_open(folder / FILE, framework="pt") as stored:
            self._updates = int(stored.metadata()["updates"])
            set_full_parameters(self._engine, stored.get_tensor)
        self._exchange()  # the means were a copy of the masters, and these now hold the file's
        return True

    @torch.no_grad()
    def _exchange(self) -> None:
        for mean, master in zip(self._means, masters_of(self._engine), strict=True):
            held = master.clone()
            master.copy_(mean)
            mean.copy_(held)
