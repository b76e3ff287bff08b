"""`pbe gc`: which parts and runs of the storage no manifest refers to, and their removal.

A manifest counts when it is in the working tree, or is an output in any dvc.lock of git's history (branches, tags,
DVC's experiments) and still in DVC's cache. What such a manifest names stays: its units, single parts in its config
(a codec, a bench), and a train manifest's run. Storage may be shared: other repositories' parts look unreferenced
from here.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pbe.errors import UserError
from pbe.store import Store


class GcError(UserError):
    """git or DVC could not say what is still in use; nothing is removed."""


@dataclass(frozen=True)
class Unused:
    """path: a folder below the storage root."""

    path: str
    files: int
    bytes: int
    age_s: float


def find_unused(store: Store, root: Path, *, older_than_s: float) -> list[Unused]:
    """Folders of parts/ and runs/ that nothing refers to and that were last written `older_than_s` ago or earlier.

    The age protects work in progress, whose manifest is not written yet. Raises GcError.
    """
    used = used_paths(manifests_in_use(root))
    out = []
    for path in [*_folders(store, "parts", depth=2), *_folders(store, "runs", depth=1)]:
        if path not in used:
            size = store.folder_size(path)
            if size.age_s >= older_than_s:
                out.append(Unused(path, size.files, size.bytes, size.age_s))
    return out


def remove(store: Store, unused: list[Unused]) -> None:
    """Records go first: a part that is half removed must not look complete."""
    for entry in unused:
        store.delete_unit(entry.path)


def used_paths(manifests: list[dict[str, Any]]) -> set[str]:
    """parts/<stage>/<unit> and runs/<run> that the manifests name."""
    out: set[str] = set()
    for manifest in manifests:
        if "run" in manifest and "export" in manifest:
            out.add(f"runs/{manifest['run']}")
        for text in _strings(manifest):
            if text.startswith(("parts/", "runs/")):
                out.add("/".join(text.split("/")[: 3 if text.startswith("parts/") else 2]))
    return out


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def manifests_in_use(root: Path) -> list[dict[str, Any]]:
    """Manifests of the working tree and of git's history, each once. Raises GcError."""
    texts = {}
    for path in sorted((root / "data").rglob("manifest.json")):
        texts[path.read_text()] = path
    cache = Path(_run(root, sys.executable, "-m", "dvc", "cache", "dir").strip())
    for md5 in sorted(_manifest_hashes(root)):
        path = cache / "files" / "md5" / md5[:2] / md5[2:]
        if path.is_file():
            texts[path.read_text()] = path
    return [_parsed(text, path) for text, path in texts.items()]


def _parsed(text: str, path: Path) -> dict[str, Any]:
    try:
        return json.loads(text)
    except ValueError as error:
        raise GcError(f"{path}: not a manifest ({error}), so nothing is removed; run its stage again") from None


def _manifest_hashes(root: Path) -> set[str]:
    """md5 of every manifest.json that a dvc.lock of any commit, or the one in the working tree, names."""
    locks = []
    if (root / "dvc.lock").is_file():
        locks.append((root / "dvc.lock").read_text())
    # --full-history: also a side of a merge whose dvc.lock did not survive it
    for commit in _run(root, "git", "log", "--all", "--full-history", "--format=%H", "--", "dvc.lock").split():
        shown = subprocess.run(["git", "show", f"{commit}:./dvc.lock"], cwd=root, capture_output=True, text=True)
        if shown.returncode == 0:  # the commit that removes it has none
            locks.append(shown.stdout)
    hashes = set()
    for text in locks:
        for stage in ((yaml.safe_load(text) or {}).get("stages") or {}).values():
            for out in stage.get("outs", ()):
                if str(out.get("path", "")).endswith("manifest.json") and "md5" in out:
                    hashes.add(str(out["md5"]))
    return hashes


def _folders(store: Store, relative: str, *, depth: int) -> list[str]:
    paths = [relative]
    for _ in range(depth):
        paths = [f"{path}/{name}" for path in paths for name in store.list_folders(path)]
    return paths


def _run(root: Path, *command: str) -> str:
    try:
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", "") or str(error)
        name = Path(command[0]).name
        raise GcError(
            f"`{name} {' '.join(command[1:])}` failed: nothing is removed: {' '.join(detail.split())}"
        ) from None
