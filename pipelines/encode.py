"""encode: turn triplets into codec latents and exemplar tokens, in Ray Data actors that hold the models.

Training then runs no encoder. The codec is AutoencoderKL, or a small one that is fitted here, in closed form, on the
first `fit_crops` source crops in manifest order. For each row the reference is encoded `reference_draws` times: draw 0
clean, the others with fresh augmentation.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pbe.data import images
from pbe.data.schema import TRIPLETS, require
from pbe.data.slots import slot_files
from pbe.model.backbone import Backbone, load_backbone
from pbe.model.codec import codec_bytes, codec_from_bytes, fit_patch_codec
from pbe.model.folder import CODEC_FILE, STEM, STEMS
from pbe.model.hub import part_folder, weights_folder
from pbe.model.settings import EncodeConfig, PatchCodecConfig
from pbe.model.weight_store import store_weights
from pbe.store import File, Manifest, Record, Store, digest, load_manifest, make_manifest, save_manifest
from pipelines.runtime.parts import Unit, run_units, torch_device
from pipelines.runtime.progress import with_progress
from pipelines.runtime.stage import Stage, StageError, save_counts

# names parts and fitted codec, in place of the code: raise it when their bytes change for the same settings and inputs
VERSION = 2


def main(stage: Stage) -> None:
    cfg, seed = stage.params.encode, stage.params.seed
    triplets = load_manifest(stage.input("materialize"))
    codec, backbone = _codec_entry(stage, triplets), _backbone_entry(stage)
    settings = cfg.model_dump(
        mode="json", include={"reference_draws", "precision", "dtype", "rows_per_group", "batch_rows"}
    )
    config = {**settings, "codec": codec, "backbone": backbone}

    units = []
    for unit in triplets.units:
        slots = tuple(file for file in unit.files if file.dataset.startswith("slot-"))
        identity = digest(["encode", VERSION, seed, config, [file.sha256 for file in slots]])
        units.append(Unit(unit.unit.split("-")[0], identity, slots))
    records = run_units(
        stage,
        "encode",
        units,
        worker=partial(_worker, stage.store, cfg, stage.params.materialize.image_px, codec, backbone, seed),
        each=cfg.per_actor,
        key="encode",
        actors=cfg.actors,
    )
    # besides what the units depend on, name the triplets, for stages that read both
    manifest = make_manifest(
        "encode", config={**config, "seed": seed, "triplets": triplets.digest}, version=VERSION, units=records
    )
    assert manifest.counts["rows"] == triplets.counts["triplets"]
    save_counts(stage, dict(manifest.counts))
    save_manifest(stage.outputs / "manifest.json", manifest)


def _codec_entry(stage: Stage, triplets: Manifest) -> dict[str, Any]:
    """Return the manifest's entry for the codec: fitted now, or copied to the storage from the named weights."""
    cfg, image_px = stage.params.encode.codec, stage.params.materialize.image_px
    if cfg.kind == "patch":
        path = _fit_codec(stage, triplets, cfg)
        return {"kind": "patch", "path": path, "patch_px": cfg.patch_px, "channels": cfg.channels}
    whole = weights_folder(cfg.weights, parts=["vae", ""])
    if (whole / CODEC_FILE).is_file():
        return _copied_codec(stage, whole / CODEC_FILE)
    from pbe.model.vae import load_vae  # imports diffusers, for seconds

    folder = part_folder(whole, "vae")
    vae = load_vae(folder)
    if image_px % vae.patch_px:
        raise StageError(f"materialize.image_px = {image_px}: {cfg.weights} needs multiples of {vae.patch_px}")
    path = store_weights(stage.store, folder, "vae", STEM)
    print(f"encode: codec {cfg.weights}, sha256 {vae.digest}")
    return {"kind": "kl", "path": path, "patch_px": vae.patch_px, "channels": vae.channels}


def _copied_codec(stage: Stage, file: Path) -> dict[str, Any]:
    """Store the patch codec of the model to fine-tune: a newly fitted one would have other latents."""
    data = file.read_bytes()
    codec = codec_from_bytes(data, str(file))
    path = f"parts/encode/codec-{hashlib.sha256(data).hexdigest()[:16]}/codec.safetensors"
    stage.store.write_bytes(path, data)
    return {"kind": "patch", "path": path, "patch_px": codec.patch_px, "channels": codec.channels}


