"""Training a part of the UNet: one loss curve on any number of ranks, and nothing else moves. Real gloo ranks.

The base is the model that the golden run exports, so that its weights are no noise.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pbe.diffusion.scheduler_config import scheduler_config
from pbe.diffusion.settings import BetaSchedule, Objective
from pbe.model.adapter import FILES, LORA_FILE
from pbe.model.folder import ADAPTER_FILE, STEM
from pbe.model.tensors import WeightsError
from pbe.model.unet import new_network, use_float32_group_norm
from pbe.model.weight_store import store_adapter
from pbe.places import repo_root
from pbe.store import Manifest, Store
from pbe.train.checkpoints import RAW, Run
from pbe.train.settings import TrainConfig
from pbe.train.spec import TrainSpec
from pbe.train.trainable import choose_trainable, store_frozen_in_bfloat16
from pipelines.runtime.stage import Stage, StageError
from pipelines.train_weights import adapter_weights, refuse_other_objective
from tests.profiles import profile
from tests.train.golden import LORA, PART_STEPS, PARTS, part_curve, part_spec, store_base, verdict
from tests.train.ranks import (
    ARCH,
    WIDTH,
    KillAt,
    RankDiedError,
    loss_curve,
    run_ranks,
    take_said,
    tiny_config,
    train,
)

pytestmark = pytest.mark.timeout(300)

Place = tuple[Path, Store, Manifest]


@pytest.fixture(scope="module")
def base(place: Place, golden: list[float]) -> tuple[str, str]:
    """Storage paths of UNet and image encoder."""
    return store_base(place[1])


@pytest.fixture(scope="module")
def straight(place: Place, base: tuple[str, str]) -> dict[str, str]:
    """Names of the runs at stage 0 on one rank, by what they trained."""
    for part in PARTS:
        told = verdict(part_curve(*place, base, part), part)
        assert not told, told
    return {part: f"straight-{part}" for part in PARTS}


def _spec(place: Place, base: tuple[str, str], part: str, name: str, **changes: Any) -> TrainSpec:
    return part_spec(*place[1:], base, part, name, **changes)


def _export(store: Store, name: str) -> Path:
    return Path(store.path(f"runs/{name}/export"))


def _unet(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet" / f"{STEM}.safetensors")


def _mapper(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "image_encoder" / "model.safetensors")


SHARDED = [
    ("lora", 3),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (("lora", 2), ("cross_attention", 3))),
]


@pytest.mark.parametrize(("kind", "stage"), SHARDED)
def test_killed_on_two_ranks_and_resumed_on_one(
    place: Place, base: tuple[str, str], straight: dict[str, str], kind: str, stage: int
) -> None:
    """DeepSpeed's converter meets checkpoints without frozen parameters, which are a small part of the network."""
    folder, store, _ = place
    name = f"killed-{kind}-{stage}"
    sharded = {"zero_stage": stage, "checkpoint_every": 4}
    killed = _spec(place, base, kind, name, workers=2, on_progress=KillAt(6), **sharded)
    with pytest.raises(RankDiedError, match="rank 0 was killed"):
        run_ranks(train, killed, world=2, tmp=folder)
    [checkpoint], [whole] = (Run(store, run).checkpoints() for run in (name, "golden"))
    size, whole_size = (sum(size for size, _ in found.files.values()) for found in (checkpoint, whole))
    assert size < whole_size / 2  # most of it is the mapper
    run_ranks(train, _spec(place, base, kind, name, **sharded), world=1, tmp=folder)
    assert "resuming from step 4 (checkpoint written by 2 ranks)\n" in take_said(folder)
    np.testing.assert_allclose(loss_curve(store, name), loss_curve(store, straight[kind]), rtol=0, atol=1e-5)


def test_with_lora_the_merged_unet_is_the_base_and_its_updates_and_the_adapter_has_just_these(
    place: Place, straight: dict[str, str]
) -> None:
    _, store, _ = place
    base, export = _export(store, "golden"), _export(store, straight["lora"])
    before, merged, updates = _unet(base), _unet(export), load_file(export / "adapter" / LORA_FILE)
    updated, farthest = set(), 0.0
    for name, value in before.items():
        layer = f"unet.{name.removesuffix('.weight')}"
        expected = value
        if f"{layer}.lora_A.weight" in updates:
            a, b = (updates.pop(f"{layer}.lora_{factor}.weight").double() for factor in "AB")
            assert a.shape[0] == b.shape[1] == 3
            expected = value.double() + 6 / 3 * b @ a
            updated.add(layer.rpartition("attn")[2])
            farthest = max(farthest, float((expected - value).abs().max()))
        torch.testing.assert_close(merged[name], expected.float(), rtol=0, atol=1e-6 * (expected is not value))
    assert not updates and farthest > 1e-3
    assert updated == {f"{which}.{target}" for which in "12" for target in ("to_q", "to_k", "to_v", "to_out.0")}
    assert not torch.equal(_mapper(base)["proj_out.weight"], _mapper(export)["proj_out.weight"])
    said = json.loads((export / "adapter" / ADAPTER_FILE).read_text())
    assert said["base"]["name"] == "models/golden"


