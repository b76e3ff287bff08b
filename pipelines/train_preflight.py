"""Checks of the train stage before any worker starts; each error is one line that names the key or file.

Workers would fail later, on every rank at once, after minutes of waiting for GPUs.
"""

from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from pbe.data.schema import TRIPLETS, encoded_schema, is_optional
from pbe.data.slots import group_rows, slot_files
from pbe.store import File, Manifest, Store
from pbe.train.settings import TrainConfig
from pipelines.runtime.cures import made_again
from pipelines.runtime.stage import Stage, StageError
from pipelines.train_weights import StartingPoint, architecture

FOOTERS_AT_ONCE = 16  # a remote storage answers slowly, but many at a time


def refuse_what_cannot_train(
    stage: Stage,
    cfg: TrainConfig,
    encoded: Manifest,
    triplets: Manifest | None,
    start: StartingPoint,
) -> None:
    """Raises StageError, StoreError, WeightsError."""
    refuse_too_few_rows(encoded, cfg.batch)
    _refuse_odd_latents(stage, cfg, encoded)
    if not cfg.steps:  # no batch is read, and this process itself loads the weights
        return
    _refuse_empty_streams(encoded, cfg.streams)
    if cfg.perceptual_weight:
        refuse_perceptual_loss_through(encoded)
    refuse_unfit_parts(stage.store, encoded, stored_schema(stage, encoded))
    if triplets is not None:
        refuse_unfit_parts(stage.store, triplets, TRIPLETS)
        if start.text is not None and "caption" in cfg.text.captions:
            refuse_no_captions(stage, triplets)
    _refuse_unfit_weights(stage, cfg, encoded, start)


def _refuse_unfit_weights(stage: Stage, cfg: TrainConfig, encoded: Manifest, start: StartingPoint) -> None:
    """Check the weights on a network without memory, before workers start. Raises AdapterError, WeightsError."""
    if start.initial is None:
        return
    import torch

    from pbe.model.adapter import load_adapter
    from pbe.model.initial import load_stored
    from pbe.model.unet import new_network
    from pbe.model.weight_store import stored_folder
    from pbe.train.trainable import choose_trainable

    with torch.device("meta"):
        network = new_network(architecture(stage, cfg, encoded, start))
    load_stored(network, stage.store, start.initial)
    choose_trainable(network, cfg.trainable, seed=0)
    if start.adapter is not None:
        with stored_folder(stage.store, start.adapter.path) as folder:
            load_adapter(network, folder)


def refuse_no_captions(stage: Stage, triplets: Manifest) -> None:
    """Raise StageError if no triplet has a written caption: the column is there only in parts in which one has."""
    for file in (file for files in slot_files(triplets) for file in files):
        with stage.store.open_parquet(file) as parquet:
            if "caption" in parquet.schema_arrow.names:
                return
    raise StageError(
        f"train@{stage.variant}: train.text.captions: caption: no row has one; leave it out, or give the box files "
        "captions (column Caption of a CSV, key caption of a COCO annotation)"
    )


def _refuse_odd_latents(stage: Stage, cfg: TrainConfig, encoded: Manifest) -> None:
    latent_px = stage.params.materialize.image_px // int(encoded.config["codec"]["patch_px"])
    halvings = len(cfg.unet.block_channels) - 1
    if latent_px % 2**halvings:
        raise StageError(
            f"train@{stage.variant}: latents of {latent_px} px cannot be halved {halvings} times, as the levels of "
            "train.unet.block_channels ask; change materialize.image_px"
        )


def refuse_perceptual_loss_through(encoded: Manifest) -> None:
    """Raise StageError if the rows' codec is AutoencoderKL, or the loss's network is not installed."""
    from pbe.model.backbone import BackboneError, weights_digest

    if encoded.config["codec"]["kind"] != "patch":
        raise StageError(
            "train.perceptual_weight decodes every row at every step, which takes too long with AutoencoderKL; set it "
            "to 0, or use a patch codec in encode.codec"
        )
    try:
        weights_digest("efficientnet_lite0")
    except BackboneError as error:
        raise StageError(f"train.perceptual_weight: {error}") from None


def refuse_too_few_rows(encoded: Manifest, batch: int) -> None:
    """Raise StageError if a batch would repeat a row. One slot may have fewer rows: a batch continues in the next."""
    rows = sum(file.rows for files in slot_files(encoded) for file in files)
    if not rows:
        raise StageError(
            "train: data/encode/manifest.json lists no rows; see data/filter/counts.json and "
            "data/materialize/counts.json for where they went"
        )
    if rows < batch:
        raise StageError(
            f"train.batch = {batch}, but data/encode/manifest.json lists only {rows} rows in all slots together: lower "
            "train.batch, raise materialize.slots, or add photos"
        )


def refuse_unfit_parts(store: Store, manifest: Manifest, schema: pa.Schema) -> None:
    """Reads every part's footer: a missing or foreign file would else end the run hours later. Raises StageError or
    StoreError naming the first such file."""

    def check(file: File) -> None:
        with store.open_parquet(file) as parquet:
            found, rows = parquet.schema_arrow, parquet.metadata.num_rows
        again = f"delete its folder, then {made_again(manifest.stage)}"
        if rows != file.rows:
            raise StageError(
                f"{store.full_uri(file.path)}: has {rows} rows, data/{manifest.stage}/manifest.json says {file.rows}; "
                f"{again}"
            )
        differ = [
            f"{name} is {_described(found, name)}, expected {_described(schema, name)}"
            for name in dict.fromkeys([*schema.names, *found.names])
            if not (name not in found.names and is_optional(schema.field(name)))
            if _described(found, name) != _described(schema, name)
        ]
        if differ:
            raise StageError(
                f"{store.full_uri(file.path)}: not what data/{manifest.stage}/manifest.json says: "
                f"{'; '.join(differ)}; {again}"
            )

    with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
        for _ in pool.map(check, (file for files in slot_files(manifest) for file in files)):
            pass


def _described(schema: pa.Schema, name: str) -> str:
    """Describe the type of a column; for arrays, number format and shape."""
    if name not in schema.names:
        return "missing"
    field = schema.field(name)
    if field.metadata and b"shape" in field.metadata:
        return f"{field.metadata[b'dtype'].decode()} ({field.metadata[b'shape'].decode()})"
    return str(field.type)


def stored_schema(stage: Stage, encoded: Manifest) -> pa.Schema:
    codec, backbone = encoded.config["codec"], encoded.config["backbone"]
    latent_px = stage.params.materialize.image_px // int(codec["patch_px"])
    return encoded_schema(
        (int(codec["channels"]), latent_px, latent_px),
        (int(encoded.config["reference_draws"]), int(backbone["token_count"]), int(backbone["width"])),
        encoded.config["dtype"],
    )


def _refuse_empty_streams(encoded: Manifest, streams: int) -> None:
    """Each stream needs a row group of every slot (pbe/train/data/order.py)."""
    rows_per_group = int(encoded.config["rows_per_group"])
    groups = min(sum(len(group_rows(file, rows_per_group)) for file in files) for files in slot_files(encoded))
    if groups < streams:
        raise StageError(
            f"train.streams = {streams}, but a slot has only {groups} row groups of up to {rows_per_group} rows: lower "
            "train.streams, or encode.rows_per_group for more groups"
        )
