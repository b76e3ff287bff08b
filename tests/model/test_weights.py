"""A model folder: exact round trip; the published layout; anything missing, unknown or damaged is one clear error."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pbe.errors import UserError
from pbe.model.folder import ModelError, guidance_scale_of
from pbe.model.weights import load_model, save_model
from tests.memory import in_memory_of
from tests.tiny_weights import CONTEXT_WIDTH, IMAGE_PX, REFERENCE_PX, clip_of, mapper_of, paper_model, state_of

UNET = "unet/diffusion_pytorch_model.safetensors"
ENCODER = "image_encoder/model.safetensors"
SAMPLE_FILES = (
    "pbe.json",
    "unet/config.json",
    UNET,
    "image_encoder/config.json",
    ENCODER,
    "codec/codec.safetensors",
    "scheduler/scheduler_config.json",
)
PAPER_FILES = (
    *(name for name in SAMPLE_FILES if not name.startswith("codec")),
    "model_index.json",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "feature_extractor/preprocessor_config.json",
)


@pytest.fixture
def paper_folder(tmp_path: Path) -> Path:
    save_model(tmp_path / "paper", paper_model())
    return tmp_path / "paper"


def _files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _refused(folder: Path, *words: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert isinstance(caught.value, UserError) and "\n" not in message and str(folder) in message
    assert all(word in message for word in words), message


def test_a_guidance_scale_that_is_no_number_is_refused(model_folder: Path) -> None:
    card = json.loads((model_folder / "pbe.json").read_text())
    assert "guidance_scale" not in card and guidance_scale_of(model_folder) is None
    for scale in ("3", True, [3.0]):
        (model_folder / "pbe.json").write_text(json.dumps(card | {"guidance_scale": scale}))
        _refused(model_folder, f"pbe.json: guidance_scale = {scale!r}: must be a finite number")


@pytest.mark.parametrize("kind", ["model_folder", "paper_folder"])
def test_the_round_trip_is_exact_and_saving_again_gives_the_same_bytes(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder: Path = request.getfixturevalue(kind)
    model = load_model(folder)
    assert not model.network.training
    save_model(tmp_path / "again", model)
    assert _files(tmp_path / "again") == _files(folder)
    assert sorted(_files(folder)) == sorted(PAPER_FILES if kind == "paper_folder" else SAMPLE_FILES)
    if kind == "paper_folder":
        before, after = state_of(paper_model()), state_of(model)
        assert before.keys() == after.keys()
        assert max(float((before[name] - after[name]).abs().max()) for name in before) == 0


def test_weights_are_stored_as_float32_whatever_they_were(tmp_path: Path, model_folder: Path) -> None:
    model = load_model(model_folder)
    model.network.bfloat16()
    save_model(tmp_path / "half", model)
    assert {value.dtype for value in load_file(tmp_path / "half" / UNET).values()} == {torch.float32}
    assert load_model(tmp_path / "half").network.unet.conv_in.weight.dtype == torch.float32


def test_a_published_folder_has_no_card_of_ours_and_opens_with_what_its_parts_say(paper_folder: Path) -> None:
    (paper_folder / "pbe.json").unlink()
    config = json.loads((paper_folder / "image_encoder" / "config.json").read_text())
    for ours in ("mapper_width", "mapper_blocks"):
        del config[ours]
    (paper_folder / "image_encoder" / "config.json").write_text(json.dumps(config))
    model = load_model(paper_folder)
    card = model.card
    assert (card.image_px, card.reference_px, card.reference_pad_px) == (IMAGE_PX, REFERENCE_PX, 10)
    assert len(mapper_of(model).mapper.blocks) == 2 and mapper_of(model).proj_out.out_features == CONTEXT_WIDTH


@pytest.mark.parametrize("names", ["transformers 4", "transformers 5", "with position_ids"])
def test_the_image_encoder_is_read_under_old_and_new_names(names: str, paper_folder: Path) -> None:
    expected = clip_of(load_model(paper_folder)).state_dict()
    tensors = load_file(paper_folder / ENCODER)
    assert any(name.startswith("model.vision_model.encoder.") for name in tensors)
    if names == "transformers 5":
        tensors = {name.replace("model.vision_model.", "model."): value for name, value in tensors.items()}
    if names == "with position_ids":
        tensors["model.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(tensors, paper_folder / ENCODER)
    got = clip_of(load_model(paper_folder)).state_dict()
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in got)


@pytest.mark.parametrize("safetensors", [True, False], ids=["safetensors", "pickles"])
def test_diffusers_opens_the_folder_and_what_it_saves_opens_here(
    safetensors: bool, paper_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "diffusers.pipelines.deprecated.paint_by_example"
    theirs = pytest.importorskip(name, reason="this diffusers has no PaintByExamplePipeline any more")
    # the two lines of the README: diffusers 0.38 moved the module that model_index.json names
    monkeypatch.setattr("diffusers.pipelines.paint_by_example", theirs, raising=False)
    pipeline = theirs.PaintByExamplePipeline.from_pretrained(paper_folder)
    for part, file in (("unet", UNET), ("image_encoder", ENCODER), ("vae", "vae/diffusion_pytorch_model.safetensors")):
        opened, written = getattr(pipeline, part).state_dict(), load_file(paper_folder / file)
        renamed = {key.replace("model.vision_model.", "model."): value for key, value in written.items()}
        assert opened.keys() == renamed.keys() and all(torch.equal(opened[key], renamed[key]) for key in opened), part

    pipeline.save_pretrained(tmp_path / "saved", safe_serialization=safetensors)
    before, after = state_of(load_model(paper_folder)), state_of(load_model(tmp_path / "saved"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_the_sizes_of_an_encoder_that_diffusers_saved_are_at_the_top_of_its_config(paper_folder: Path) -> None:
    """diffusers' class takes CLIP's whole config, so a saved one has a default vision_config next to its own sizes."""
    expected = load_model(paper_folder)
    defaults = {"hidden_size": 768, "num_hidden_layers": 12, "patch_size": 32, "projection_dim": 512}
    _edit_json(paper_folder / "image_encoder" / "config.json", model_type="clip", vision_config=defaults)
    before, after = state_of(expected), state_of(load_model(paper_folder))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", SAMPLE_FILES)
def test_a_missing_file_is_named(name: str, model_folder: Path) -> None:
    (model_folder / name).unlink()
    if name == "pbe.json":  # a published folder has none
        return
    parent, _, file = name.rpartition("/")
    missing = f"no {file}" if parent != "codec" else "neither vae/ nor codec/"
    _refused(model_folder, parent, file if "config" in name else missing)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    _refused(tmp_path / "nothing", "no unet/config.json", "models/<variant>")


@pytest.mark.parametrize(
    ("file", "change"),
    [(UNET, "missing"), (ENCODER, "unexpected"), ("vae/diffusion_pytorch_model.safetensors", "another shape")],
)
def test_tensors_must_fit_one_by_one(file: str, change: str, paper_folder: Path) -> None:
    """test_tensors.py covers every kind of damage."""
    tensors = load_file(paper_folder / file)
    name = next(name for name in sorted(tensors) if name.endswith("weight") and "mapper" not in name)
    if change == "unexpected":
        name = "mapper.extra.weight"
        tensors[name] = torch.zeros(1)
    elif change == "another shape":
        tensors[name] = tensors[name][:-1].contiguous()
    else:
        del tensors[name]
    save_file(tensors, paper_folder / file)
    _refused(paper_folder, "do not fit", change, name)


def _edit_json(path: Path, **changes: Any) -> None:
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


@pytest.mark.parametrize(
    ("file", "changes", "word"),
    [
        ("pbe.json", {"image_px": None}, "image_px"),
        ("pbe.json", {"colour": 3}, "colour"),
        ("image_encoder/config.json", {"hidden_size": None}, "hidden_size"),
        ("image_encoder/config.json", {"projection_dim": None}, "projection_dim"),
        ("image_encoder/config.json", {"model_type": "siglip"}, "a siglip model, not CLIP"),
        ("image_encoder/config.json", {"backbone": "resnet"}, "resnet"),
    ],
)
def test_configs_that_do_not_fit_are_refused(file: str, changes: dict[str, Any], word: str, paper_folder: Path) -> None:
    _edit_json(paper_folder / file, **changes)
    _refused(paper_folder, word)


def test_stable_diffusion_alone_or_its_inpainting_model_are_not_paint_by_example(paper_folder: Path) -> None:
    from tests.tiny_weights import tiny_unet

    for channels in (4, 8):
        tiny_unet(in_channels=channels).save_pretrained(paper_folder / "unet")
        _refused(paper_folder, f"{channels} channels in", "9 in, 4 out")


@pytest.mark.parametrize("name", SAMPLE_FILES)
def test_a_damaged_file_is_refused(name: str, model_folder: Path) -> None:
    data = (model_folder / name).read_bytes()
    for damaged in (data[: len(data) // 2], b"", b"\x80\x04pickle"):
        (model_folder / name).write_bytes(damaged)
        _refused(model_folder)


@pytest.mark.parametrize("file", [UNET, ENCODER, "vae/diffusion_pytorch_model.safetensors"])
def test_a_value_that_is_not_finite_is_named_and_neither_opened_nor_written(
    file: str, paper_folder: Path, tmp_path: Path
) -> None:
    tensors = load_file(paper_folder / file)
    name = sorted(tensors)[-1]
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, paper_folder / file)
    _refused(paper_folder, str((paper_folder / file).parent), f"such as {name};")
    model = paper_model()
    next(model.network.unet.parameters()).data[0] = float("inf")
    with pytest.raises(UserError, match=r"unet/diffusion_pytorch_model\.safetensors: not written: .*conv_in"):
        save_model(tmp_path / "out", model)
    assert not (tmp_path / "out" / UNET).exists()


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("unet/config.json", {"block_out_channels": [32000, 64000]}),
        ("image_encoder/config.json", {"hidden_size": 64_000, "intermediate_size": 640_000}),
        ("image_encoder/config.json", {"mapper_width": 200_000}),
        ("vae/config.json", {"block_out_channels": [80_000] * 4}),
    ],
)
def test_a_damaged_size_in_a_config_takes_no_memory(file: str, changes: dict[str, Any], paper_folder: Path) -> None:
    _edit_json(paper_folder / file, **changes)
    with in_memory_of(1 << 30):
        _refused(paper_folder, "do not fit")


def test_a_codec_without_its_tensors_is_refused(model_folder: Path) -> None:
    save_file({"mean": torch.zeros(3)}, model_folder / "codec" / "codec.safetensors")
    _refused(model_folder, "basis")
