"""A model folder: exact round trip; anything missing, unknown or damaged is one clear error; never a pickle."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pbe.errors import UserError
from pbe.model.codec import PatchCodec, codec_bytes
from pbe.model.unet import Architecture, ConditionedUNet
from pbe.model.weights import ModelCard, ModelError, load_model, save_model

FILES = ("model.json", "model.safetensors", "codec.safetensors")


def _refused(folder: Path, *words: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert isinstance(caught.value, UserError) and "\n" not in message and str(folder) in message
    assert all(word in message for word in words), message


def test_the_round_trip_is_exact(
    model_folder: Path, model: ConditionedUNet, codec: PatchCodec, card: ModelCard
) -> None:
    loaded, loaded_codec, loaded_card = load_model(model_folder)
    assert loaded_card == card and loaded.arch == card.arch
    assert not loaded.training
    state = model.state_dict()
    assert list(loaded.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert codec_bytes(loaded_codec) == codec_bytes(codec)


def test_saving_again_gives_the_same_bytes(model_folder: Path, tmp_path: Path) -> None:
    model, codec, card = load_model(model_folder)
    save_model(tmp_path / "again", model=model, codec=codec, card=card)
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (model_folder / name).read_bytes()
    assert sorted(path.name for path in model_folder.iterdir()) == sorted(FILES)


def test_weights_are_stored_as_float32_whatever_they_were(
    tmp_path: Path, model: ConditionedUNet, codec: PatchCodec, card: ModelCard
) -> None:
    save_model(tmp_path / "half", model=model.bfloat16(), codec=codec, card=card)
    assert {value.dtype for value in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.float32}
    assert load_model(tmp_path / "half")[0].unet.conv_in.weight.dtype == torch.float32


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(name: str, model_folder: Path) -> None:
    (model_folder / name).unlink()
    _refused(model_folder, f"no {name}", "models/<variant>")


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    _refused(tmp_path / "nothing", "no model.json")


@pytest.mark.parametrize("change", ["missing", "unknown", "other shape"])
def test_tensors_must_fit_one_by_one(change: str, model_folder: Path) -> None:
    tensors = load_file(model_folder / "model.safetensors")
    weight = tensors.pop("unet.conv_in.weight")
    if change == "unknown":
        tensors |= {"unet.conv_in.weight": weight, "unet.extra.weight": torch.zeros(1)}
    elif change == "other shape":
        tensors["unet.conv_in.weight"] = weight[:, :-1].contiguous()
    save_file(tensors, model_folder / "model.safetensors")
    _refused(model_folder, "unet.extra.weight" if change == "unknown" else "unet.conv_in.weight")


def _edit_json(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / "model.json").read_text())
    raw |= changes
    (folder / "model.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


def test_a_card_that_does_not_fit_is_refused(model_folder: Path, arch: Architecture) -> None:
    for changes, word in (({"arch": None}, "arch"), ({"colour": 3}, "colour"), ({"scheduler": None}, "scheduler")):
        before = (model_folder / "model.json").read_text()
        _edit_json(model_folder, **changes)
        _refused(model_folder, word)
        (model_folder / "model.json").write_text(before)
    _edit_json(
        model_folder,
        arch={**vars(replace(arch, context_width=12)), "block_channels": [8, 16], "attention": [False, True]},
    )
    _refused(model_folder)


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_refused(name: str, model_folder: Path) -> None:
    data = (model_folder / name).read_bytes()
    for damaged in (data[: len(data) // 2], b"", b"\x80\x04pickle"):
        (model_folder / name).write_bytes(damaged)
        _refused(model_folder)


def test_a_codec_without_its_tensors_is_refused(model_folder: Path) -> None:
    save_file({"mean": torch.zeros(3)}, model_folder / "codec.safetensors")
    _refused(model_folder, "basis")
