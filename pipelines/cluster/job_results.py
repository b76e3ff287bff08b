"""Fetch the results that a job left in the storage, below jobs/<job id>/: all or nothing.

Needs no cluster, which may be gone by then.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pbe.store import StoreError
from pipelines.cluster.job_entry import files_below, sha256_of
from pipelines.cluster.working_dir import reads_outside
from pipelines.runtime.stage import Stage


def take_over_finished(stage: Stage, name: str) -> str | None:
    """Fetch the outputs of a finished job of this name and return its id.

    Returns None if there is no such job, or if its results are missing or may be outdated.
    """
    if stage.name == "ingest" or reads_outside(stage):
        return None  # new photos or other weights there do not change the job's name
    for attempt in sorted(attempts_in_storage(stage, name), reverse=True):
        job_id = f"{name}-{attempt}"
        manifest = _sent_manifest(stage, job_id)
        if manifest is not None and _has_results(stage, manifest) and fetch(stage, job_id):
            return job_id
    return None


def _sent_manifest(stage: Stage, job_id: str) -> dict[str, Any] | None:
    """Return the intact manifest that a job has sent, or None if it is missing or damaged."""
    path = f"jobs/{job_id}/outputs/manifest.json"
    listed = _listed(stage, job_id)
    if listed is None or not stage.store.exists(path):
        return None
    data = stage.store.read_bytes(path)
    return json.loads(data) if hashlib.sha256(data).hexdigest() == listed.get("manifest.json") else None


def _listed(stage: Stage, job_id: str) -> dict[str, str] | None:
    """Return the files that a job has sent, with their SHA-256, or None if they are incomplete or that is unknown."""
    marker = f"jobs/{job_id}/outputs.json"
    if not stage.store.exists(marker):
        return None
    try:
        listed = json.loads(stage.store.read_bytes(marker))["files"]
    except (ValueError, TypeError, KeyError):
        return None
    return listed if isinstance(listed, dict) else None


def attempts_in_storage(stage: Stage, name: str) -> list[int]:
    """Return the attempt numbers of this name's jobs that left files in the storage."""
    numbers = (folder.removeprefix(f"{name}-") for folder in stage.store.list_names("jobs") if folder.startswith(name))
    return [int(number) for number in numbers if number.isdigit()]


def _has_results(stage: Stage, manifest: dict[str, Any]) -> bool:
    """Return whether the storage has everything that a manifest names: units, single parts, a model's export."""
    parts = [*_part_paths(manifest.get("config")), *_export_paths(manifest)]
    units = [(_made_by(unit, stage.name), unit["unit"]) for unit in manifest.get("units", ())]
    return all(stage.store.exists(path) for path in parts) and all(stage.store.find_units(units))


def _made_by(unit: dict[str, Any], stage: str) -> str:
    """Return the kind of a unit's parts, read from its files' path, parts/<kind>/<unit>/... (evaluate has features)."""
    return next((file["path"].split("/")[1] for file in unit.get("files", ())), stage)


def _part_paths(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from _part_paths(inner)
    elif isinstance(value, str) and value.startswith("parts/"):
        yield value


def _export_paths(manifest: dict[str, Any]) -> list[str]:
    return [f"runs/{manifest['run']}/export/{name}" for name in manifest.get("export", ())]


def fetch(stage: Stage, job_id: str) -> bool:
    """Bring a job's outputs to `stage.outputs`, all or nothing; False when they are not in the storage.

    Raises StoreError if the storage's files differ from those the job listed.
    """
    listed = _listed(stage, job_id)
    if not listed:
        return False
    stage.outputs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".job-", dir=stage.outputs.parent) as folder:
        beside = Path(folder)
        stage.store.copy_tree_out(f"jobs/{job_id}/outputs", beside)
        found = {path: sha256_of(beside / path) for path in files_below(beside)}
        if any(found.get(path) != sha256 for path, sha256 in listed.items()):
            raise StoreError(
                f"{stage.store.full_uri(f'jobs/{job_id}/outputs.json')}: lists files that are missing or differ; "
                f"delete jobs/{job_id} there and run again"
            )
        # the manifest last: a stage whose manifest is there is done
        for path in sorted(listed, key=lambda path: path == "manifest.json"):
            (stage.outputs / path).parent.mkdir(parents=True, exist_ok=True)
            (beside / path).replace(stage.outputs / path)
    return True
