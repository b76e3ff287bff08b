"""LoRA adapters: their folder, their base, and what they add to it; diffusers reads them too."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from pbe.edit import Editor
from pbe.export import export_model
from pbe.import_weights import import_weights
from pbe.model.adapter import (
    FILES,
    LORA_FILE,
    Adapter,
    AdapterError,
    Base,
    add_lora,
    load_adapted,
    load_adapter,
    merge_lora,
    read_adapter,
    save_adapter,
)
from pbe.model.folder import ADAPTER_FILE, STEM, ModelError, guidance_scale_of
from pbe.model.settings import LoraConfig
from pbe.model.tensors import WeightsError, folder_digest
from pbe.model.unet import ConditionedUNet
from pbe.model.weights import load_model, save_model
from tests.tiny_weights import lively, state_of, tiny_exemplar, tiny_unet, write_paint_by_example

CFG = LoraConfig(rank=2, alpha=3.0)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_paint_by_example(tmp_path / "base")


@pytest.fixture
def merged(tmp_path: Path, base: Path) -> Path:
    """As `train` exports it: the adapter in the folder of the merged model."""
    model, folder = load_model(base), tmp_path / "merged"
    add_lora(model.network.unet, CFG, seed=1)
    for name, parameter in model.network.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    lively(model.network.exemplar, 9)
    unet = f"parts/weights/unet-{folder_digest(base / 'unet', STEM)}"
    card = replace(model.card, run={"variant": "mine"}, guidance_scale=2.5)
    named = Base(name="models/base", unet=unet, image_encoder="parts/weights/image_encoder-0", codec_sha256=None)
    save_adapter(folder / "adapter", model.network, Adapter(named, CFG, card))
    merge_lora(model.network.unet)
    save_model(folder, replace(model, card=card))
    return folder


def test_an_adapter_on_its_base_is_the_merged_model_bit_for_bit(base: Path, merged: Path) -> None:
    one, other = load_adapted(merged / "adapter", base), load_model(merged)
    assert one.card == other.card
    states = state_of(one), state_of(other)
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    moved = [name for name, value in state_of(load_model(base)).items() if not torch.equal(value, states[0][name])]
    assert {name.split(".")[-2] for name in moved if ".unet." in name} == {"to_q", "to_k", "to_v", "0"}  # to_out.0
    assert any(name.startswith("network.exemplar.") for name in moved)
    assert not any(name.startswith(("codec.", "backbone.")) for name in moved)


@torch.no_grad()
def test_in_diffusers_the_base_with_the_adapter_computes_what_the_merged_model_does(base: Path, merged: Path) -> None:
    """Not merged there; without alpha, which is in the file's header, the updates would count less.

    In float64, because the order of sums alone changes a float32 result by 2e-6.
    """
    adapted = UNet2DConditionModel.from_pretrained(base / "unet")
    adapted.load_lora_adapter(merged / "adapter", prefix="unet", weight_name=LORA_FILE)
    whole = UNet2DConditionModel.from_pretrained(merged / "unet")
    plain = UNet2DConditionModel.from_pretrained(base / "unet")
    rng = torch.Generator().manual_seed(0)
    latent, context = (torch.randn(*shape, generator=rng).double() for shape in ((2, 9, 4, 4), (2, 1, 24)))
    wanted, found, without = (unet.double()(latent, 7, context).sample for unet in (whole, adapted, plain))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert (without - wanted).abs().max() > 1e-3


def test_the_editor_asks_for_the_base_and_checks_it(tmp_path: Path, base: Path, merged: Path) -> None:
    with pytest.raises(AdapterError, match="an adapter of models/base; load it with that as its base, merge it by "):
        Editor.load(merged / "adapter", device="cpu")
    with pytest.raises(AdapterError, match=r"an adapter of models/base; the UNet of .*merged is another"):
        Editor.load(merged / "adapter", base=merged, device="cpu")
    with pytest.raises(AdapterError, match="no adapter, so it has no base"):
        Editor.load(merged, base=base, device="cpu")
    assert Editor.load(merged / "adapter", base=base, device="cpu").card.run == {"variant": "mine"}


def test_its_card_names_a_guidance_scale_for_whoever_continues_it(base: Path, merged: Path) -> None:
    assert guidance_scale_of(merged / "adapter") == load_adapted(merged / "adapter", base).card.guidance_scale == 2.5
    file = merged / "adapter" / ADAPTER_FILE
    said = json.loads(file.read_text())
    file.write_text(json.dumps(said | {"card": said["card"] | {"guidance_scale": "2.5"}}))
    with pytest.raises(ModelError, match=r"adapter\.json: guidance_scale = '2\.5': must be a finite number"):
        read_adapter(merged / "adapter")


def test_import_merges_it_into_its_base(tmp_path: Path, base: Path, merged: Path) -> None:
    with pytest.raises(WeightsError, match="an adapter of models/base; name that model's folder by --base"):
        import_weights(merged / "adapter", tmp_path / "out")
    with pytest.raises(WeightsError, match="not an adapter's folder, so it has no base"):
        import_weights(merged, tmp_path / "out", base=base)
    imported = import_weights(merged / "adapter", tmp_path / "out", base=base)
    assert imported.notes == (f"LoRA of rank 2, merged into {base}",)
    for name in ("unet/diffusion_pytorch_model.safetensors", "image_encoder/model.safetensors", "pbe.json"):
        assert (tmp_path / "out" / name).read_bytes() == (merged / name).read_bytes(), name


def test_a_damaged_adapter_is_one_line(base: Path, merged: Path) -> None:
    adapter = merged / "adapter"
    said = json.loads((adapter / ADAPTER_FILE).read_text())
    (adapter / ADAPTER_FILE).write_text(json.dumps(said | {"lora": {"rank": 3, "alpha": 3.0}}))
    with pytest.raises(WeightsError, match=rf"{LORA_FILE}: these weights do not fit: of another shape"):
        load_adapted(adapter, base)
    (adapter / ADAPTER_FILE).write_text(json.dumps(said | {"lora": {"rank": -1}}))
    with pytest.raises(AdapterError, match=rf"{ADAPTER_FILE}: does not describe an adapter"):
        load_adapted(adapter, base)


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
def test_the_train_stage_checks_an_adapter_on_a_network_without_memory(merged: Path) -> None:
    with torch.device("meta"):
        network = ConditionedUNet(tiny_unet(in_channels=9), tiny_exemplar())
    add_lora(network.unet, CFG, seed=0)
    load_adapter(network, merged / "adapter")
    with torch.device("meta"):
        network = ConditionedUNet(tiny_unet(in_channels=9), tiny_exemplar())
    add_lora(network.unet, LoraConfig(rank=2, targets=("to_q",)), seed=0)
    with pytest.raises(WeightsError, match="do not fit: unexpected"):
        load_adapter(network, merged / "adapter")


def test_a_published_folder_has_the_adapter_and_its_card_says_of_what(tmp_path: Path, merged: Path) -> None:
    export_model(tmp_path, str(merged), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out" / "adapter").iterdir()) == sorted(FILES)
    assert "fine-tuned from models/base by LoRA of rank 2" in (tmp_path / "out" / "README.md").read_text()


@torch.no_grad()
def test_every_rank_adds_the_same_updates_and_they_change_nothing_at_first() -> None:
    """Ranks start from the same seed, and DeepSpeed broadcasts, but a rank that resumes alone must draw them again."""
    first, second, plain = (tiny_unet(in_channels=9) for _ in range(3))
    add_lora(first, CFG, seed=5)
    torch.manual_seed(1234)
    add_lora(second, CFG, seed=5)
    drawn = torch.rand(1)
    torch.manual_seed(1234)
    assert torch.equal(drawn, torch.rand(1))  # the process's generator is where it was
    tensors = first.state_dict()
    assert all(torch.equal(value, tensors[name]) for name, value in second.state_dict().items())
    assert {name.split(".")[-3] for name, p in first.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    latent, context = torch.randn(1, 9, 4, 4), torch.randn(1, 1, 24)
    assert torch.equal(first(latent, 7, context).sample, plain(latent, 7, context).sample)


def test_a_target_that_the_unet_lacks_is_named() -> None:
    cfg = LoraConfig(targets=("to_q", "to_x"))
    with pytest.raises(AdapterError, match=r"train\.trainable\.lora\.targets: .* named 'to_x'; it has .*conv1.* to_q"):
        add_lora(tiny_unet(), cfg, seed=0)
