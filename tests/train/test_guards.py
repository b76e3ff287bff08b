"""Failures that must not go unnoticed: a non-finite loss, a parameter that does not learn, a frozen one that does."""

import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.numpy import load_file

from pbe.data.schema import array_bytes, array_value
from pbe.data.slots import slot_name
from pbe.model.unet import new_network
from pbe.store import Manifest, Store, make_manifest
from pbe.train.checkpoints import Run
from tests.train.ranks import (
    ARCH,
    RankDiedError,
    encoded_rows,
    loss_curve,
    run_ranks,
    take_said,
    tiny_config,
    tiny_encoded,
    tiny_spec,
    train,
    train_with_broken_weights,
)

pytestmark = pytest.mark.timeout(180)


def train_with_a_rate_that_explodes(spec: Any) -> None:
    from pbe.train import worker

    with patch.object(worker, "learning_rate", lambda cfg, step: 0.3 if step == 20 else 1e-3):
        worker.train_worker(spec, torch.device("cpu"))


def test_a_loss_that_jumps_is_said_once_with_the_checkpoint_before(place: tuple[Path, Store, Manifest]) -> None:
    folder, store, encoded = place
    spec = tiny_spec(store, encoded, tiny_config(steps=27, checkpoint_every=16), "jumps")
    run_ranks(train_with_a_rate_that_explodes, spec, world=1, tmp=folder)
    [line] = [line for line in take_said(folder).splitlines() if "jumped" in line]
    assert "at step 22; if it stays there" in line and line.endswith("by train.resume_from: jumps@16")
    assert loss_curve(store, "jumps")[21] > 2 * loss_curve(store, "jumps")[20]


def _with_a_nan(store: Store, encoded: Manifest) -> Manifest:
    """The same rows, but a NaN in the first latent of image2_3 in slot 0."""
    table = encoded_rows(2, 0, 6)
    column = table.column("source_mean").to_pylist()
    field = table.schema.field("source_mean")
    broken = array_value(field, column[3])
    broken[0, 0, 0] = np.nan
    column[3] = array_bytes(field, broken)
    index = table.schema.get_field_index("source_mean")
    table = table.set_column(index, table.schema.field(index), pa.array(column, table.schema.field(index).type))
    tables = {slot_name(0): table, slot_name(1): encoded_rows(2, 1, 6)}
    unit = store.write_unit("encode", "b0002-nan", tables, counts={"rows": 12}, rows_per_group=2)
    units = [*encoded.units[:2], unit, encoded.units[3]]
    return make_manifest("encode", config=encoded.config, version=1, units=units)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_loss_that_is_not_finite_stops_with_its_rows_after_saving(tmp_path: Path, stage: int) -> None:
    store = Store(str(tmp_path / "store"))
    encoded = _with_a_nan(store, tiny_encoded(store))
    cfg = tiny_config(zero_stage=stage, workers=2)
    said = ""
    for attempt in range(2):  # going on meets the same row again
        with pytest.raises(RankDiedError) as died:
            run_ranks(train, tiny_spec(store, encoded, cfg, "nan"), world=2, tmp=tmp_path)
        assert attempt == 0 or said == str(died.value).splitlines()[-1]
        said = str(died.value).splitlines()[-1]
    assert "1 of 8 rows: image2_3 slot 0 epoch 0 t " in said
    assert "Only these rows are affected" in said
    saved = Run(store, "nan").checkpoints()
    assert len(saved) == 1
    assert f"not finite at step {saved[0].step + 1}; the state before that step is saved" in said


def test_broken_weights_are_told_from_broken_rows(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    encoded = tiny_encoded(store)
    spec = tiny_spec(store, encoded, tiny_config(), "burst")
    with pytest.raises(
        RankDiedError, match=r"8 of 8 rows: .*All rows are affected: training has diverged; lower train\.lr"
    ):
        run_ranks(train_with_broken_weights, spec, world=1, tmp=tmp_path)


@pytest.mark.parametrize(("stage", "world"), [(0, 1), (3, 2)])
def test_what_is_trainable_moves_and_what_is_frozen_does_not(tmp_path: Path, stage: int, world: int) -> None:
    store = Store(str(tmp_path / "store"))
    encoded = tiny_encoded(store)
    # no decay; and an eps above the rounding that stands in for an exact zero, which AdamW would else blow up
    cfg = tiny_config(
        steps=6, zero_stage=stage, workers=world, weight_decay=0.0, adam_eps=1e-3, condition_dropout_prob=0.5
    )
    run_ranks(train, tiny_spec(store, encoded, cfg, "moves"), world=world, tmp=tmp_path)
    export = tmp_path / "store" / "runs" / "moves" / "export"
    torch.manual_seed(23)
    before = {name: value.detach().numpy() for name, value in new_network(ARCH).named_parameters()}
    after = {f"unet.{name}": value for name, value in load_file(next((export / "unet").glob("*.safetensors"))).items()}
    after |= {
        f"exemplar.{name}": value for name, value in load_file(export / "image_encoder" / "model.safetensors").items()
    }
    moved = {name: float(np.abs(value - after[name]).max()) for name, value in before.items()}
    still = {name for name, distance in moved.items() if distance < 1e-7}
    assert still == {name for name in before if _has_no_gradient(name)}
    assert not any(math.isnan(float(value.sum())) for value in after.values())
    codec = encoded.config["codec"]["path"]
    assert (export / "codec" / "codec.safetensors").read_bytes() == store.read_bytes(codec)


def _has_no_gradient(name: str) -> bool:
    """One key in the attention: softmax over it is 1, whatever queries and keys are (REFERENCE: upstream issue 14)."""
    to_one_token = ".attn2." in name or name.startswith("exemplar.mapper.")
    if ".attn2." in name or (to_one_token and ".attn1." in name):
        return ".to_q." in name or ".to_k." in name
    # the norm before the cross-attention of the UNet feeds its queries alone
    return name.startswith("unet.") and ".norm2." in name and "transformer_blocks" in name
