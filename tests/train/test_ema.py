"""Averaged weights: the mean that the formula says, on any ZeRO stage and number of ranks, and nothing else changes.

Real gloo ranks and DeepSpeed's real checkpoints.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load, load_file

from pbe.model.unet import new_network
from pbe.model.weights import load_model
from pbe.store import Manifest, Store
from pbe.train import engine as engine_room
from pbe.train.checkpoints import RAW, Run
from pbe.train.ema import FILE, Ema
from pbe.train.engine import full_parameters, make_engine, step_engine
from pbe.train.settings import TrainConfig
from tests.train.ranks import (
    ARCH,
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
UNET = "unet/diffusion_pytorch_model.safetensors"
DECAY = 0.4  # which the warm-up reaches in its fifth step


def average_by_hand(cfg: TrainConfig, kept_whole: int, folder: Path) -> None:
    """Seven steps of the engine; the mean, in float64 of the whole weights after each, is what `Ema` holds.

    kept_whole: elements up to which stage 3 keeps a parameter gathered, as it does on a GPU.
    """
    cpu, rank = torch.device("cpu"), torch.distributed.get_rank()
    dtype = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
    torch.manual_seed(5)
    model = new_network(ARCH)
    if cfg.kernels.channels_last:
        model.use_kernels(sdpa=True, channels_last=True, checkpointed_levels=0)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    asked = engine_room.deepspeed_config

    def as_on_a_gpu(*args: Any, **named: Any) -> dict[str, Any]:
        config = asked(*args, **named)
        if cfg.zero_stage == 3:
            config["zero_optimization"]["stage3_param_persistence_threshold"] = kept_whole
        return config

    with patch.object(engine_room, "deepspeed_config", as_on_a_gpu):
        engine = make_engine(model, cfg, device=cpu)
    ema = Ema(engine, DECAY)
    rows = torch.Generator().manual_seed(7 + rank)

    def forward(network: Any, generator: torch.Generator) -> torch.Tensor:
        latent = torch.randn(2, 4, 4, 4, generator=generator).to(dtype)
        return network(
            latent,
            torch.tensor([10, 700]),
            masked_latent=latent.flip(0),
            keep_mask_latent=(latent[:, :1] > 0).to(dtype),
            exemplar_tokens=torch.randn(2, 1, ARCH.backbone_width, generator=generator).to(dtype),
            drop_condition=torch.tensor([False, True]),
        ).float()

    @torch.no_grad()
    def look(network: Any) -> torch.Tensor:
        return forward(network, torch.Generator().manual_seed(11))

    means = {name: value.double() for name, value in full_parameters(engine).items()}
    for step in range(1, 8):
        for _ in range(cfg.accumulation_steps):
            engine.backward(forward(engine, rows).square().mean())
            step_engine(engine)
        ema.update()
        decay = min(DECAY, (1 + step) / (10 + step))
        for name, value in full_parameters(engine).items():
            means[name] = decay * means[name] + (1 - decay) * value.double()

    if rank == 0 and cfg.zero_stage:  # cut like the masters, with some padding
        assert sum(mean.numel() for mean in ema._means) < 0.52 * sum(value.numel() for value in means.values())
    raw, before = full_parameters(engine), look(engine)
    with ema.as_masters():
        held_means = full_parameters(engine)
    for name, mean in means.items():
        torch.testing.assert_close(held_means[name].double(), mean, rtol=0, atol=1e-6)
    with ema.in_network():
        averaged = look(engine)
    assert torch.equal(look(engine), before)
    assert all(torch.equal(value, raw[name]) for name, value in full_parameters(engine).items())
    assert (averaged - before).abs().max() > 0.01

    ema.save(folder, rank=rank)
    torch.distributed.barrier()
    again = Ema(engine, DECAY)
    assert again.load(folder)
    with again.in_network():
        assert torch.equal(look(engine), averaged)
    assert torch.equal(look(engine), before)
    with again.as_masters():
        loaded = full_parameters(engine)
    assert all(torch.equal(value, held_means[name]) for name, value in loaded.items())
    if rank == 0:
        alone = new_network(ARCH)
        alone.load_state_dict(held_means | buffers)
        torch.testing.assert_close(look(alone.to(dtype)), averaged, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("stage", "precision", "kept_whole"),
    [
        (2, "bf16", 0),
        *(
            pytest.param(stage, precision, kept_whole, marks=pytest.mark.slow)
            for stage, precision, kept_whole in [
                (3, "bf16", 100),
                (0, "fp32", 0),
                (0, "bf16", 0),
                (1, "fp32", 0),
                (1, "bf16", 0),
                (2, "fp32", 0),
                (2, "bf16_autocast", 0),
                (3, "fp32", 0),
                (3, "fp32", 100),
                (3, "bf16", 0),
            ]
        ),
    ],
)
def test_the_mean_is_the_formulas_and_the_network_gets_its_weights_back(
    tmp_path: Path, stage: int, precision: str, kept_whole: int
) -> None:
    cfg = tiny_config(
        zero_stage=stage, precision=precision, workers=2, kernels={"channels_last": stage == 0, "fused_adamw": False}
    )
    run_ranks(average_by_hand, cfg, kept_whole, tmp_path, world=2, tmp=tmp_path)


def _exported(store: Store, run_name: str, inner: str = "") -> dict[str, bytes]:
    folder = f"runs/{run_name}/export/{inner}"
    return {name: store.read_bytes(f"{folder}/{name}") for name in (UNET, "image_encoder/model.safetensors")}


def _largest_difference(some: dict[str, bytes], others: dict[str, bytes]) -> float:
    """Over all weights. Two trainings differ in last digits: matrix products do with the addresses of their operands,
    and AdamW makes steps of what is left of gradients of 0, those of queries and keys of a single token."""
    pairs = [(load(some[name]), load(others[name])) for name in some]
    return max(float(np.abs(ours[key] - theirs[key]).max()) for ours, theirs in pairs for key in ours)


@pytest.mark.parametrize(
    ("stage", "precision", "world"),
    [
        (0, "fp32", 1),
        pytest.param(2, "bf16", 2, marks=pytest.mark.slow),
        pytest.param(3, "fp32", 2, marks=pytest.mark.slow),
        pytest.param(3, "bf16", 1, marks=pytest.mark.slow),
    ],
)
def test_training_is_the_same_with_an_average_and_validation_by_it(
    place: tuple[Path, Store, Manifest], golden: list[float], stage: int, precision: str, world: int
) -> None:
    """The raw export is that of a training without an average; the other one is what validation saw."""
    folder, store, encoded = place
    steps = 30 if stage == 0 else 9  # those of `golden`; ZeRO 3 is slow
    same: dict[str, Any] = {"zero_stage": stage, "precision": precision, "workers": world, "steps": steps}
    plain = "golden"  # of stage 0 on one rank
    if stage:
        plain = f"plain-{stage}-{precision}"
        run_ranks(train, tiny_spec(store, encoded, tiny_config(**same), plain), world=world, tmp=folder)
    name = f"averaged-{stage}-{precision}"
    cfg = tiny_config(**same, ema_decay=0.95, ema_keep_raw=True, validate_every=4, grid_rows=int(stage == 0))
    run_ranks(train, tiny_spec(store, encoded, cfg, name), world=world, tmp=folder)
    near = 1e-5 if precision == "fp32" else 1e-4
    np.testing.assert_allclose(loss_curve(store, name)[:-1], loss_curve(store, plain)[:-1], rtol=0, atol=10 * near)
    assert abs(loss_curve(store, name)[-1] - loss_curve(store, plain)[-1]) > 1e-4
    assert _largest_difference(_exported(store, name, RAW), _exported(store, plain)) < near
    assert _largest_difference(_exported(store, name), _exported(store, plain)) > 3e-4
    export = Path(store.path(f"runs/{name}/export"))
    assert load_model(export).card.run["weights"] == "averaged over steps (EMA, decay 0.95)"
    assert load_model(export / RAW).card.run["weights"] == "of the last step"
    assert "weights" not in load_model(Path(store.path(f"runs/{plain}/export"))).card.run


RESUMED = [
    (2, (2, 1)),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [(0, (2, 1)), (1, (1, 2)), (2, (2, 2)), (3, (2, 2)), (3, (1, 2))]
    ),
]


@pytest.mark.parametrize(("stage", "worlds"), RESUMED)
def test_resumed_equals_straight(
    place: tuple[Path, Store, Manifest], golden: list[float], stage: int, worlds: tuple[int, int]
) -> None:
    """The validation loss is of the averaged weights."""
    folder, store, encoded = place
    before, after = worlds
    straight, name = f"straight-{stage}-{after}", f"resumed-{stage}-{before}-{after}"
    averaged = {"zero_stage": stage, "ema_decay": 0.95}
    if not store.exists(f"runs/{straight}/finished.json"):
        cfg = tiny_config(**averaged, workers=after)
        run_ranks(train, tiny_spec(store, encoded, cfg, straight), world=after, tmp=folder)
    cfg = tiny_config(**averaged, workers=before, checkpoint_every=8)
    with pytest.raises(RankDiedError):
        run_ranks(train, tiny_spec(store, encoded, cfg, name, on_progress=KillAt(19)), world=before, tmp=folder)
    assert FILE in Run(store, name).checkpoints()[-1].files
    cfg = tiny_config(**averaged, workers=after, checkpoint_every=8)
    run_ranks(train, tiny_spec(store, encoded, cfg, name), world=after, tmp=folder)
    assert "resuming from step 16" in take_said(folder)
    np.testing.assert_allclose(loss_curve(store, name), loss_curve(store, straight), rtol=0, atol=1e-5)
    np.testing.assert_allclose(loss_curve(store, name)[:-1], golden[:-1], rtol=0, atol=1e-5)
    assert abs(loss_curve(store, name)[-1] - golden[-1]) > 1e-4
    if before == after:
        assert _largest_difference(_exported(store, name), _exported(store, straight)) < 1e-5


def test_a_raw_export_asked_for_later_comes_from_the_checkpoint(
    place: tuple[Path, Store, Manifest], golden: list[float]
) -> None:
    """A run without an average may be continued with one, which then begins there."""
    folder, store, encoded = place
    cfg = tiny_config(zero_stage=0, steps=32, ema_decay=0.5)
    spec = tiny_spec(store, encoded, cfg, "later", origin=("golden", 30))
    run_ranks(train, spec, world=1, tmp=folder)
    assert "the checkpoint has no averaged weights; they begin at step 30" in take_said(folder)
    run = Run(store, "later")
    assert run.finished() == json.loads(store.read_bytes("runs/later/finished.json"))
    assert run.finished(with_raw=True) is None
    exported = _exported(store, "later")
    keeps_raw = cfg.model_copy(update={"ema_keep_raw": True})
    run_ranks(train, replace(spec, cfg=keeps_raw), world=1, tmp=folder)
    assert "resuming from step 32" in take_said(folder)
    assert run.finished(with_raw=True) is not None
    assert _exported(store, "later") == exported != _exported(store, "later", RAW)
    with safe_open(store.path(f"{run.checkpoints()[-1].path}/{FILE}"), framework="np") as stored:
        assert stored.metadata() == {"updates": "2"}
    weights = load_file(store.path(f"{run.folder}/export/{UNET}"))
    assert all(value.dtype == np.float32 for value in weights.values())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 0}, "set ema_decay: null, or steps above 0"),
        ({"precision": "bf16_pure", "zero_stage": 2}, "set precision: bf16"),
        ({"ema_decay": None, "ema_keep_raw": True}, "set ema_decay too"),
        ({"ema_decay": 1.0}, "ema_decay"),
    ],
)
def test_what_cannot_be_averaged_is_refused_with_the_key_to_change(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tiny_config(**{"ema_decay": 0.99} | changes)
