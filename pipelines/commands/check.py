"""check: settings, photos, boxes, the repository and MLflow, before DVC reads them and before an hour of work; `make
repro` runs it first.

Also removes a lock file that a killed DVC left half written; DVC would refuse to start.
"""

import json
import os
import time
from pathlib import Path

from pbe.config import load_params
from pbe.data.files import FileInfo, FileTree, SourceError, file_tree, named
from pbe.data.sources import HUGE_BYTES, IMAGE_SUFFIXES
from pbe.doctor import repository, tracking
from pbe.errors import UserError
from pbe.places import repo_root

TORN_AFTER_S = 2.0  # writing a lock takes far less


def main() -> None:
    """Raise ParamsError for invalid settings, SourceError for missing or unreadable photos and boxes, TrackError for an
    MLflow that takes no runs, UserError where DVC cannot run."""
    root, ingest = repo_root(), load_params().ingest
    most_bytes = max(HUGE_BYTES, ingest.max_image_bytes)
    for location, key in ((ingest.images, "ingest.images"), (ingest.boxes, "ingest.boxes")):
        tree = file_tree(location, key=key)
        if tree.is_local:
            tree.require()
            _refuse_what_dvc_cannot_read(tree, root, most_bytes)
    _remove_torn_lock(root / ".dvc" / "tmp" / "rwlock")
    for finding in (*repository(root), *tracking()):
        if finding.level == "fail":
            raise UserError(f"{finding.check}: {finding.found}. {finding.advice}")
        if finding.level == "warn":
            print(f"pbe: {finding}")


def _refuse_what_dvc_cannot_read(tree: FileTree, root: Path, most_bytes: int) -> None:
    """Raise SourceError for what DVC cannot hash, or not in a lifetime; it would name neither the file nor the key."""
    key, place = tree.key, Path(tree.where)
    if place == root or place == root / "data" or root / "data" in place.parents or place in root.parents:
        raise SourceError(f"{key} = {place}: the stages write there (data/); put your photos and boxes elsewhere")
    files = tree.walk() if tree.is_folder else [FileInfo("", place.stat().st_size, "")]
    refused = []
    for file in files:
        path = place / file.name
        if not os.access(path, os.R_OK):
            refused.append(f"{path} (no permission to read it)")
        elif file.size > most_bytes and (path.suffix.lower() in IMAGE_SUFFIXES or _is_sparse(path)):
            refused.append(f"{path} ({file.size / 1e9:,.0f} GB, which DVC would read)")
    if refused:
        raise SourceError(f"{key}: {named(refused)}; make them readable, or move them out of the way")


def _is_sparse(path: Path) -> bool:
    """Whether a file takes hardly any space on the disk."""
    info = path.stat()
    return 512 * info.st_blocks < info.st_size / 10


def _remove_torn_lock(path: Path) -> None:
    deadline = time.monotonic() + TORN_AFTER_S
    while _is_torn(path):
        if time.monotonic() > deadline:
            path.unlink(missing_ok=True)
            print(f"pbe: removed {path}, left half-written by a killed DVC")
            return
        time.sleep(0.1)


def _is_torn(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except FileNotFoundError:
        return False
    except ValueError:
        return True
    return False
