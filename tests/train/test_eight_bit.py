"""AdamW with moments of 8 bits: bitsandbytes on the CPU, under DeepSpeed. `make test-8bit` installs and runs it."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pbe.store import Manifest, Store
from pbe.train.checkpoints import Run
from tests.train.ranks import KillAt, RankDiedError, loss_curve, run_ranks, take_said, tiny_config, tiny_spec, train

pytestmark = pytest.mark.timeout(240)
INSTALLED = importlib.util.find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(not INSTALLED, reason="bitsandbytes is not installed: `make test-8bit`")

Place = tuple[Path, Store, Manifest]
STAGES = [("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 0), ("bf16", 2)]


@needs_bitsandbytes
@pytest.mark.parametrize(("precision", "stage"), STAGES)
def test_the_curve_is_near_that_of_float32_moments_and_a_resumed_run_has_the_straight_ones(
    place: Place, golden: list[float], precision: str, stage: int
) -> None:
    folder, store, encoded = place

    def run(name: str, **changes: Any) -> list[float]:
        cfg = tiny_config(optimizer="adamw_8bit", precision=precision, zero_stage=stage, checkpoint_every=8)
        run_ranks(train, tiny_spec(store, encoded, cfg, f"{name}-{precision}-{stage}", **changes), world=1, tmp=folder)
        return loss_curve(store, f"{name}-{precision}-{stage}")

    straight = run("straight")
    assert 0 < np.abs(np.array(straight) - golden).max() < 0.05
    with pytest.raises(RankDiedError, match="rank 0 was killed"):
        run("resumed", on_progress=KillAt(11))
    resumed = run("resumed")
    assert "resuming from step 8\n" in take_said(folder)
    # in bfloat16 the last digits of products, which depend on addresses, grow
    np.testing.assert_allclose(resumed, straight, rtol=0, atol=1e-5 if precision == "fp32" else 5e-3)


@needs_bitsandbytes
@pytest.mark.parametrize("stage", [0, 2])
def test_moments_are_a_quarter_and_do_not_continue_those_of_the_other_adamw(place: Place, stage: int) -> None:
    folder, store, encoded = place
    sizes = []
    for optimizer in ("adamw", "adamw_8bit"):
        cfg = tiny_config(optimizer=optimizer, zero_stage=stage, steps=3)
        run_ranks(train, tiny_spec(store, encoded, cfg, f"{optimizer}-{stage}"), world=1, tmp=folder)
        files = Run(store, f"{optimizer}-{stage}").checkpoints()[-1].files
        sizes.append(sum(size for size, _ in files.values()))
    # weights, at stage 2 also masters, and moments: 4 (+ 4) + 2 bytes instead of 4 (+ 4) + 8. Small tensors of stage 0
    # keep float32
    assert stage == 0 or sizes[1] < 0.7 * sizes[0]
    for before, after in (("adamw", "adamw_8bit"), ("adamw_8bit", "adamw")):
        spec = tiny_spec(
            store,
            encoded,
            tiny_config(optimizer=after, zero_stage=stage, steps=9),
            f"{before}-{after}-{stage}",
            origin=(f"{before}-{stage}", 3),
        )
        with pytest.raises(RankDiedError, match=r"EngineError: .*this checkpoint (does not match|holds moments of)"):
            run_ranks(train, spec, world=1, tmp=folder)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"workers": 2}, "set workers: 1, or optimizer: adamw, whose moments zero_stage 1 to 3 divides"),
        ({"offload": "optimizer"}, "set offload: none"),
        ({"precision": "bf16_pure"}, "set precision: bf16"),
    ],
)
def test_what_cannot_go_together_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        tiny_config(optimizer="adamw_8bit", zero_stage=2, **changes)


@pytest.mark.skipif(INSTALLED, reason="bitsandbytes is installed")
def test_without_bitsandbytes_it_says_how_to_install_it(place: Place) -> None:
    folder, store, encoded = place
    spec = tiny_spec(store, encoded, tiny_config(optimizer="adamw_8bit", zero_stage=2), "none")
    with pytest.raises(RankDiedError, match=r"EngineError: .*needs bitsandbytes: install it with"):
        run_ranks(train, spec, world=1, tmp=folder)
