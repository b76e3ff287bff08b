"""Drill: the data stages killed with SIGKILL, driver and workers, at random moments; what comes out never differs."""

import contextlib
import hashlib
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from tests.pipelines.project import Project, kill_tree, make_project

pytest.importorskip("skimage", reason="needs the sample extra")
KILLS = 20
STAGES = ("ingest", "materialize", "encode")


def manifest_hash(project: Project, stage: str) -> str:
    return hashlib.sha256((project.folder / "data" / stage / "manifest.json").read_bytes()).hexdigest()


def forget(project: Project, stage: str) -> None:
    """Remove what the stage has left: its parts (and the index's, for ingest), its outputs, and DVC's memory of it."""
    for name in (stage, "index") if stage == "ingest" else (stage,):
        shutil.rmtree(project.folder / ".store" / "parts" / name, ignore_errors=True)
    shutil.rmtree(project.folder / "data" / stage, ignore_errors=True)
    shutil.rmtree(project.folder / ".dvc" / "cache" / "runs", ignore_errors=True)  # else DVC restores the manifest
    path = project.folder / "dvc.lock"
    lock = yaml.safe_load(path.read_text())
    del lock["stages"][stage]
    path.write_text(yaml.safe_dump(lock))


@pytest.mark.drill
@pytest.mark.timeout(3600)
def test_killed_at_random_moments_every_manifest_is_the_same_and_finished_parts_stay(tmp_path: Path) -> None:
    project = make_project(tmp_path / "killed often")
    project.edit_params("slots: 4", "slots: 150")  # some seconds of work in each stage
    seconds, straight = {}, {}
    for stage in STAGES:
        started = time.monotonic()
        project.run("dvc", "repro", stage)
        seconds[stage] = time.monotonic() - started
        straight[stage] = manifest_hash(project, stage)
    draw, caught = random.Random(23), []
    for number in range(KILLS):
        stage = STAGES[number % len(STAGES)]
        forget(project, stage)
        moment_s = draw.uniform(0, seconds[stage])
        process = project.start("dvc", "repro", stage)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=moment_s)
        ended = process.poll() is not None
        if not ended:
            kill_tree(process)
        parts = project.folder / ".store" / "parts" / stage
        finished = {path.parent.name for path in parts.glob("*/record.json")} if parts.is_dir() else set()
        before = {name: at for name, at in project.part_times(stage).items() if name.split("/")[0] in finished}
        project.run("pipelines", "check")  # as `make repro` does
        project.run("dvc", "repro", stage)
        assert manifest_hash(project, stage) == straight[stage], (stage, moment_s)
        after = project.part_times(stage)
        assert {name: after[name] for name in before} == before, (stage, moment_s)
        caught.append((stage, round(moment_s, 1), len(finished), ended))
    print("stage, moment in s, finished parts, had ended:", *caught, sep="\n")
    assert sum(not ended for *_, ended in caught) >= KILLS // 2
