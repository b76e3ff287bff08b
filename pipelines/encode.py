"""encode: triplets to codec latents and exemplar tokens, by Ray Data actors that hold the models.

Training then runs no encoder. The codec is fitted here, in closed form, on the first `codec_fit_crops` source crops
in manifest order; for each row the reference is encoded `reference_draws` times: draw 0 clean, the others with
fresh augmentation.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import pyarrow as pa

from pbe.config import EncodeConfig
from pbe.data import images
from pbe.data.schema import TRIPLETS, require
from pbe.data.slots import slot_files
from pbe.model.codec import codec_bytes, fit_patch_codec
from pbe.store import File, Manifest, Record, Store, digest, load_manifest, make_manifest, save_manifest
from pipelines.progress import with_progress
from pipelines.stage import Stage, save_counts
from pipelines.units import Unit, run_units


def main(stage: Stage) -> None:
    cfg, seed = stage.params.encode, stage.params.seed
    triplets = load_manifest(stage.input("materialize"))
    codec_path = _fit_codec(stage, triplets, cfg)

    units = []
    for unit in triplets.units:
        slots = tuple(file for file in unit.files if file.dataset.startswith("slot-"))
        identity = digest(["encode", stage.code, seed, _identity(cfg), codec_path, [file.sha256 for file in slots]])
        units.append(Unit(unit.unit.split("-")[0], identity, slots))
    records = run_units(
        "encode",
        units,
        store=stage.store,
        worker=partial(_worker, stage.store, cfg, stage.params.materialize.image_px, codec_path, seed),
        cpus=cfg.cpus_per_actor,
        actors=cfg.actors,
    )
    config = {**_identity(cfg), "codec": codec_path}
    manifest = make_manifest("encode", config=config, code=stage.code, units=records)
    assert manifest.counts["rows"] == triplets.counts["triplets"]
    save_counts(stage, dict(manifest.counts))
    save_manifest(stage.outputs / "manifest.json", manifest)


def _fit_codec(stage: Stage, triplets: Manifest, cfg: EncodeConfig) -> str:
    """Storage path of the fitted codec; its name says what it was fitted on: the files that the crops come from.

    So new photos leave the codec, and with it the parts of other buckets, as they are once the first buckets alone hold
    `codec_fit_crops` crops.
    """
    files = list(_first_files(triplets, cfg.codec_fit_crops))
    shape = [cfg.codec_patch_px, cfg.codec_channels, cfg.codec_fit_crops]
    path = f"parts/encode/codec-{digest([*shape, [file.sha256 for file in files], stage.code])}/codec.safetensors"
    if not stage.store.exists(path):
        crops = with_progress(
            _crops(stage.store, files, cfg.codec_fit_crops), "encode: codec", total=cfg.codec_fit_crops, unit="crop"
        )
        codec, explained = fit_patch_codec(crops, patch_px=cfg.codec_patch_px, channels=cfg.codec_channels)
        print(f"encode: {cfg.codec_channels} components keep {explained:.1%} of the patch variance")
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


def _identity(cfg: EncodeConfig) -> dict[str, object]:
    return cfg.model_dump(mode="json", exclude={"actors", "cpus_per_actor"})


def _worker(store: Store, cfg: EncodeConfig, image_px: int, codec_path: str, seed: int) -> Callable[[Unit], Record]:
    import torch

    from pbe.data.reference import make_augmenter
    from pbe.encode import encode_triplets
    from pbe.model.backbone import load_backbone
    from pbe.model.codec import codec_from_bytes

    torch.set_num_threads(1)  # the actor count is the parallelism; also keeps sums in one order
    codec, backbone, augmenter = (
        codec_from_bytes(store.read_bytes(codec_path), store.full_uri(codec_path)),
        load_backbone(cfg.backbone),
        make_augmenter(),
    )

    def work(unit: Unit) -> Record:
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
                augmenter=augmenter,
                draws=cfg.reference_draws,
                batch_rows=cfg.batch_rows,
                seed=seed,
                clean_tokens=clean_tokens,
            )
            rows += table.num_rows
        return store.write_unit("encode", unit.name, tables, counts={"rows": rows}, rows_per_group=cfg.rows_per_group)

    return work
