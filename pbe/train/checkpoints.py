"""Checkpoints of one run: complete or absent.

<run>/checkpoints/step-00000200/<files of every rank>, COMPLETE.json     the marker is written last
<run>/mlflow.json        the MLflow run that this training logs to, through any number of restarts
<run>/export/            the finished model
<run>/finished.json      written last: a finished run is exported again, not trained again
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pbe.store import Store


@dataclass(frozen=True)
class Checkpoint:
    step: int
    world: int


class Run:
    """The folder of one training run, `runs/<variant>-<digest>` in the storage."""

    def __init__(self, store: Store, name: str) -> None:
        self.store = store
        self.name = name
        self.folder = f"runs/{name}"

    def read_json(self, name: str) -> dict[str, Any] | None:
        path = f"{self.folder}/{name}"
        return json.loads(self.store.read_bytes(path)) if self.store.exists(path) else None

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        self.store.write_bytes(f"{self.folder}/{name}", json.dumps(value, sort_keys=True).encode())

    def checkpoints(self) -> list[Checkpoint]:
        """Complete ones, oldest first."""
        found = []
        for name in self.store.list_names(f"{self.folder}/checkpoints"):
            marker = self.read_json(f"checkpoints/{name}/COMPLETE.json")
            if marker is not None:
                found.append(Checkpoint(marker["step"], marker["world"]))
        return sorted(found, key=lambda checkpoint: checkpoint.step)

    def upload(self, step: int, local: Path) -> None:
        """One rank's files; no marker yet."""
        self.store.copy_tree_in(local, self._checkpoint(step))

    def complete(self, step: int, *, world: int, keep: int) -> None:
        """Mark a checkpoint whose files are all there, then remove all but the newest `keep` complete ones."""
        self.write_json(
            f"checkpoints/{Path(self._checkpoint(step)).name}/COMPLETE.json", {"step": step, "world": world}
        )
        for old in self.checkpoints()[:-keep]:
            self.store.delete_tree(self._checkpoint(old.step))

    def download(self, checkpoint: Checkpoint, local: Path) -> None:
        self.store.copy_tree_out(self._checkpoint(checkpoint.step), local)

    def _checkpoint(self, step: int) -> str:
        return f"{self.folder}/checkpoints/step-{step:08d}"
