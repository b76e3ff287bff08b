"""`pbe gc`: find and remove parts and runs of the storage that no manifest refers to.

A manifest counts when it is in the working tree, in any dvc.lock of git's history (branches, tags, DVC's experiments)
or in DVC's run cache, from which `dvc repro` restores earlier results. What such a manifest names is kept: its
units, single parts in its config (a codec, a bench), and a train manifest's run and first weights. In a shared
storage, other repositories' parts look unreferenced from here.
"""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pbe.errors import UserError, one_line
from pbe.store import Store

# what pbe makes; other folders of a shared storage are left alone
PART_STAGES = (
    *("index", "ingest", "filter", "materialize", "encode", "bench", "edit", "features", "statistics", "evaluate"),
    *("embeddings", "weights"),
)
RUN_ENTRIES = ("checkpoints", "staging", "export", "history.json", "finished.json")


class GcError(UserError):
    """It is unknown what is still in use, because git or DVC failed; nothing is removed."""


@dataclass(frozen=True)
class Unused:
    """path: a folder below the storage root."""

    path: str
    files: int
    bytes: int
    age_s: float


def find_unused(
    store: Store, root: Path, *, older_than_s: float, run_cache: bool, forget_missing: bool
) -> list[Unused]:
    """Folders of parts/ and runs/ that nothing refers to and that were last written `older_than_s` ago or earlier.

    The age protects work in progress, whose manifest is not written yet. run_cache: keep what DVC's run cache could
    restore. forget_missing: ignore manifests that a dvc.lock names and DVC's cache lacks, instead of raising GcError.
    Raises GcError if git or DVC fails.
    """
    used = used_paths(manifests_in_use(root, run_cache=run_cache, forget_missing=forget_missing))
    out = []
    runs = [path for path in _folders(store, "runs", depth=1) if _is_run(store, path)]
    parts = [path for path in _folders(store, "parts", depth=2) if path.split("/")[1] in PART_STAGES]
    for path in [*parts, *runs]:
        if path not in used:
            size = store.folder_size(path)
            if size.age_s >= older_than_s:
                out.append(Unused(path, size.files, size.bytes, size.age_s))
    return out


def remove(store: Store, unused: list[Unused]) -> None:
    """Remove the folders, each record first, so that a half-removed part does not look complete."""
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


def manifests_in_use(root: Path, *, run_cache: bool, forget_missing: bool) -> list[dict[str, Any]]:
    """Manifests of the working tree, of git's history and, if asked, of DVC's run cache, each once. Raises GcError."""
    texts = {}
    own = set()
    for path in sorted((root / "data").rglob("manifest.json")):
        data = path.read_bytes()
        own.add(hashlib.md5(data, usedforsecurity=False).hexdigest())
        texts[data] = path
    cache = Path(_run(root, sys.executable, "-m", "dvc", "cache", "dir").strip())
    locked = _locked_manifests(root)
    known = locked | _restorable_manifests(cache) if run_cache else locked
    files = {md5: cache / "files" / "md5" / md5[:2] / md5[2:] for md5 in known}
    missing = sorted(md5 for md5 in locked - own if not files[md5].is_file())
    if missing and not forget_missing:
        raise GcError(
            f"{len(missing)} manifests that a dvc.lock of this repository names are not in DVC's cache, so nothing is "
            "removed: `dvc fetch --all-commits` gets them from a remote; `pbe gc --forget-missing` takes what only "
            "they name as unused"
        )
    for path in files.values():
        if path.is_file():
            texts[path.read_bytes()] = path
    return [_parsed(text, path) for text, path in texts.items()]


def _parsed(text: bytes, path: Path) -> dict[str, Any]:
    try:
        return json.loads(text)
    except ValueError as error:
        raise GcError(f"{path}: not a manifest ({error}), so nothing is removed; run its stage again") from None


def _locked_manifests(root: Path) -> set[str]:
    """md5 of every manifest.json that a dvc.lock of any commit, or the one in the working tree, names."""
    locks = {}
    if (root / "dvc.lock").is_file():
        locks["dvc.lock"] = (root / "dvc.lock").read_bytes()
    # --full-history: also merged branches whose dvc.lock was dropped
    for commit in _run(root, "git", "log", "--all", "--full-history", "--format=%H", "--", "dvc.lock").split():
        shown = subprocess.run(["git", "show", f"{commit}:./dvc.lock"], cwd=root, capture_output=True)
        if shown.returncode == 0:  # the commit that removes it has none
            locks[f"dvc.lock of commit {commit[:10]}"] = shown.stdout
    hashes = set()
    for name, text in locks.items():
        try:
            stages = (yaml.safe_load(text) or {}).get("stages") or {}
            hashes |= {md5 for stage in stages.values() for md5 in _manifest_outs(stage)}
        except (yaml.YAMLError, AttributeError, TypeError) as error:
            reason = one_line(error, 200)
            raise GcError(f"{name}: not a lock file of DVC ({reason}), so nothing is removed; fix it") from None
    return hashes


def _restorable_manifests(cache: Path) -> set[str]:
    """md5 of every manifest.json in DVC's run cache. Unreadable entries are skipped: DVC cannot use them either."""
    hashes = set()
    for path in (cache / "runs").glob("*/*/*"):
        try:
            hashes |= set(_manifest_outs(yaml.safe_load(path.read_bytes())))
        except (yaml.YAMLError, AttributeError, TypeError):
            continue
    return hashes


def _manifest_outs(stage: dict[str, Any]) -> Iterator[str]:
    for out in stage.get("outs") or ():
        if str(out.get("path", "")).endswith("manifest.json") and "md5" in out:
            yield str(out["md5"])


def _is_run(store: Store, path: str) -> bool:
    return any(name in RUN_ENTRIES for name in store.list_names(path))


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
            f"`{name} {' '.join(command[1:])}` failed, so nothing is removed: {' '.join(detail.split())}"
        ) from None
