"""What train does about scores before any worker starts: weights found and opened, or one line; the same run."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pbe.store import Store
from pbe.train.settings import TrainConfig
from pipelines.runtime.stage import Stage, StageError
from pipelines.train import EXECUTION_ONLY
from pipelines.train_weights import score_judge
from tests.profiles import profile
from tests.tiny_weights import write_clip, write_clip_extractor

CPU = torch.device("cpu")


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage("train", "full", profile("tiny"), Store(str(tmp_path / "store")), tmp_path)


def _cfg(**extractor: Any) -> TrainConfig:
    cfg = profile("tiny").train.model_dump() | {"score_every": 4}
    return TrainConfig.model_validate(cfg | ({"score_extractor": extractor} if extractor else {}))


def test_scores_leave_the_run_the_one_that_it_is() -> None:
    scored = _cfg(kind="clip", weights="elsewhere").model_copy(update={"score_rows": 8})
    plain = profile("tiny").train
    assert scored.identity(without=EXECUTION_ONLY) == plain.identity(without=EXECUTION_ONLY)


def test_workers_read_the_weights_from_the_storage(stage: Stage, tmp_path: Path) -> None:
    folder = write_clip_extractor(tmp_path / "clip")
    judge = score_judge(stage, _cfg(kind="clip", weights=str(folder)))
    for file in folder.iterdir():
        file.unlink()
    assert judge(stage.store, CPU)


def test_weights_that_cannot_score_are_one_line_with_their_key(stage: Stage, tmp_path: Path) -> None:
    key = r"train@full: train\.score_extractor\.weights = "
    with pytest.raises(StageError, match=key + r"nowhere: nowhere: no such folder"):
        score_judge(stage, _cfg(kind="clip", weights="nowhere"))
    bare = write_clip(tmp_path / "bare")
    with pytest.raises(StageError, match=key + r".*bare"):
        score_judge(stage, _cfg(kind="clip", weights=str(bare)))
