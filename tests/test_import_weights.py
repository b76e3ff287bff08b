"""`pbe import`: an imported checkpoint computes the same; anything else is a one-line error, and nothing is written."""

import hashlib
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pbe import import_weights as module
from pbe.cli.__main__ import main
from pbe.diffusion.scheduler_config import scheduler_config
from pbe.errors import UserError
from pbe.import_weights import import_weights, table_text
from pbe.model.ldm import FIRST_CONVOLUTION
from pbe.model.weights import Model, load_model, save_model
from tests import ldm_layout
from tests.tiny_weights import (
    CONTEXT_WIDTH,
    REFERENCE_PX,
    clip_backbone_of,
    clip_of,
    paper_model,
    state_of,
    tiny_unet,
    tiny_vae,
    vae_of,
)

Writer = Callable[[dict[str, Tensor], Path], None]


@pytest.fixture(scope="module")
def original() -> Model:
    return ldm_layout.ldm_model()


@pytest.fixture(scope="module")
def tensors(original: Model) -> dict[str, Tensor]:
    return ldm_layout.paint_by_example(original)


@pytest.fixture(scope="module")
def stable_diffusion() -> dict[str, Tensor]:
    return ldm_layout.stable_diffusion(tiny_unet(), tiny_vae(32, 32))


@pytest.fixture
def lightning() -> Iterator[type]:
    """A class that only the writing process knows."""
    fake = types.ModuleType("pytorch_lightning_like")

    class ModelCheckpoint(dict):
        pass

    ModelCheckpoint.__module__, ModelCheckpoint.__qualname__ = fake.__name__, "ModelCheckpoint"
    fake.ModelCheckpoint = ModelCheckpoint  # type: ignore[attr-defined]
    sys.modules[fake.__name__] = fake
    yield ModelCheckpoint
    sys.modules.pop(fake.__name__, None)


def _save(tensors: dict[str, Tensor], path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: value.contiguous().clone() for name, value in tensors.items()}, path)
    else:
        torch.save({"state_dict": tensors, "epoch": 39, "global_step": 7}, path)
    return path


def _same(got: Model, expected: Model, tolerance: float = 0) -> None:
    """All tensors, and every part's output for random input."""
    a, b = state_of(got), state_of(expected)
    assert a.keys() == b.keys()
    assert max(float((a[name].float() - b[name].float()).abs().max()) for name in a) <= tolerance
    for x, y in zip(_outputs(got), _outputs(expected), strict=True):
        assert x.abs().max() > 0.01 and float((x - y).abs().max()) <= 50 * tolerance


@torch.no_grad()
def _outputs(model: Model) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, REFERENCE_PX, REFERENCE_PX), generator=generator).to(torch.uint8)
    tokens = clip_backbone_of(model)(images)[:, None]
    noisy, masked = torch.randn(2, 2, 4, 4, 4, generator=generator)
    prediction = model.network(
        noisy,
        torch.tensor([5, 900]),
        masked_latent=masked,
        keep_mask_latent=torch.rand(2, 1, 4, 4, generator=generator),
        exemplar_tokens=tokens,
        drop_condition=torch.tensor([False, True]),
    )
    mean, std = model.codec.posterior(torch.rand(1, 3, 32, 32, generator=generator) * 2 - 1)
    return [tokens, prediction, mean, std, model.codec.decode(mean)]


# -- Paint by Example, one file --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors"])
def test_an_official_checkpoint_computes_the_same(
    name: str, original: Model, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    source = _save(tensors, tmp_path / name)
    imported = import_weights(source, tmp_path / "out")
    model = load_model(tmp_path / "out")
    _same(model, original)
    assert imported.kind == "Paint by Example" and imported.notes == ()
    assert imported.sha256 == {name: hashlib.sha256(source.read_bytes()).hexdigest()}
    assert sum(imported.found.values()) + sum(imported.left_out.values()) == len(tensors)
    assert (model.card.image_px, model.card.reference_px, model.card.reference_pad_px) == (512, REFERENCE_PX, 10)
    assert model.card.scheduler == scheduler_config("scaled_linear", "eps")
    assert model.network.unet.config.attention_head_dim == 8
    assert vae_of(model).config.scaling_factor == 0.18215
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["_class_name"] == "PaintByExamplePipeline"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "out"])


