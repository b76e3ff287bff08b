"""Checkpoints of one run. A checkpoint counts only once its marker is written.

<run>/checkpoints/step-00000200/engine/<files of every rank>
<run>/checkpoints/step-00000200/ema.safetensors   with `train.ema_decay`: averaged weights by parameter name, float32
<run>/checkpoints/step-00000200/history.json      the loss curve up to that step
<run>/checkpoints/step-00000200/COMPLETE.json     written last: run, step, ranks, stage, sizes and hashes
<run>/mlflow.json        the MLflow run that this training logs to, the same after every restart
<run>/unlogged/          grids of edits that MLflow did not take when they were drawn; the stage logs them at its end
<run>/origin.json        the checkpoint that `train.resume_from` started from
<run>/stopped.json       why the last attempt stopped, in one line
<run>/export/            the finished model; with `train.ema_keep_raw`, raw/ in it is one too
<run>/finished.json      written last: a finished run is not trained again, only exported
"""

import hashlib
import json
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pbe.errors import UserError
from pbe.store import Store, inner_path
from pbe.train.ranks import Ranks

MARKER = "COMPLETE.json"
UNLOGGED = "unlogged"
RAW = "raw"  # folder of the model with the last step's weights, in that with the averaged ones


class CheckpointError(UserError):
    """A checkpoint cannot be written or found; the message says what to do."""


@dataclass(frozen=True)
class Checkpoint:
    run: str  # name of its run
    step: int
    world: int
    zero_stage: int
    files: Mapping[str, tuple[int, str]]  # size in bytes and sha256, by path within the checkpoint's folder

    @property
    def path(self) -> str:
        return f"runs/{self.run}/checkpoints/step-{self.step:08d}"


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

    def finished(self, *, with_raw: bool = False) -> dict[str, Any] | None:
        """Return steps and loss of a finished run; None also if its model is gone, which its checkpoint gives again.

        with_raw: the model of `train.ema_keep_raw` must be there too.
        """
        models = ["export", f"export/{RAW}"] if with_raw else ["export"]
        there = all(self.store.exists(f"{self.folder}/{model}/pbe.json") for model in models)
        return self.read_json("finished.json") if there else None

    def checkpoints(self) -> list[Checkpoint]:
        """The complete checkpoints, oldest first. Raises CheckpointError if another run wrote one of them."""
        found = []
        for name in self.store.list_names(f"{self.folder}/checkpoints"):
            marker = self.read_json(f"checkpoints/{name}/{MARKER}")
            if marker is not None:
                if marker["run"] != self.name:
                    raise CheckpointError(
                        f"{self.store.full_uri(self.folder)}/checkpoints/{name}: written by run {marker['run']}, with "
                        "other settings, data or code; remove it, or set train.resume_from to resume from it"
                    )
                folder = f"{self.store.full_uri(self.folder)}/checkpoints/{name}"
                files = {str(inner_path(path, folder)): tuple(entry) for path, entry in marker["files"].items()}
                found.append(Checkpoint(self.name, marker["step"], marker["world"], marker["zero_stage"], files))
        return sorted(found, key=lambda checkpoint: checkpoint.step)

    def clear(self, step: int) -> None:
        """Delete the checkpoint of this step, or what an interrupted attempt left of it."""
        path = f"checkpoints/step-{step:08d}"
        self.store.delete_file(f"{self.folder}/{path}/{MARKER}")
        self.store.delete_tree(f"{self.folder}/{path}")

    def complete(self, checkpoint: Checkpoint, *, keep: int) -> None:
        """Mark a checkpoint, whose files are all written, as complete; then delete all but the newest `keep`."""
        self.write_json(f"checkpoints/step-{checkpoint.step:08d}/{MARKER}", vars(checkpoint))
        for old in self.checkpoints()[:-keep]:
            self.clear(old.step)