def test_with_cross_attention_nothing_else_of_the_unet_moves(place: Place, straight: dict[str, str]) -> None:
    _, store, _ = place
    base, export = _export(store, "golden"), _export(store, straight["cross_attention"])
    after = _unet(export)
    moved = {name for name, value in _unet(base).items() if not torch.equal(value, after[name])}
    assert moved and all(".attn2." in name for name in moved)
    assert any(name.endswith("attn2.to_v.weight") for name in moved)
    assert not torch.equal(_mapper(base)["proj_out.weight"], _mapper(export)["proj_out.weight"])
    assert not (export / "adapter").exists()


def test_train_init_begins_with_the_adapter_that_it_names(
    place: Place, base: tuple[str, str], straight: dict[str, str]
) -> None:
    """No steps: what comes out is what went in, though ZeRO 3 has cut it up meanwhile."""
    folder, store, _ = place
    adapter = _export(store, straight["lora"]) / "adapter"
    stored = store_adapter(store, adapter)
    run_ranks(
        train,
        _spec(place, base, "lora", "goes-on", steps=0, zero_stage=3, workers=2, adapter=stored),
        world=2,
        tmp=folder,
    )
    export = _export(store, "goes-on")
    for name in FILES:
        assert (export / "adapter" / name).read_bytes() == (adapter / name).read_bytes(), name
    assert (export / "unet" / f"{STEM}.safetensors").read_bytes() == (
        adapter.parent / "unet" / f"{STEM}.safetensors"
    ).read_bytes()


ROUNDED = [
    ("bf16_autocast", 0),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (("bf16_autocast", 3), ("bf16", 0), ("bf16", 2), ("bf16", 3), ("bf16_pure", 2))
    ),
]


@pytest.mark.parametrize(("precision", "stage"), ROUNDED)
def test_a_base_that_trains_in_bfloat16_is_exported_unrounded(
    place: Place, base: tuple[str, str], precision: str, stage: int
) -> None:
    folder, store, _ = place
    name = f"{precision}-{stage}"
    spec = _spec(place, base, "lora", name, steps=4, precision=precision, zero_stage=stage)
    run_ranks(train, spec, world=1, tmp=folder)
    assert np.isfinite(loss_curve(store, name)).all()
    after = _unet(_export(store, name))
    moved = {name for name, value in _unet(_export(store, "golden")).items() if not torch.equal(value, after[name])}
    assert moved and all(name.endswith((".to_q.weight", ".to_k.weight", ".to_v.weight", ".0.weight")) for name in moved)


@pytest.mark.parametrize("kind", PARTS)
def test_frozen_weights_in_bfloat16_change_no_bit_of_a_step_under_autocast(kind: str) -> None:
    steps = []
    for stored in (False, True):
        torch.manual_seed(3)
        network = new_network(ARCH)
        use_float32_group_norm(network)
        network.use_autocast()
        choose_trainable(network, tiny_config(trainable=PARTS[kind], init="models/golden").trainable, seed=5)
        whole = sum(parameter.nbytes for parameter in network.parameters())
        if stored:
            store_frozen_in_bfloat16(network)
            assert sum(parameter.nbytes for parameter in network.parameters()) < 0.8 * whole
        given = torch.Generator().manual_seed(7)
        latent = torch.randn(2, 4, 4, 4, generator=given)
        prediction = network(
            latent,
            torch.tensor([3, 900]),
            masked_latent=latent.flip(0),
            keep_mask_latent=latent[:, :1] * 0,
            exemplar_tokens=torch.randn(2, 1, WIDTH, generator=given),
            drop_condition=torch.tensor([False, True]),
        )
        prediction.float().square().mean().backward()
        gradients = [parameter.grad for parameter in network.parameters() if parameter.requires_grad]
        steps.append([prediction, *gradients])
    assert all(torch.equal(one, other) for one, other in zip(*steps, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "world"), [(0, 1), (3, 2)])
