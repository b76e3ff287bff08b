"""`train.offload` moves memory and changes nothing: the curve is that of training without it.

On gloo the "GPU" is the processor, so DeepSpeed's paths run and what they hold where is not seen: that `make gpu`
measures.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from pbe.model.folder import STEM
from pbe.store import Manifest, Store
from pbe.train.checkpoints import RAW
from pbe.train.engine import deepspeed_config
from tests.train.ranks import KillAt, RankDiedError, loss_curve, run_ranks, take_said, tiny_config, tiny_spec, train

pytestmark = pytest.mark.timeout(240)

Place = tuple[Path, Store, Manifest]
NONE, OPTIMIZER, ALL = "none", "optimizer", "all"
RESUMED = [  # where it lies before and after, the ZeRO stage, and the ranks before and after
    ((OPTIMIZER, OPTIMIZER), 2, (2, 1)),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ((OPTIMIZER, OPTIMIZER), 1, (2, 1)),
            ((NONE, OPTIMIZER), 3, (1, 1)),
            ((ALL, ALL), 3, (2, 1)),
            ((ALL, NONE), 3, (1, 2)),
        )
    ),
]


@pytest.mark.parametrize(("offloads", "stage", "worlds"), RESUMED)
def test_killed_and_resumed_on_other_ranks_or_memory_it_is_the_golden_curve(
    place: Place, golden: list[float], offloads: tuple[str, str], stage: int, worlds: tuple[int, int]
) -> None:
    folder, store, encoded = place
    name = f"{'-'.join(offloads)}-{stage}-{worlds[0]}"
    for offload, world, killed in zip(offloads, worlds, (True, False), strict=True):
        cfg = tiny_config(offload=offload, zero_stage=stage, workers=world, checkpoint_every=8)
        spec = tiny_spec(store, encoded, cfg, name, on_progress=KillAt(11) if killed else None)
        if killed:
            with pytest.raises(RankDiedError, match="rank 0 was killed"):
                run_ranks(train, spec, world=world, tmp=folder)
        else:
            run_ranks(train, spec, world=world, tmp=folder)
    other = f" (checkpoint written by {worlds[0]} ranks)" if worlds[0] != worlds[1] else ""
    assert f"resuming from step 8{other}\n" in take_said(folder)
    np.testing.assert_allclose(loss_curve(store, name), golden, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("offload", "stage"), [("optimizer", 2), ("all", 3)])
def test_an_average_of_masters_on_the_cpu_is_that_of_masters_on_the_gpu(place: Place, offload: str, stage: int) -> None:
    folder, store, encoded = place
    exports = []
    for where in ("none", offload):
        cfg = tiny_config(offload=where, zero_stage=stage, ema_decay=0.9, ema_keep_raw=True, steps=9, validate_every=4)
        name = f"averaged-{where}-{stage}"
        run_ranks(train, tiny_spec(store, encoded, cfg, name), world=1, tmp=folder)
        exports.append(Path(store.path(f"runs/{name}/export")))
    for inner in ("", RAW):
        wanted, found = (load_file(export / inner / "unet" / f"{STEM}.safetensors") for export in exports)
        # queries and keys of one token move by rounding alone, which Adam makes as large as any gradient
        assert all(np.allclose(found[name], value, rtol=0, atol=1e-4) for name, value in wanted.items())


@pytest.mark.slow
@pytest.mark.parametrize(("offload", "stage"), [("optimizer", 2), ("all", 3)])
def test_bfloat16_stays_near_float32(place: Place, golden: list[float], offload: str, stage: int) -> None:
    folder, store, encoded = place
    name = f"bf16-{offload}-{stage}"
    cfg = tiny_config(offload=offload, precision="bf16", zero_stage=stage)
    run_ranks(train, tiny_spec(store, encoded, cfg, name), world=1, tmp=folder)
    assert np.abs(np.array(loss_curve(store, name)) - golden).max() < 5e-3


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"offload": "optimizer", "zero_stage": 0}, "offload optimizer needs zero_stage 1, 2 or 3"),
        ({"offload": "all", "zero_stage": 2}, "set zero_stage: 3 instead of 2, or offload: optimizer"),
        ({"offload": "optimizer", "zero_stage": 2, "precision": "bf16_pure"}, "set precision: bf16"),
    ],
)
def test_what_cannot_go_together_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        tiny_config(**changes)


def test_deepspeed_pins_memory_for_a_gpu_and_takes_torchs_optimizer() -> None:
    cfg = tiny_config(offload="all", zero_stage=3)
    told = deepspeed_config(cfg, on_gpu=True)
    assert told["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert told["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert told["zero_force_ds_cpu_optimizer"] is False
    assert "offload_optimizer" not in deepspeed_config(tiny_config(), on_gpu=True)["zero_optimization"]
