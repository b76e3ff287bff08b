"""Checkpoints of one run: complete or absent.

<run>/checkpoints/step-00000200/engine/<files of every rank>
<run>/checkpoints/step-00000200/history.json      the loss curve up to there
<run>/checkpoints/step-00000200/COMPLETE.json     written last: run, step, ranks, stage, sizes and hashes
<run>/mlflow.json        the MLflow run that this training logs to, through any number of restarts
<run>/origin.json        the checkpoint that `train.resume_from` began with
<run>/stopped.json       why the last attempt stopped, in one line
<run>/export/            the finished model
<run>/finished.json      written last: a finished run is exported again, not trained again
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
from pbe.store import Store
from pbe.train.ranks import Ranks

MARKER = "COMPLETE.json"


class CheckpointError(UserError):
    """A checkpoint cannot be written or found; the message says what to do."""


@dataclass(frozen=True)
class Checkpoint:
    run: str  # name of the run that it belongs to
    step: int
    world: int
    zero_stage: int
    files: Mapping[str, tuple[int, str]]  # bytes and sha256 by path below its folder

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

    def checkpoints(self) -> list[Checkpoint]:
        """Those with a marker, oldest first. Raises CheckpointError for one that another run has written."""
        found = []
        for name in self.store.list_names(f"{self.folder}/checkpoints"):
            marker = self.read_json(f"checkpoints/{name}/{MARKER}")
            if marker is not None:
                if marker["run"] != self.name:
                    raise CheckpointError(
                        f"{self.store.full_uri(self.folder)}/checkpoints/{name}: written by run {marker['run']}, under "
                        "other settings, data or code; remove it, and to go on from it set train.resume_from"
                    )
                files = {path: (size, sha256) for path, (size, sha256) in marker["files"].items()}
                found.append(Checkpoint(self.name, marker["step"], marker["world"], marker["zero_stage"], files))
        return sorted(found, key=lambda checkpoint: checkpoint.step)

    def clear(self, step: int) -> None:
        """Make room for a checkpoint of this step: what an earlier attempt left must not mix with it."""
        path = f"checkpoints/step-{step:08d}"
        self.store.delete_file(f"{self.folder}/{path}/{MARKER}")
        self.store.delete_tree(f"{self.folder}/{path}")

    def complete(self, checkpoint: Checkpoint, *, keep: int) -> None:
        """Mark a checkpoint whose files are all there, then remove all but the newest `keep` complete ones."""
        self.write_json(f"checkpoints/step-{checkpoint.step:08d}/{MARKER}", vars(checkpoint))
        for old in self.checkpoints()[:-keep]:
            self.clear(old.step)


class Saver:
    """Writes checkpoints of one run, collectively; files go to a remote storage while training goes on."""

    def __init__(self, run: Run, ranks: Ranks, *, zero_stage: int, keep: int, newest: int | None) -> None:
        """newest: step of the checkpoint that training went on from."""
        self._run, self._ranks, self._zero_stage, self._keep = run, ranks, zero_stage, keep
        self.newest = newest
        self._pending: tuple[int, _Upload] | None = None

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """`write` puts this rank's files into the folder that it is given. Raises what it raises, CheckpointError."""
        self.finish()
        if self._ranks.rank == 0:
            self._run.clear(step)
        self._ranks.barrier()
        path = f"{self._run.folder}/checkpoints/step-{step:08d}"
        folder = _staging_folder(self._run, self._ranks.rank)
        try:
            write(folder)
        except UserError:
            shutil.rmtree(folder, ignore_errors=True)  # makes room again; the checkpoint before is not touched
            raise
        self._pending = step, _Upload(self._run.store, folder, path)

    def poll(self) -> None:
        """Collective: completes the checkpoint on its way as soon as every rank's files are there."""
        if self._pending is not None and self._ranks.all_true(self._pending[1].done()):
            self.finish()

    def finish(self) -> None:
        """Collective: waits for the checkpoint on its way, then marks it complete. Raises CheckpointError."""
        if self._pending is None:
            return
        (step, upload), self._pending = self._pending, None
        self.newest = step
        files = {name: entry for part in self._ranks.all_gather(upload.finish()) for name, entry in part.items()}
        if self._ranks.rank == 0:
            found = Checkpoint(self._run.name, step, self._ranks.world, self._zero_stage, files)
            self._run.complete(found, keep=self._keep)
        self._ranks.barrier()  # no rank goes on, and perhaps ends, before the marker is there