def test_averaged_updates_are_an_adapter_too(
    place: Place, base: tuple[str, str], straight: dict[str, str], stage: int, world: int
) -> None:
    folder, store, _ = place
    name = f"averaged-{stage}"
    averaged = {"ema_decay": 0.99, "ema_keep_raw": True, "zero_stage": stage, "workers": world}
    run_ranks(train, _spec(place, base, "lora", name, **averaged), world=world, tmp=folder)
    found = [_export(store, name), _export(store, name) / RAW, _export(store, straight["lora"])]
    mean, raw, wanted = (load_file(export / "adapter" / LORA_FILE) for export in found)
    read = [tensor for tensor in wanted if ".to_v." in tensor]  # queries and keys of one token move by rounding alone
    assert read and all(torch.allclose(raw[tensor], wanted[tensor], rtol=0, atol=1e-5) for tensor in read)
    assert all(0 < (mean[tensor] - raw[tensor]).abs().max() < 0.05 for tensor in read)


@pytest.mark.slow
def test_a_checkpoint_of_other_parameters_is_refused(
    place: Place, base: tuple[str, str], straight: dict[str, str]
) -> None:
    folder = place[0]
    for kind, origin in (("lora", straight["cross_attention"]), ("cross_attention", straight["lora"])):
        spec = _spec(place, base, kind, f"other-{kind}", steps=20, origin=(origin, PART_STEPS))
        with pytest.raises(
            RankDiedError, match=r"EngineError: .*this checkpoint (does not match|was trained on other)"
        ):
            run_ranks(train, spec, world=1, tmp=folder)


@pytest.fixture
def stage(place: Place) -> Stage:
    return Stage("train", "full", profile("tiny"), place[1], repo_root())


def _stage_config(trainable: Any) -> TrainConfig:
    return tiny_config(trainable=trainable, init="models/mine/adapter")


@pytest.mark.parametrize("theirs", [("v", "squaredcos_cap_v2"), ("x0", "scaled_linear")])
def test_weights_that_stay_as_they_are_keep_their_objective(theirs: tuple[Objective, BetaSchedule]) -> None:
    """Sampled by another, they would be scored as if the model were bad."""
    objective, beta_schedule = theirs
    scheduler = scheduler_config(beta_schedule, objective)
    ours = {"objective": "x0", "beta_schedule": "squaredcos_cap_v2", "init": "models/theirs"}
    wanted = rf"predicts {objective} under the noise schedule {beta_schedule}; set train\.objective: {objective} and"
    for changes in ({"steps": 0}, {"trainable": "cross_attention"}, {"trainable": LORA}):
        with pytest.raises(StageError, match=wanted):
            refuse_other_objective(tiny_config(**ours | changes), scheduler)
        refuse_other_objective(tiny_config(**ours | changes), scheduler_config("squaredcos_cap_v2", "x0"))
    refuse_other_objective(tiny_config(**ours), scheduler)  # the whole network learns it


def test_an_adapter_needs_its_own_settings_codec_and_base(
    place: Place, base: tuple[str, str], straight: dict[str, str], stage: Stage, tmp_path: Path
) -> None:
    _, store, encoded = place
    adapter = _export(store, straight["lora"]) / "adapter"
    found, stored = adapter_weights(stage, _stage_config(LORA), encoded, adapter)
    assert (found, stored.base_name, stored.path) == (base, "models/golden", store_adapter(store, adapter))
    wanted = r"an adapter; to train it further, set train\.trainable: \{lora: \{rank: 3, alpha: 6\.0\}\}"
    for other in ("all", {"lora": {"rank": 4, "alpha": 6}}):
        cfg = tiny_config(trainable=other, init="models/mine/adapter")
        with pytest.raises(StageError, match=wanted):
            adapter_weights(stage, cfg, encoded, adapter)
    pixels = replace(
        encoded, config=dict(encoded.config) | {"codec": {"kind": "pretrained", "path": "parts/weights/vae-0"}}
    )
    with pytest.raises(StageError, match=r"its codec is not .*\{kind: pretrained, weights: models/golden\}"):
        adapter_weights(stage, _stage_config(LORA), pixels, adapter)
    moved = replace(stage, store=Store(str(tmp_path / "elsewhere")))
    moved.store.copy_file_in(Path(store.path(encoded.config["codec"]["path"])), encoded.config["codec"]["path"])
    with pytest.raises(WeightsError, match="models/golden: no such folder"):
        adapter_weights(moved, _stage_config(LORA), encoded, adapter)