def test_lightnings_objects_beside_the_weights_do_not_matter(
    lightning: type, original: Model, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-5}]}
    held = {
        "state_dict": tensors,
        "callbacks": {lightning: lightning(best=3)},
        "optimizer_states": [optimizer],
        "hyper_parameters": types.SimpleNamespace(lr=1e-5),
    }
    torch.save(held, tmp_path / "model.ckpt")
    del sys.modules[lightning.__module__]
    import_weights(tmp_path / "model.ckpt", tmp_path / "out")
    _same(load_model(tmp_path / "out"), original)


def test_half_precision_is_widened_and_stays_what_it_was(
    original: Model, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    half = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
    import_weights(_save(half, tmp_path / "half.safetensors"), tmp_path / "out")
    stored = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float32}
    assert torch.equal(stored["conv_in.weight"], half[FIRST_CONVOLUTION].float())
    _same(load_model(tmp_path / "out"), original, tolerance=2e-3)


def test_bfloat16_is_imported_like_float16(original: Model, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    short = {name: value.bfloat16() if value.is_floating_point() else value for name, value in tensors.items()}
    import_weights(_save(short, tmp_path / "bf16.ckpt"), tmp_path / "out")
    _same(load_model(tmp_path / "out"), original, tolerance=2e-2)


def test_a_checkpoint_is_read_by_its_content(original: Model, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    _save(tensors, tmp_path / "a.safetensors").rename(tmp_path / "a.ckpt")
    torch.save({"model": tensors, "step": torch.tensor(7)}, tmp_path / "b.safetensors")
    for name in ("a.ckpt", "b.safetensors"):
        import_weights(tmp_path / name, tmp_path / f"out-{name}")
        _same(load_model(tmp_path / f"out-{name}"), original)


def test_an_empty_folder_may_be_the_target(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    import_weights(_save(tensors, tmp_path / "model.ckpt"), tmp_path / "out")
    assert load_model(tmp_path / "out").network.unet.config.cross_attention_dim == CONTEXT_WIDTH


def test_another_noise_schedule_is_refused(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    """Stable Diffusion's betas without their square roots, and a schedule of 500 steps."""
    linear = torch.cumprod(1 - torch.linspace(0.00085, 0.012, 1000), 0)
    for alphas in (linear, tensors["alphas_cumprod"][:500]):
        _refused(_save({**tensors, "alphas_cumprod": alphas}, tmp_path / "a.ckpt"), tmp_path, "noise schedule")


# -- Stable Diffusion, one file --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "widened"), [("sd.ckpt", False), ("sd.safetensors", True)], ids=["4 channels", "upstream's 9"]
)
def test_stable_diffusion_becomes_unet_and_vae_without_text_encoder_and_ema(
    widened: bool, name: str, stable_diffusion: dict[str, Tensor], tmp_path: Path
) -> None:
    tensors = dict(stable_diffusion)
    if widened:
        first = tensors[FIRST_CONVOLUTION]
        tensors[FIRST_CONVOLUTION] = torch.cat([first, torch.zeros(first.shape[0], 5, 3, 3)], dim=1)
    imported = import_weights(_save(tensors, tmp_path / name), tmp_path / "out")
    assert sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")) == [
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet").eval()
    vae = AutoencoderKL.from_pretrained(tmp_path / "out" / "vae").eval()
    for got, expected in ((unet, tiny_unet()), (vae, tiny_vae(32, 32))):
        a, b = got.state_dict(), expected.state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    latent, context = torch.randn(1, 4, 4, 4), torch.randn(1, 3, CONTEXT_WIDTH)
    with torch.no_grad():
        assert torch.equal(unet(latent, 7, context).sample, tiny_unet()(latent, 7, context).sample)
        assert torch.equal(vae.decode(latent).sample, tiny_vae(32, 32).decode(latent).sample)
    text = table_text(imported)
    assert "text encoder" in text and "model_ema.*" in text and ("channels are zero" in text) == widened
    assert sum(imported.found.values()) + sum(imported.left_out.values()) == len(tensors)


# -- a folder of the hub ---------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A folder as published: pickles, old names in the VAE, no card, an unused folder, a half-precision UNet."""
    folder = tmp_path / "hub"
    save_model(folder, paper_model())
    (folder / "pbe.json").unlink()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for path in list(folder.rglob("*.safetensors")):
        tensors = load_file(path)
        if path.parent.name == "unet":
            tensors = {name: value.half() for name, value in tensors.items()}
        if path.parent.name == "vae":
            for new, before in old.items():
                tensors = {n.replace(new, before) if "attentions" in n else n: v for n, v in tensors.items()}
        if path.parent.name == "image_encoder":
            tensors["model.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
        stem = "pytorch_model" if path.stem == "model" else path.stem
        torch.save(tensors, path.with_name(f"{stem}.bin"))
        path.unlink()
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "pytorch_model.bin").write_bytes(b"x")
    (folder / "README.md").write_text("x")
    (folder / ".gitattributes").write_text("x")
    return folder


def test_a_hub_folder_with_pickles_becomes_one_with_safetensors(hub: Path, tmp_path: Path) -> None:
    imported = import_weights(hub, tmp_path / "out")
    files = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert not any(name.endswith(".bin") for name in files) and "model.safetensors" in files
    _same(load_model(tmp_path / "out"), load_model(hub))
    _same(load_model(tmp_path / "out"), paper_model(), tolerance=1e-3)  # the UNet was in half precision
    expected = paper_model()
    assert imported.found == {
        "unet": len(expected.network.unet.state_dict()),
        "backbone": len(clip_of(expected).state_dict()),
        "mapper": len(expected.network.exemplar.state_dict()),
        "vae": len(vae_of(expected).state_dict()),
    }
    assert imported.left_out == {
        "position_ids (a counter in CLIP)": 1,
        "README.md (files)": 1,
        "safety_checker/ (files)": 1,
    }
    assert set(imported.sha256) == {
        "unet/diffusion_pytorch_model.bin",
        "image_encoder/pytorch_model.bin",
        "vae/diffusion_pytorch_model.bin",
    }


def test_a_hub_folder_of_copies_in_half_precision_alone_is_read(hub: Path, tmp_path: Path) -> None:
    for path in list(hub.rglob("*.bin")):
        if path.parent.name != "safety_checker":
            save_file(torch.load(path), path.with_name(f"{path.stem.removeprefix('pytorch_')}.fp16.safetensors"))
            path.unlink()
    imported = import_weights(hub, tmp_path / "out")
    _same(load_model(tmp_path / "out"), paper_model(), tolerance=1e-3)
    assert "vae/diffusion_pytorch_model.fp16.safetensors" in imported.sha256


def test_a_hub_folder_of_pointers_says_so(hub: Path, tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3438167534\n"
    (hub / "unet" / "diffusion_pytorch_model.bin").write_bytes(pointer)
    _refused(hub, tmp_path, "diffusion_pytorch_model.bin: a Git LFS pointer", "git lfs pull")


def test_a_folder_of_this_project_may_be_imported_too(tmp_path: Path, model_folder: Path) -> None:
    imported = import_weights(model_folder, tmp_path / "out")
    a, b = state_of(load_model(tmp_path / "out")), state_of(load_model(model_folder))
    assert all(torch.equal(a[name], b[name]) for name in b) and imported.found["backbone"] == 0


def test_stable_diffusions_folder_is_told_from_paint_by_examples(tmp_path: Path) -> None:
    tiny_unet().save_pretrained(tmp_path / "sd" / "unet")
    _refused(tmp_path / "sd", tmp_path, "no image_encoder", "needs no import")
    (tmp_path / "empty").mkdir()
    _refused(tmp_path / "empty", tmp_path, "no unet/config.json")


# -- refusals --------------------------------------------------------------------------------------------------------


def _refused(source: Path, tmp_path: Path, *words: str, out: str = "refused") -> None:
    """The import fails with one line that names the source, and writes nothing."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        import_weights(source, tmp_path / out)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in (str(source), *words)), message
    assert sorted(tmp_path.rglob("*")) == before


def test_a_partial_file_is_refused_and_leaves_nothing(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    """tests/model/test_ldm.py covers every kind."""
    some = {name: value for name, value in tensors.items() if name != "learnable_vector"}
    _refused(_save(some, tmp_path / "a.ckpt"), tmp_path, "missing 1 such as uncond_vector")
    _refused(_save({**tensors, "more": torch.zeros(1)}, tmp_path / "b.ckpt"), tmp_path, "unexpected 1 such as more")
    whole = _save(tensors, tmp_path / "c.ckpt").read_bytes()
    (tmp_path / "c.ckpt").write_bytes(whole[: len(whole) // 2])
    _refused(tmp_path / "c.ckpt", tmp_path, "damaged or incomplete weight file")
    _refused(tmp_path / "nothing.ckpt", tmp_path, "no such file")


@pytest.mark.parametrize("name", ["model.diffusion_model.out.2.weight", "learnable_vector", "proj_out.bias"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_refused_with_its_name(
    name: str, bad: float, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    damaged = tensors[name].clone()
    damaged.view(-1)[3] = bad
    _refused(_save({**tensors, name: damaged}, tmp_path / "a.ckpt"), tmp_path, "NaN or infinite", f"such as {name};")


def test_what_is_left_out_need_not_be_finite(stable_diffusion: dict[str, Tensor], tmp_path: Path) -> None:
    ema = {name: value * float("nan") for name, value in stable_diffusion.items() if name.startswith("model_ema.")}
    import_weights(_save({**stable_diffusion, **ema}, tmp_path / "sd.ckpt"), tmp_path / "out")


def test_tensors_that_are_no_layers_at_all_are_one_line(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    for name in (FIRST_CONVOLUTION, "cond_stage_model.mapper.resblocks.0.attn.c_qkv.weight", "proj_out.weight"):
        _refused(_save({**tensors, name: torch.tensor(3.0)}, tmp_path / "a.ckpt"), tmp_path)


def test_a_random_pickle_is_named_and_not_executed(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (exec, (f"import pathlib; pathlib.Path({str(tmp_path / 'owned')!r}).touch()",))

    torch.save({"state_dict": {"layer1.weight": torch.zeros(2)}, "x": Attack()}, tmp_path / "a.ckpt")
    _refused(tmp_path / "a.ckpt", tmp_path, "neither Paint by Example nor Stable Diffusion 1.x", "layer1.weight")
    torch.save(Attack(), tmp_path / "b.ckpt")
    _refused(tmp_path / "b.ckpt", tmp_path, "no tensors")


def test_a_target_that_is_taken_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(path: Path) -> dict[str, Tensor]:
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr(module, "read_tensors", never)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for out, word in (("full", "not empty"), ("file", "is a file"), ("nowhere/out", "there is no folder")):
        with pytest.raises(UserError, match=word):
            import_weights(tmp_path / "any.ckpt", tmp_path / out)
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("error", [SafetensorError("No space left"), OSError(28, "No space left"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_nothing(
    error: BaseException, tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path, model: Model) -> None:
        (folder / "half.bin").write_bytes(b"half")
        raise error

    monkeypatch.setattr(module, "save_model", fail)
    source = _save(tensors, tmp_path / "model.ckpt")
    kind = UserError if isinstance(error, SafetensorError) else type(error)
    with pytest.raises(kind):
        import_weights(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [source]


def test_what_a_killed_import_left_is_in_nobodys_way(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    (tmp_path / ".out.tmp").mkdir()
    (tmp_path / ".out.tmp" / "half.bin").write_bytes(b"half")
    import_weights(_save(tensors, tmp_path / "model.ckpt"), tmp_path / "out")
    assert not (tmp_path / ".out.tmp").exists() and not (tmp_path / "out" / "half.bin").exists()


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_counts_families_and_sha256(
    tensors: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = _save(tensors, tmp_path / "model.ckpt")
    assert main(["import", str(source), "--out", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    unet = sum(name.startswith("model.diffusion_model.") for name in tensors)
    rows = [line.split() for line in out.splitlines()]
    assert err == "" and rows[0] == ["Paint", "by", "Example"]
    assert ["unet", str(unet), "0", "0"] in rows and ["image", "encoder:", "mapper", "29", "0", "0"] in rows
    assert any(line.startswith("noise schedule") and line.endswith(" 12") for line in out.splitlines())
    assert ["sha256", hashlib.sha256(source.read_bytes()).hexdigest(), "model.ckpt"] in rows
    assert out.endswith(f"wrote {tmp_path / 'out'}\n")


def test_the_command_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = _save({"lora_unet_mid.lora_up.weight": torch.zeros(2)}, tmp_path / "a.safetensors")
    assert main(["import", str(source), "--out", str(tmp_path / "out")]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("pbe: error: ") and "a LoRA" in err
    assert not (tmp_path / "out").exists()
