"""One loss curve of 30 steps, for every ZeRO stage, any number of ranks, and any number of kills and resumes.

Real gloo ranks, real SIGKILLs, DeepSpeed's real checkpoints; float32, so that only summation order may differ.
"""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from pbe.store import Manifest, Store
from tests.train.golden import verdict
from tests.train.ranks import (
    KillAt,
    RankDiedError,
    loss_curve,
    run_ranks,
    take_said,
    tiny_config,
    tiny_spec,
    train,
)

pytestmark = pytest.mark.timeout(300)


def test_the_curve_shows_what_training_does(place: tuple[Path, Store, Manifest], golden: list[float]) -> None:
    """Otherwise equal curves would mean nothing: another learning rate differs by far more than rounding."""
    folder, store, encoded = place
    assert len(golden) == 30 + 1
    other = tiny_config(zero_stage=0, lr=2.1e-3)
    run_ranks(train, tiny_spec(store, encoded, other, "other"), world=1, tmp=folder)
    assert np.abs(np.array(loss_curve(store, "other")) - golden).max() > 1e-4


def test_the_curve_is_the_stored_one_or_train_has_a_new_version(golden: list[float]) -> None:
    """A run is named by VERSION, not by the code. Float32 on any processor: equal to one in 10,000."""
    told = verdict(golden)
    assert not told, told


def test_another_curve_of_the_same_version_asks_for_a_new_one(golden: list[float]) -> None:
    assert "raise VERSION in pipelines/train.py" in verdict([loss * 1.0002 for loss in golden])
    assert "raise VERSION" in verdict(golden[:-1])


# `golden` is stage 0 on one rank; of stage 2, one rank is what test_resume.py and test_formats.py compare with it
STRAIGHT = [(0, 2), (3, 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 1), (3, 1), (1, 2), (2, 2)))]


@pytest.mark.parametrize(("stage", "world"), STRAIGHT)
def test_straight(place: tuple[Path, Store, Manifest], golden: list[float], stage: int, world: int) -> None:
    folder, store, encoded = place
    name = f"straight-{stage}-{world}"
    cfg = tiny_config(zero_stage=stage, workers=world)
    run_ranks(train, tiny_spec(store, encoded, cfg, name), world=world, tmp=folder)
    np.testing.assert_allclose(loss_curve(store, name), golden, rtol=0, atol=1e-5)


KILLED = [
    (1, (2, 1, 2)),
    pytest.param(0, (2, 1, 2), marks=pytest.mark.slow),  # nothing of it is cut for a number of ranks
    pytest.param(3, (2, 2, 1, 2), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("stage", "worlds"), KILLED)
def test_killed_and_resumed(
    place: tuple[Path, Store, Manifest],
    golden: list[float],
    stage: int,
    worlds: tuple[int, ...],
) -> None:
    """Checkpoints every 8 steps; each world but the last is killed three steps after its own."""
    folder, store, encoded = place
    name = f"killed-{stage}"
    for number, world in enumerate(worlds):
        last = number == len(worlds) - 1
        cfg = tiny_config(zero_stage=stage, workers=world, checkpoint_every=8)
        spec = tiny_spec(store, encoded, cfg, name, on_progress=None if last else KillAt(8 * number + 11))
        if last:
            run_ranks(train, spec, world=world, tmp=folder)
        else:
            with pytest.raises(RankDiedError, match="rank 0 was killed"):
                run_ranks(train, spec, world=world, tmp=folder)
    np.testing.assert_allclose(loss_curve(store, name), golden, rtol=0, atol=1e-5)
    said = take_said(folder)
    for number, (before, world) in enumerate(pairwise(worlds), start=1):
        other = f" (checkpoint written by {before} ranks)" if before != world else ""
        assert f"resuming from step {8 * number}{other}\n" in said
