"""Number formats and kernels: bfloat16 under DeepSpeed stays near float32; kernels change rounding alone."""

from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from pbe.model.architecture import Architecture
from pbe.model.unet import ConditionedUNet, new_network
from pbe.store import Manifest, Store
from pbe.train.engine import deepspeed_config
from pbe.train.spec import TrainSpec
from tests.profiles import profile
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

pytestmark = pytest.mark.timeout(240)


@pytest.mark.parametrize(
    ("precision", "stages", "away"),
    [
        ("bf16", (2,), 5e-3),
        pytest.param("bf16", (1, 3), 5e-3, marks=pytest.mark.slow),
        # DeepSpeed sums the micro-batches' gradients in bfloat16 there
        pytest.param("bf16", (0,), 5e-2, marks=pytest.mark.slow),
        pytest.param("bf16_autocast", (0, 2), 2e-3, marks=pytest.mark.slow),
        pytest.param("bf16_pure", (1, 2, 3), 2e-2, marks=pytest.mark.slow),
    ],
)
def test_bfloat16_stays_near_float32(
    place: tuple[Path, Store, Manifest], golden: list[float], precision: str, stages: tuple[int, ...], away: float
) -> None:
    folder, store, encoded = place
    for stage in stages:
        name = f"{precision}-{stage}"
        cfg = tiny_config(precision=precision, zero_stage=stage)
        run_ranks(train, tiny_spec(store, encoded, cfg, name), world=1, tmp=folder)
        difference = np.abs(np.array(loss_curve(store, name)) - golden).max()
        assert 1e-5 < difference < away, f"{name}: {difference}"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_export_has_the_float32_masters(place: tuple[Path, Store, Manifest], precision: str) -> None:
    folder, store, encoded = place
    cfg = tiny_config(precision=precision, steps=3)
    run_ranks(train, tiny_spec(store, encoded, cfg, f"export-{precision}"), world=1, tmp=folder)
    unet = load_file(folder / "store" / "runs" / f"export-{precision}" / "export" / "unet" / _UNET_FILE)
    weight = unet["conv_in.weight"]
    assert weight.dtype == np.float32
    rounded = (weight.view(np.uint32) & 0xFFFF) == 0  # a bfloat16 has no more than the upper half
    assert rounded.mean() < 0.1


_UNET_FILE = "diffusion_pytorch_model.safetensors"


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "stage", "away"), [("bf16", 2, 5e-3), ("bf16_pure", 1, 2e-2)])
def test_bfloat16_goes_on_at_another_number_of_ranks(
    place: tuple[Path, Store, Manifest], golden: list[float], precision: str, stage: int, away: float
) -> None:
    folder, store, encoded = place
    name = f"resumed-{precision}"
    for world, kill in ((2, 19), (1, None)):
        cfg = tiny_config(precision=precision, zero_stage=stage, workers=world, checkpoint_every=8)
        spec = tiny_spec(store, encoded, cfg, name, on_progress=KillAt(kill) if kill else None)
        if kill:
            with pytest.raises(RankDiedError):
                run_ranks(train, spec, world=world, tmp=folder)
        else:
            run_ranks(train, spec, world=world, tmp=folder)
    assert "step 16 (checkpoint written by 2 ranks)" in take_said(folder)
    np.testing.assert_allclose(loss_curve(store, name), golden, rtol=0, atol=away)


@pytest.mark.slow
def test_kernels_change_rounding_alone(place: tuple[Path, Store, Manifest], golden: list[float]) -> None:
    folder, store, encoded = place
    kernels = {
        "sdpa": False,
        "tf32": True,
        "channels_last": True,
        "compile": True,
        "fused_adamw": False,
        "checkpointed_levels": 2,
    }
    cfg = tiny_config(zero_stage=2, workers=2, kernels=kernels)
    run_ranks(train, tiny_spec(store, encoded, cfg, "kernels"), world=2, tmp=folder)
    np.testing.assert_allclose(loss_curve(store, "kernels"), golden, rtol=0, atol=1e-5)
    assert "kernels.compile is ignored: there is no GPU" in take_said(folder)


def test_what_deepspeed_is_told_follows_from_the_settings() -> None:
    cfg = profile("tiny").train
    told = deepspeed_config(cfg, on_gpu=False)
    assert told["train_batch_size"] == 8
    assert told["gradient_accumulation_steps"] == 2 == cfg.batch // (cfg.workers * cfg.micro_batch)
    assert told["gradient_clipping"] == 1.0
    assert told["zero_optimization"]["stage"] == 2
    assert "bf16" not in told and "checkpoint" not in told
    assert told["timers"]["throughput"]["enabled"] is False  # they stop the device at every micro-batch
    on_gpu = deepspeed_config(cfg, on_gpu=True)["zero_optimization"]
    assert on_gpu["overlap_comm"]  # which stops it at every shard: of use to several ranks
    alone = cfg.model_copy(update={"workers": 1})
    assert not deepspeed_config(alone, on_gpu=True)["zero_optimization"]["overlap_comm"]
    assert on_gpu["reduce_bucket_size"] > 10 * told["zero_optimization"]["reduce_bucket_size"]
    unclipped = cfg.model_copy(update={"grad_clip": None, "precision": "bf16_pure"})
    assert deepspeed_config(unclipped, on_gpu=True)["gradient_clipping"] == 0.0
    assert deepspeed_config(unclipped, on_gpu=True)["bf16"]["bf16_optimizer_states"]
    assert deepspeed_config(cfg, on_gpu=True, universal=True)["checkpoint"] == {"load_universal": True}


def dtypes_seen_as_on_a_gpu(spec: TrainSpec) -> list[torch.dtype]:
    """The output dtype of the network's last convolution in each forward.

    torch is patched to report an autocast around the engine as on, which it otherwise does for CUDA alone.
    """
    seen: list[torch.dtype] = []
    asked = torch.is_autocast_enabled

    def watched(arch: Architecture) -> ConditionedUNet:
        network = new_network(arch)
        network.unet.conv_out.register_forward_hook(lambda _, inputs, out: seen.append(out.dtype))
        return network

    def enabled(*device_type: str) -> bool:
        return asked(*device_type) if device_type else True

    with patch("pbe.train.network.new_network", watched), patch.object(torch, "is_autocast_enabled", enabled):
        train(spec)
    return seen


@pytest.mark.parametrize(("precision", "dtype"), [("bf16_autocast", torch.bfloat16), ("fp32", torch.float32)])
def test_deepspeed_does_not_turn_autocast_off(
    place: tuple[Path, Store, Manifest], precision: str, dtype: torch.dtype
) -> None:
    folder, store, encoded = place
    spec = tiny_spec(store, encoded, tiny_config(steps=2, precision=precision), f"autocast-{precision}")
    [seen] = run_ranks(dtypes_seen_as_on_a_gpu, spec, world=1, tmp=folder)
    assert seen and set(seen) == {dtype}
