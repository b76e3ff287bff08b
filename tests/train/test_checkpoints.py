"""Runs in the storage: what counts as a checkpoint, and which one `train.resume_from` means."""

import shutil
from pathlib import Path

import pytest

from pbe.places import repo_root
from pbe.store import Store
from pbe.train.checkpoints import Checkpoint, CheckpointError, Run
from pbe.train.settings import TrainConfig
from pipelines.runtime.stage import Stage, StageError
from pipelines.train import origin_of
from tests.profiles import profile

NAME = "full-0123abcd"


def _run(store: Store, *steps: int, name: str = NAME, zero_stage: int = 2) -> Run:
    run = Run(store, name)
    for step in steps:
        store.write_bytes(f"{run.folder}/checkpoints/step-{step:08d}/engine/weights.pt", b"x")
        run.complete(Checkpoint(name, step, 2, zero_stage, {"engine/weights.pt": (1, "0")}), keep=10)
    return run


@pytest.fixture
def stage(store: Store) -> Stage:
    params = profile("tiny")
    return Stage("train", "full", params, store, repo_root())


def _config(stage: Stage, resume_from: str, **changes: object) -> TrainConfig:
    return TrainConfig.model_validate(stage.params.train.model_dump() | {"resume_from": resume_from} | changes)


def test_only_what_has_a_marker_counts_oldest_first(store: Store) -> None:
    run = _run(store, 8, 4)
    store.write_bytes(f"{run.folder}/checkpoints/step-00000012/engine/weights.pt", b"x")
    assert [found.step for found in run.checkpoints()] == [4, 8]
    assert run.checkpoints()[1].files == {"engine/weights.pt": (1, "0")}


def test_completing_removes_all_but_the_newest(store: Store) -> None:
    run = _run(store, 4, 8)
    run.complete(Checkpoint(NAME, 12, 2, 2, {}), keep=2)
    assert [found.step for found in run.checkpoints()] == [8, 12]
    assert not store.exists(f"{run.folder}/checkpoints/step-00000004/engine/weights.pt")


def test_a_checkpoint_copied_from_another_run_is_refused(store: Store) -> None:
    theirs = _run(store, 4)
    ours = Run(store, "full-4567cdef")
    source, target = (Path(store.path(run.folder)) / "checkpoints" for run in (theirs, ours))
    shutil.copytree(source, target)
    with pytest.raises(CheckpointError, match=r"step-00000004: written by run full-0123abcd.*train\.resume_from"):
        ours.checkpoints()


def test_resume_from_is_settled_at_the_first_start(stage: Stage) -> None:
    there, here = _run(stage.store, 4, 8), Run(stage.store, "full-4567cdef")
    assert origin_of(stage, _config(stage, f"{NAME}@4"), here) == (NAME, 4)
    assert here.read_json("origin.json") == {"run": NAME, "step": 4}
    other = Run(stage.store, "full-89abcdef")
    assert origin_of(stage, _config(stage, NAME), other) == (NAME, 8)
    there.complete(Checkpoint(NAME, 11, 2, 2, {}), keep=10)
    assert origin_of(stage, _config(stage, NAME), other) == (NAME, 8)  # though there is a newer one now
    assert origin_of(stage, stage.params.train, Run(stage.store, "full-0")) is None


@pytest.mark.parametrize(
    ("resume_from", "changes", "said"),
    [
        ("full-ffff", {}, r"no such checkpoint in .*runs/full-ffff \(steps there: none\)"),
        (f"{NAME}@5", {}, r"no such checkpoint .*\(steps there: 4, 8\)"),
        (NAME, {"steps": 8}, r"that checkpoint is of step 8, and train\.steps is 8; set train\.steps higher"),
        (NAME, {"zero_stage": 3}, r"train\.zero_stage 2, which DeepSpeed cannot convert to 3"),
        (NAME, {"zero_stage": 0}, r"cannot convert to 0"),
    ],
)
def test_what_resume_from_cannot_mean(stage: Stage, resume_from: str, changes: dict[str, int], said: str) -> None:
    _run(stage.store, 4, 8)
    with pytest.raises(StageError, match=said):
        origin_of(stage, _config(stage, resume_from, **changes), Run(stage.store, "full-4567cdef"))


def test_zero_1_and_2_follow_each_other(stage: Stage) -> None:
    _run(stage.store, 4)
    cfg = _config(stage, NAME, zero_stage=1)
    assert origin_of(stage, cfg, Run(stage.store, "full-4567cdef")) == (NAME, 4)


def test_a_run_name_is_one(stage: Stage) -> None:
    for wrong in ("../x", "full", "full-xyz", "full-0123@", "s3://bucket/run"):
        with pytest.raises(ValueError, match="resume_from"):
            _config(stage, wrong)
