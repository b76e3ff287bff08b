"""Adds the command that fixes an error: pbe/store.py names the part or manifest at fault but does not know stages."""

from pathlib import Path

from pbe.errors import UserError
from pbe.store import ManifestError, PartError

STAGE_OF_KIND = {"index": "ingest", "features": "evaluate", "edit": "edit@VARIANT (or baseline@NAME)"}  # else: kind


def with_cure(error: UserError) -> str:
    """Return the error's message and, if one helps, the command to run."""
    if isinstance(error, PartError):
        return f"{error}{';' if error.damage is None else ', then'} {made_again(error.kind)}"
    if isinstance(error, ManifestError):
        stage = _stage_of(error.path)
        if error.damage is None:
            return f"{error}; run `dvc repro {stage}` first"
        return f"{error}; `dvc repro -f -s {stage}` writes it"
    return str(error)


def made_again(kind: str) -> str:
    """Return the advice for a missing part of `kind`: DVC tracks manifests and does not notice missing parts."""
    return f"`dvc repro -f -s {STAGE_OF_KIND.get(kind, kind)}` makes it again"


def _stage_of(manifest: Path) -> str:
    """Return the DVC target of a manifest in data/<stage>/ or data/<stage>/<variant>/."""
    folder = manifest.parent
    return folder.name if folder.parent.name in ("data", "") else f"{folder.parent.name}@{folder.name}"
