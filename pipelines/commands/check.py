"""check: validate settings, photos and boxes before DVC reads them, with clear messages; `make repro` runs it first.

Also removes a lock file that a killed DVC left half written; DVC would refuse to start.
"""

import json
import os
import time
from pathlib import Path

from pbe.config import load_params
from pbe.data.files import SourceError, file_tree
from pbe.places import repo_root

TORN_AFTER_S = 2.0  # writing a lock takes far less


def main() -> None:
    """Raise ParamsError for invalid settings, SourceError for missing or unreadable photos and boxes."""
    root, ingest = repo_root(), load_params().ingest
    for location, key in ((ingest.images, "ingest.images"), (ingest.boxes, "ingest.boxes")):
        tree = file_tree(location, key=key)
        if tree.is_local:
            tree.require()
            _refuse_what_dvc_cannot_read(Path(tree.where), root, key)
    _remove_torn_lock(root / ".dvc" / "tmp" / "rwlock")


def _refuse_what_dvc_cannot_read(place: Path, root: Path, key: str) -> None:
    """Raise SourceError for what DVC cannot hash; its own message would name neither the file nor the key."""
    if place == root or place == root / "data" or root / "data" in place.parents or place in root.parents:
        raise SourceError(f"{key} = {place}: the stages write there (data/); put your photos and boxes elsewhere")
    for path in place.rglob("*") if place.is_dir() else [place]:
        try:
            str(path).encode()
        except UnicodeEncodeError:  # bytes in another encoding
            shown = os.fsencode(path).decode(errors="backslashreplace")
            raise SourceError(f"{key}: {shown}: the name is not UTF-8; rename the file") from None
        if not path.exists():
            raise SourceError(f"{key}: {path}: a broken link; remove it")
        if not os.access(path, os.R_OK):
            raise SourceError(f"{key}: {path}: no permission to read it")


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
