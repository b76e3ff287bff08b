"""The command that cures an error: pbe/store.py says which part or manifest is at fault, and knows no stages."""

from pathlib import Path

from pbe.errors import UserError
from pbe.store import ManifestError, PartError

STAGE_OF_KIND = {"index": "ingest", "features": "evaluate", "edit": "edit@VARIANT (or baseline@NAME)"}  # else the kind


def with_cure(error: UserError) -> str:
    """The error's message and, where there is one, the command to run."""
    if isinstance(error, PartError):
        return f"{error}{';' if error.damage is None else ', then'} {made_again(error.kind)}"
    if isinstance(error, ManifestError):
        stage = _stage_of(error.path)
        if error.damage is None:
            return f"{error}; run `dvc repro {stage}` first"
        return f"{error}; `dvc repro -f -s {stage}` writes it"
    return str(error)


def made_again(kind: str) -> str:
    """How to get a part of `kind` back: DVC, which watches manifests, does not see that it is gone."""
    return f"`dvc repro -f -s {STAGE_OF_KIND.get(kind, kind)}` makes it again"


def _stage_of(manifest: Path) -> str:
    """As `dvc repro` names it: data/<stage>/ or data/<stage>/<variant>/."""
    folder = manifest.parent
    return folder.name if folder.parent.name in ("data", "") else f"{folder.parent.name}@{folder.name}"
