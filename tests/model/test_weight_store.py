"""Frozen networks are stored by content and open again, locally and from S3."""

import shutil
from pathlib import Path

import pytest
import torch

from pbe.model.clip import ClipBackbone
from pbe.model.codec import PatchCodec, codec_bytes
from pbe.model.folder import STEM
from pbe.model.tensors import WeightsError
from pbe.model.weight_store import open_backbone, open_codec, store_weights, store_whole_model, stored_folder
from pbe.store import Store
from tests.tiny_weights import REFERENCE_PX, tiny_clip, tiny_vae, write_clip, write_stable_diffusion

PIXELS = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def stable_diffusion(tmp_path: Path) -> Path:
    return write_stable_diffusion(tmp_path / "sd")


@pytest.mark.parametrize("where", ["local", "s3"])
def test_a_vae_opens_again_from_the_storage_when_its_folder_is_gone(
    where: str, tmp_path: Path, stable_diffusion: Path, s3: str
) -> None:
    store = Store(f"{s3}/frozen" if where == "s3" else str(tmp_path / "store"))
    path = store_weights(store, stable_diffusion / "vae", "vae", STEM)
    shutil.rmtree(stable_diffusion)
    codec = open_codec(store, {"kind": "kl", "path": path})
    wanted = tiny_vae().encode(PIXELS).latent_dist.mean * 0.18215
    torch.testing.assert_close(codec.posterior(PIXELS)[0], wanted, atol=1e-6, rtol=0)


def test_clip_opens_again_from_the_storage(store: Store, tmp_path: Path) -> None:
    path = store_weights(store, write_clip(tmp_path / "clip"), "clip", "model", "pytorch_model")
    backbone = open_backbone(store, {"kind": "clip", "path": path})
    images = torch.randint(0, 256, (2, 3, REFERENCE_PX, REFERENCE_PX), dtype=torch.uint8)
    assert isinstance(backbone, ClipBackbone)
    scaled = (images / 255 - backbone.pixel_mean) / backbone.pixel_std
    with torch.no_grad():
        torch.testing.assert_close(backbone(images), tiny_clip()(scaled).pooler_output, atol=1e-5, rtol=0)


def test_a_fitted_codec_opens_by_its_file(store: Store, codec: PatchCodec) -> None:
    store.write_bytes("parts/encode/codec-a/codec.safetensors", codec_bytes(codec))
    again = open_codec(store, {"kind": "patch", "path": "parts/encode/codec-a/codec.safetensors"})
    assert isinstance(again, PatchCodec) and torch.equal(again.basis, codec.basis)


def test_the_path_is_the_contents_and_a_second_copy_is_not_made(store: Store, stable_diffusion: Path) -> None:
    path = store_weights(store, stable_diffusion / "vae", "vae", STEM)
    marker = Path(store.path(f"{path}/config.json"))
    marker.write_text("{}")
    assert store_weights(store, stable_diffusion / "vae", "vae", STEM) == path
    assert marker.read_text() == "{}"
    assert store_weights(store, stable_diffusion / "unet", "vae", STEM) != path


def test_what_was_copied_in_part_is_copied_again(store: Store, stable_diffusion: Path) -> None:
    path = store_weights(store, stable_diffusion / "vae", "vae", STEM)
    folder = Path(store.path(path))
    (folder / "record.json").unlink()
    (folder / f"{STEM}.safetensors").write_bytes(b"half")
    store_weights(store, stable_diffusion / "vae", "vae", STEM)
    open_codec(store, {"kind": "kl", "path": path})


def test_shards_come_with_their_index(store: Store, tmp_path: Path) -> None:
    tiny_vae().save_pretrained(tmp_path / "vae", max_shard_size="60KB")
    assert len(list((tmp_path / "vae").glob("*.safetensors"))) > 1
    path = store_weights(store, tmp_path / "vae", "vae", STEM)
    with stored_folder(store, path) as folder:
        assert sorted(file.name for file in folder.iterdir() if file.name != "record.json") == sorted(
            file.name for file in (tmp_path / "vae").iterdir()
        )
    open_codec(store, {"kind": "kl", "path": path})


def test_a_folder_without_weights_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=f"no {STEM}"):
        store_weights(store, tmp_path, "vae", STEM)


def test_a_whole_model_is_stored_as_a_pipeline_loads_it(store: Store, stable_diffusion: Path, tmp_path: Path) -> None:
    """No code, no second copy of the weights, nothing hidden; shards and tokenizers; one path for equal contents."""
    kept = {
        "model_index.json", "unet/config.json", f"unet/{STEM}.safetensors", "vae/config.json",
        f"vae/{STEM}.safetensors", "tokenizer/merges.txt", "text_encoder/pytorch_model.bin",
    }  # fmt: skip
    left = {
        "evil.py", "unet/evil.py", f"unet/{STEM}.bin", f"unet/{STEM}.fp16.safetensors",
        f"vae/{STEM}.non_ema.safetensors", "v1-4.ckpt", "v1-4.safetensors", ".cache/x.json", "unet/sub/x.json",
    }  # fmt: skip
    path = store_whole_model(store, stable_diffusion)
    for name in kept | left:
        if not (file := stable_diffusion / name).exists():
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(b"{}")
    more = store_whole_model(store, stable_diffusion)
    assert set(store.list_files(more)) == kept | {"record.json"} and more != path
    shutil.copytree(stable_diffusion, tmp_path / "copy")
    assert store_whole_model(store, tmp_path / "copy") == more
    (tmp_path / "copy/tokenizer/merges.txt").write_text("other words")
    assert store_whole_model(store, tmp_path / "copy") != more


def test_a_folder_without_parts_is_no_whole_model(store: Store, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(WeightsError, match="no weights in subfolders"):
        store_whole_model(store, tmp_path)
