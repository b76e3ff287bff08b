"""make drill: one training under `dvc repro` that loses three ranks and then its driver, and ends as if it had not."""

import csv
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.pipelines.project import Project, kill_tree, make_project

pytest.importorskip("skimage", reason="needs the sample extra")
pytestmark = [pytest.mark.drill, pytest.mark.timeout(1500)]
STEPS, EVERY = 300, 20


def test_three_ranks_and_the_driver_are_killed_and_the_loss_is_the_same(tmp_path: Path) -> None:
    project = make_project(tmp_path / "my project")
    project.set_params(train__steps=STEPS, train__checkpoint_every=EVERY, train__log_every=1, train__max_failures=5)
    project.run("dvc", "repro", "encode")

    started = time.monotonic()
    project.run("dvc", "repro", "train@full")
    undisturbed_s, undisturbed = time.monotonic() - started, _curve(project)
    shutil.rmtree(project.folder / ".store" / "runs")
    shutil.rmtree(project.folder / "data" / "train")

    rng = random.Random(23)
    # where in the run each blow falls: ranks at random steps of the first three quarters, the driver after them
    blows = sorted(rng.uniform(0.1, 0.75) * STEPS for _ in range(3))
    started = time.monotonic()
    process = project.start("dvc", "repro", "-f", "-s", "train@full")
    for blow in blows:
        _wait_for_step(project, process, blow)
        victim = rng.choice(list(_ranks(process)))
        victim.kill()
        victim.wait(timeout=20)
    _wait_for_step(project, process, 0.85 * STEPS)
    kill_tree(process)
    first_log = project.started_log()
    project.run("pipelines", "check")  # as `make repro` does
    second = project.run("dvc", "repro", "-f", "-s", "train@full")
    disturbed_s, disturbed = time.monotonic() - started, _curve(project)

    resumed = (first_log + second.stdout + second.stderr).count("resuming from step")
    goodput = 100 * undisturbed_s / disturbed_s
    print(f"\nkilled ranks after steps {[round(blow) for blow in blows]}, the driver after {round(0.85 * STEPS)}")
    print(
        f"undisturbed {undisturbed_s:.1f} s, disturbed {disturbed_s:.1f} s, goodput {goodput:.0f} %, resumed {resumed}"
    )
    print(f"resumed {resumed} times; last loss {undisturbed[-1]:.7f} and {disturbed[-1]:.7f}")
    assert resumed == 4
    assert len(disturbed) == len(undisturbed) == STEPS
    assert disturbed == pytest.approx(undisturbed, abs=1e-5)


def _curve(project: Project) -> list[float]:
    with (project.folder / "data" / "train" / "full" / "loss.csv").open(newline="") as stream:
        return [float(row["loss"]) for row in csv.DictReader(stream)]


def _ranks(process: subprocess.Popen[bytes]) -> Iterator[psutil.Process]:
    """Ray Train's worker processes below the driver."""
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if "RayTrainWorker" in "".join(child.cmdline()):
                yield child
        except psutil.NoSuchProcess:
            continue


def _wait_for_step(project: Project, process: subprocess.Popen[bytes], step: float) -> None:
    """Until a checkpoint at or after the last multiple of EVERY below `step` is complete, and workers are there."""
    runs = project.folder / ".store" / "runs"
    deadline = time.monotonic() + 400
    wanted = int(step) // EVERY * EVERY
    while time.monotonic() < deadline:
        assert process.poll() is None, project.started_log()[-3000:]
        done = [int(path.parent.name.split("-")[1]) for path in runs.glob("full-*/checkpoints/*/COMPLETE.json")]
        if max(done, default=0) >= wanted and any(_ranks(process)):
            return
        time.sleep(0.2)
    raise AssertionError(f"step {step} was not reached: {project.started_log()[-3000:]}")