class Saver:
    """Writes the checkpoints of one run. All methods are collective; uploads run while training continues."""

    def __init__(self, run: Run, ranks: Ranks, *, zero_stage: int, keep: int, newest: int | None) -> None:
        """newest: step of the checkpoint that training resumed from."""
        self._run, self._ranks, self._zero_stage, self._keep = run, ranks, zero_stage, keep
        self.newest = newest
        self._pending: tuple[int, _Upload] | None = None

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Start a checkpoint: `write(folder)` writes this rank's files, and a thread uploads them.

        First waits for the previous checkpoint. Raises CheckpointError, and any error of `write`.
        """
        self.finish()
        if self._ranks.rank == 0:
            self._run.clear(step)
        self._ranks.barrier()
        path = f"{self._run.folder}/checkpoints/step-{step:08d}"
        folder = _staging_folder(self._run, self._ranks.rank)
        try:
            write(folder)
        except UserError:
            shutil.rmtree(folder, ignore_errors=True)  # frees disk space; earlier checkpoints stay as they are
            raise
        self._pending = step, _Upload(self._run.store, folder, path)

    def poll(self) -> None:
        """Mark the pending checkpoint complete if every rank has finished its upload; else return."""
        if self._pending is not None and self._ranks.all_true(self._pending[1].done()):
            self.finish()

    def finish(self) -> None:
        """Wait for the pending checkpoint and mark it complete. Raises CheckpointError if an upload failed."""
        if self._pending is None:
            return
        (step, upload), self._pending = self._pending, None
        self.newest = step
        files = {name: entry for part in self._ranks.all_gather(upload.finish()) for name, entry in part.items()}
        if self._ranks.rank == 0:
            found = Checkpoint(self._run.name, step, self._ranks.world, self._zero_stage, files)
            self._run.complete(found, keep=self._keep)
        self._ranks.barrier()  # no rank may continue, or exit, before the marker is written


class _Upload:
    """A thread that hashes one rank's files and moves or uploads them from its staging folder to the checkpoint."""

    def __init__(self, store: Store, local: Path, path: str) -> None:
        self._store, self._local, self._path = store, local, path
        self._files: dict[str, tuple[int, str]] = {}
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="pbe-upload")
        self._thread.start()

    def done(self) -> bool:
        return not self._thread.is_alive()

    def finish(self) -> dict[str, tuple[int, str]]:
        """Wait for the upload; returns size in bytes and sha256 by name. Raises CheckpointError if it failed."""
        self._thread.join()
        if self._error is not None:
            raise CheckpointError(f"{self._path}: cannot store the checkpoint: {self._error}") from self._error
        return self._files

    def _run(self) -> None:
        try:
            for file in sorted(path for path in self._local.rglob("*") if path.is_file()):
                name = file.relative_to(self._local).as_posix()
                self._files[name] = file.stat().st_size, _sha256(file)
                self._store.move_file_in(file, f"{self._path}/{name}")
            shutil.rmtree(self._local)
        except Exception as error:  # finish() raises it
            self._error = error


def _staging_folder(run: Run, rank: int) -> Path:
    """An empty folder for this rank alone. If the storage is local it is on the same disk, so that moving is free."""
    if not run.store.is_local:
        return Path(tempfile.mkdtemp(prefix="pbe-checkpoint-"))
    folder = Path(run.store.path(f"{run.folder}/staging/rank-{rank:04d}"))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def newest_whole(
    store: Store, candidates: Sequence[Checkpoint], ranks: Ranks, scratch: Path
) -> tuple[Checkpoint, Path] | None:
    """The first undamaged candidate, and a folder on this node that holds its files; None without candidates.

    Collective. The first rank of each node compares every file with the marker's size and hash, on a copy in its
    `scratch` if the storage is remote. Damaged checkpoints are reported and skipped. Raises CheckpointError if all are
    damaged.
    """
    damaged = []
    for candidate in ranks.all_gather(list(candidates))[0]:
        folder, problem = None, ""
        if ranks.leads_node:
            folder = _local_copy(store, candidate, scratch / f"step-{candidate.step}")
            problem = _damage(candidate, folder)
        reports = ranks.all_gather((ranks.node, folder, problem))
        problems = [text for _, _, text in reports if text]
        if not problems:
            return candidate, next(path for node, path, _ in reports if path is not None and node == ranks.node)
        damaged.append(f"{store.full_uri(candidate.path)}: {problems[0]}")
        if ranks.rank == 0:
            print(f"train: {damaged[-1]}; skipping this checkpoint", flush=True)
    if damaged:
        raise CheckpointError(
            f"every checkpoint is damaged: {'; '.join(damaged)}. Remove the run's folder to start again"
        )
    return None


def _local_copy(store: Store, checkpoint: Checkpoint, target: Path) -> Path:
    if store.is_local:
        return Path(store.path(checkpoint.path))
    store.copy_tree_out(checkpoint.path, target)
    return target


def _damage(checkpoint: Checkpoint, folder: Path) -> str:
    """Describe the damage to a checkpoint's files; empty if there is none."""

    def check(entry: tuple[str, tuple[int, str]]) -> str:
        name, (size, sha256) = entry
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        return "" if _sha256(file) == sha256 else f"{name} has the wrong sha256"

    with ThreadPoolExecutor(4) as pool:
        return next(filter(None, pool.map(check, checkpoint.files.items())), "")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