class _Upload:
    """One rank's files on their way from its staging folder into the checkpoint's: hashed, then moved or sent."""

    def __init__(self, store: Store, local: Path, path: str) -> None:
        self._store, self._local, self._path = store, local, path
        self._files: dict[str, tuple[int, str]] = {}
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="pbe-upload")
        self._thread.start()

    def done(self) -> bool:
        return not self._thread.is_alive()

    def finish(self) -> dict[str, tuple[int, str]]:
        """Bytes and sha256 by name, once all are there. Raises CheckpointError."""
        self._thread.join()
        if self._error is not None:
            raise CheckpointError(f"{self._path}: the checkpoint cannot be stored: {self._error}") from self._error
        return self._files

    def _run(self) -> None:
        try:
            for file in sorted(path for path in self._local.rglob("*") if path.is_file()):
                name = file.relative_to(self._local).as_posix()
                self._files[name] = file.stat().st_size, _sha256(file)
                self._store.move_file_in(file, f"{self._path}/{name}")
            shutil.rmtree(self._local)
        except Exception as error:  # raised in finish(), by the rank that waits for it
            self._error = error


def _staging_folder(run: Run, rank: int) -> Path:
    """An empty folder that this rank alone writes to, on the storage's own disk where that is local: moving is free."""
    if not run.store.is_local:
        return Path(tempfile.mkdtemp(prefix="pbe-checkpoint-"))
    folder = Path(run.store.path(f"{run.folder}/staging/rank-{rank:04d}"))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def newest_whole(
    store: Store, candidates: Sequence[Checkpoint], ranks: Ranks, scratch: Path
) -> tuple[Checkpoint, Path] | None:
    """The first of the candidates whose files are what its marker says, and a folder of this node that holds them.

    Collective. A damaged one is named and passed over. Once per node, the node's first rank compares every hash, on a
    copy in its `scratch` where the storage is remote. None without candidates. Raises CheckpointError when there are
    some and none is whole.
    """
    damaged = []
    for candidate in ranks.all_gather(list(candidates))[0]:
        folder, problem = None, ""
        if ranks.leads_node:
            folder = _local_copy(store, candidate, scratch / f"step-{candidate.step}")
            problem = _damage(candidate, folder)
        said = ranks.all_gather((ranks.node, folder, problem))
        problems = [text for _, _, text in said if text]
        if not problems:
            return candidate, next(path for node, path, _ in said if path is not None and node == ranks.node)
        damaged.append(f"{store.full_uri(candidate.path)}: {problems[0]}")
        if ranks.rank == 0:
            print(f"train: {damaged[-1]}; it is passed over for the one before", flush=True)
    if damaged:
        raise CheckpointError(f"no checkpoint is whole: {'; '.join(damaged)}. Remove the run's folder to start again")
    return None


def _local_copy(store: Store, checkpoint: Checkpoint, target: Path) -> Path:
    if store.is_local:
        return Path(store.path(checkpoint.path))
    store.copy_tree_out(checkpoint.path, target)
    return target


def _damage(checkpoint: Checkpoint, folder: Path) -> str:
    """What is wrong with a checkpoint's files; empty when nothing is."""

    def look(entry: tuple[str, tuple[int, str]]) -> str:
        name, (size, sha256) = entry
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} of {size} bytes"
        return "" if _sha256(file) == sha256 else f"{name} is not what was written"

    with ThreadPoolExecutor(4) as pool:
        return next(filter(None, pool.map(look, checkpoint.files.items())), "")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
