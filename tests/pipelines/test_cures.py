"""An error of the library ends, in one line, with the command that cures it."""

from pathlib import Path

import pytest

from pbe.store import ManifestError, PartError, StoreError
from pipelines.runtime.cures import with_cure


@pytest.mark.parametrize(
    ("kind", "stage"),
    [
        ("encode", "encode"),
        ("index", "ingest"),
        ("features", "evaluate"),
        ("edit", "edit@VARIANT (or baseline@NAME)"),
        ("runs", "train@VARIANT"),
    ],
)
def test_a_part_is_made_again_by_its_stage(kind: str, stage: str) -> None:
    again = f"`dvc repro -f -s {stage}` makes it again"
    assert with_cure(PartError("a/d.parquet", kind, None)) == f"a/d.parquet: this part is gone; {again}"
    damaged = "a/d.parquet: this part cannot be read (no footer); if it is damaged, delete its folder, then "
    assert with_cure(PartError("a/d.parquet", kind, "no footer")) == damaged + again


@pytest.mark.parametrize(
    ("folder", "stage"), [("data/ingest", "ingest"), ("/p/data/edit/full", "edit@full"), ("/p/data/bench", "bench")]
)
def test_a_manifest_is_written_by_its_stage(folder: str, stage: str) -> None:
    path = Path(folder) / "manifest.json"
    assert with_cure(ManifestError(path, None)) == f"{path}: not there; run `dvc repro {stage}` first"
    damaged = f"{path}: not a manifest (KeyError 'units'); `dvc repro -f -s {stage}` writes it"
    assert with_cure(ManifestError(path, "KeyError 'units'")) == damaged


def test_any_other_error_has_said_it_all() -> None:
    assert with_cure(StoreError("the disk is full")) == "the disk is full"
