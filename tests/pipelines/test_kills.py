"""Drill: stages killed with SIGKILL, driver and workers, at random moments; what comes out never differs."""

import contextlib
import csv
import hashlib
import json
import random
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.pipelines.project import Project, kill_tree

pytest.importorskip("skimage", reason="needs the sample extra")
KILLS = 100
BUDGET_S = 3300  # of the kills; the chain before them takes some minutes
STAGES = (  # report makes no parts, and its page names dvc.lock, which each of these stages writes anew
    "ingest", "filter", "materialize", "encode", "train@full", "bench",
    "edit@full", "baseline@poisson", "evaluate", "sweep",
)  # fmt: skip
CURVE = ("step", "samples_seen", "loss", "validation_loss", "lr", "grad_norm")


def _lock(project: Project) -> dict[str, Any]:
    return yaml.safe_load((project.folder / "dvc.lock").read_text())


def _outputs(project: Project, stage: str) -> list[Path]:
    return [project.folder / out["path"] for out in _lock(project)["stages"][stage]["outs"]]


def _left(project: Project, stage: str) -> dict[str, str]:
    """SHA-256 of every file the stage has left, whose manifest names its parts by theirs."""
    files = [file for out in _outputs(project, stage) for file in ([out] if out.is_file() else sorted(out.rglob("*")))]
    return {str(file): hashlib.sha256(_untimed(file)).hexdigest() for file in files if file.is_file()}


def _untimed(file: Path) -> bytes:
    """The file's bytes; of the table of losses without the columns that say how long a step took."""
    if file.name != "loss.csv":
        return file.read_bytes()
    with file.open(newline="") as stream:
        return repr([[row[name] for name in CURVE] for row in csv.DictReader(stream)]).encode()


def _parts(project: Project, stage: str) -> set[Path]:
    """Folders of the stage's parts, or of its run."""
    store, (name, _, variant) = project.folder / ".store", stage.partition("@")
    folder = project.folder / "data" / ("edit" if name == "baseline" else name) / variant
    manifest = json.loads((folder / "manifest.json").read_text())
    if name == "train":
        return {store / "runs" / manifest["run"]}
    return {(store / file["path"]).parent for unit in manifest["units"] for file in unit["files"]}


def _forget(project: Project, stage: str, parts: set[Path]) -> None:
    """Remove what the stage has left: its parts (and the index's, for ingest), its outputs, and DVC's memory of it."""
    if stage.startswith("train"):  # but for the name of its MLflow run, which goes on and is part of the manifest
        parts = {inner for run in parts for inner in run.iterdir() if inner.name != "mlflow.json"}
    for folder in {*parts, *_outputs(project, stage), project.folder / ".dvc" / "cache" / "runs"}:
        if folder.is_dir():
            shutil.rmtree(folder)
        else:
            folder.unlink(missing_ok=True)
    if stage == "ingest":
        shutil.rmtree(project.folder / ".store" / "parts" / "index", ignore_errors=True)
    lock = _lock(project)
    del lock["stages"][stage]
    (project.folder / "dvc.lock").write_text(yaml.safe_dump(lock))


def _times(parts: set[Path]) -> dict[Path, int]:
    """Modification time in ns of every file of the parts that have their record: those are finished."""
    finished = [folder for folder in parts if (folder / "record.json").is_file()]
    return {path: path.stat().st_mtime_ns for folder in finished for path in folder.iterdir()}


@pytest.mark.drill
@pytest.mark.timeout(BUDGET_S + 2400)
def test_killed_at_random_moments_every_output_is_the_same_and_finished_parts_stay(changeable: Project) -> None:
    project, draw, kills = changeable, random.Random(23), []
    straight = {stage: _left(project, stage) for stage in STAGES}
    parts = {stage: _parts(project, stage) for stage in STAGES}
    seconds: dict[str, float] = {}
    started = time.monotonic()
    for number in range(KILLS + len(STAGES)):
        stage = STAGES[number % len(STAGES)]
        _forget(project, stage, parts[stage])
        since = time.monotonic()
        if stage in seconds:  # the first time it runs undisturbed
            moment_s = draw.uniform(0, seconds[stage])
            process = project.start("dvc", "repro", "-s", stage)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=moment_s)
            if process.poll() is None:
                kill_tree(process)
                kills.append((stage, round(moment_s, 1), len(_times(parts[stage]))))
                print("killed", *kills[-1], flush=True)
        before = _times(parts[stage])
        project.run("pipelines", "check")  # as `make repro` does: DVC may have been killed while it wrote its lock
        project.run("dvc", "repro", "-s", stage)
        seconds.setdefault(stage, time.monotonic() - since)
        assert _left(project, stage) == straight[stage], (stage, kills[-1:])
        assert _times(parts[stage]).items() >= before.items(), (stage, kills[-1:])
        if time.monotonic() - started > BUDGET_S:
            break
    print(f"{len(kills)} kills in {time.monotonic() - started:.0f} s: stage, moment in s, files of finished parts")
    assert len(kills) >= 2 * len(STAGES)