def _backbone_entry(stage: Stage) -> dict[str, Any]:
    cfg, reference_px = stage.params.encode.backbone, stage.params.materialize.reference_px
    if cfg.kind == "efficientnet_lite0":
        backbone: Backbone = load_backbone(cfg.kind)
        entry = {"kind": cfg.kind, "digest": backbone.digest}
    else:
        from pbe.model.clip import load_clip  # imports transformers, for seconds

        folder = part_folder(weights_folder(cfg.weights, parts=["image_encoder", ""]), "image_encoder")
        backbone = load_clip(folder)
        entry = {"kind": "clip", "path": store_weights(stage.store, folder, "clip", *STEMS)}
        print(f"encode: backbone {cfg.weights}, sha256 {backbone.digest}")
    if backbone.input_px != reference_px:
        raise StageError(f"materialize.reference_px = {reference_px}: this backbone takes {backbone.input_px} px")
    token_count = 1 if cfg.tokens == "class" else backbone.token_count
    return {**entry, "width": backbone.width, "tokens": cfg.tokens, "token_count": token_count}


def _fit_codec(stage: Stage, triplets: Manifest, cfg: PatchCodecConfig) -> str:
    """Return the storage path of the fitted codec, named by the digest of the files that its crops come from.

    Once the first shards hold `fit_crops` crops, new photos change neither the codec nor the parts of other shards.
    """
    files = list(_first_files(triplets, cfg.fit_crops))
    shape = [cfg.patch_px, cfg.channels, cfg.fit_crops]
    path = f"parts/encode/codec-{digest([*shape, [file.sha256 for file in files], VERSION])}/codec.safetensors"
    if not stage.store.exists(path):
        crops = with_progress(
            _crops(stage.store, files, cfg.fit_crops), "encode: codec", total=cfg.fit_crops, unit="crop"
        )
        codec, explained = fit_patch_codec(crops, patch_px=cfg.patch_px, channels=cfg.channels)
        print(f"encode: {cfg.channels} components keep {explained:.1%} of the patch variance")
        stage.store.write_bytes(path, codec_bytes(codec))
    return path


def _first_files(triplets: Manifest, crops: int) -> Iterator[File]:
    """Files with the first `crops` rows, slot by slot."""
    rows = 0
    for file in (file for files in slot_files(triplets) for file in files):
        if rows >= crops:
            return
        rows += file.rows
        yield file


def _crops(store: Store, files: Sequence[File], limit: int) -> Iterator[np.ndarray]:
    left = limit
    for file in files:
        for data in store.read_table(file, columns=["source"]).column("source").to_pylist()[:left]:
            left -= 1
            yield images.decode(data)


def _worker(
    store: Store,
    cfg: EncodeConfig,
    image_px: int,
    codec_entry: dict[str, Any],
    backbone_entry: dict[str, Any],
    seed: int,
) -> Callable[[Unit], Record]:
    import torch

    from pbe.data.reference import make_augmenter
    from pbe.encode import encode_triplets
    from pbe.model.precision import float32_products
    from pbe.model.weight_store import open_backbone, open_codec

    torch.set_num_threads(1)  # the actor count is the parallelism; also keeps sums in one order
    device = torch_device(cfg.per_actor)
    codec, backbone = open_codec(store, codec_entry).to(device), open_backbone(store, backbone_entry).to(device)
    if cfg.precision == "bf16":
        codec, backbone = codec.compute_in(torch.bfloat16), backbone.compute_in(torch.bfloat16)
    augmenter = make_augmenter()

    def work(unit: Unit) -> Record:
        with float32_products(tf32=cfg.precision == "tf32"):
            return encoded(unit)

    def encoded(unit: Unit) -> Record:
        slots: tuple[File, ...] = unit.payload
        tables: dict[str, pa.Table] = {}
        clean_tokens: dict[bytes, np.ndarray] = {}
        rows = 0
        for file in slots:
            table = require(store.read_table(file), TRIPLETS, file.path)
            tables[file.dataset] = encode_triplets(
                table,
                image_px=image_px,
                codec=codec,
                backbone=backbone,
                tokens=cfg.backbone.tokens,
                augmenter=augmenter,
                draws=cfg.reference_draws,
                batch_rows=cfg.batch_rows,
                seed=seed,
                clean_tokens=clean_tokens,
                dtype=cfg.dtype,
                device=device,
            )
            rows += table.num_rows
        return store.write_unit("encode", unit.name, tables, counts={"rows": rows}, rows_per_group=cfg.rows_per_group)

    return work
