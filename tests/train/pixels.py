"""Triplets that pbe.data cuts from painted photos, and the same triplets encoded as the encode stage does."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import pyarrow as pa
import torch

from pbe.data import images
from pbe.data.materialize import triplet_tables
from pbe.data.reference import make_augmenter
from pbe.data.schema import BOXES, IMAGES
from pbe.data.settings import MaterializeConfig
from pbe.data.slots import TRIPLETS_PER_GROUP
from pbe.encode import CPU, encode_triplets
from pbe.model.backbone import Backbone
from pbe.model.codec import Codec, PatchCodec, codec_bytes
from pbe.model.settings import Tokens
from pbe.settings import Dtype
from pbe.store import Manifest, Store, make_manifest

SEED, SLOTS, DRAWS, ROWS_PER_GROUP = 23, 2, 2, 1
PHOTOS_OF_SHARD: tuple[int, ...] = (5, 9, 2)  # the second in two row groups of triplets


@dataclass(frozen=True)
class Networks:
    codec: Codec
    backbone: Backbone
    tokens: Tokens


def photo(number: int) -> np.ndarray:
    """(48, 64, 3) uint8: smooth blobs, a different picture for each number."""
    coarse = np.random.default_rng(number).integers(0, 256, (4, 5, 3)).astype(np.uint8)
    return images.resize(coarse, width_px=64, height_px=48)


def triplets_of(
    store: Store,
    *,
    image_px: int = 16,
    reference_px: int = 224,
    photos_of_shard: tuple[int, ...] = PHOTOS_OF_SHARD,
    captions: Mapping[int, str] = MappingProxyType({}),
) -> Manifest:
    """Two triplets of each photo, one per slot. captions: by the photo's number."""
    units, number = [], 0
    for shard, count in enumerate(photos_of_shard):
        photos, boxes = [], []
        for _ in range(count):
            identity = {"image_id": f"photo{number}", "split": "train"}
            picture = {"bytes": images.encode_png(photo(number)), "width_px": 64, "height_px": 48, "sha256": "0"}
            photos.append({**identity, **picture, "exif_orientation": 1})
            left, top = 0.1 + 0.03 * (number % 8), 0.15 + 0.02 * (number % 5)
            box = {"xmin": left, "xmax": left + 0.4, "ymin": top, "ymax": top + 0.5}
            flags = dict.fromkeys(("is_occluded", "is_truncated", "is_group_of", "is_depiction", "is_inside"), 0)
            boxes.append({**identity, **box, **flags, "box_index": 0, "label": "/m/0", "label_name": "Cat"})
            boxes[-1]["caption"] = captions.get(number)
            number += 1
        tables, counts = triplet_tables(
            pa.Table.from_pylist(photos, IMAGES),
            pa.Table.from_pylist(boxes, BOXES),
            cfg=MaterializeConfig(
                image_px=image_px,
                slots=SLOTS,
                reference_px=reference_px,
                reference_pad_px=2,
                box_extend_frac=0.4,
                crop_shrink_frac=0.6,
                bezier_points_per_side=18,
                bezier_jitter_px=2,
            ),
            seed=SEED,
        )
        assert counts["images_kept"] == count
        units.append(
            store.write_unit("materialize", f"s{shard:04d}-x", tables, counts=counts, rows_per_group=TRIPLETS_PER_GROUP)
        )
    return make_manifest("materialize", config={}, version=1, units=units)


def encoded_of(
    store: Store,
    triplets: Manifest,
    networks: Networks,
    *,
    image_px: int = 16,
    dtype: Dtype = "float32",
    draws: int = DRAWS,
    device: torch.device = CPU,
) -> Manifest:
    """Encode triplets as the encode stage does; a patch codec is also stored. The networks are on `device`."""
    units = []
    for unit in triplets.units:
        slots = [file for file in unit.files if file.dataset.startswith("slot-")]
        tables = {
            file.dataset: encode_triplets(
                store.read_table(file),
                image_px=image_px,
                codec=networks.codec,
                backbone=networks.backbone,
                tokens=networks.tokens,
                augmenter=make_augmenter(),
                draws=draws,
                batch_rows=4,
                seed=SEED,
                clean_tokens={},
                dtype=dtype,
                device=device,
            )
            for file in slots
        }
        counts = {"rows": sum(file.rows for file in slots)}
        name = f"{unit.unit}-{dtype}-{draws}"
        units.append(store.write_unit("encode", name, tables, counts=counts, rows_per_group=ROWS_PER_GROUP))
    config = {
        "rows_per_group": ROWS_PER_GROUP,
        "seed": SEED,
        "reference_draws": draws,
        "dtype": dtype,
        "backbone": {"kind": "efficientnet_lite0", "width": networks.backbone.width, "tokens": networks.tokens},
        "triplets": triplets.digest,
    }
    if isinstance(networks.codec, PatchCodec):
        path = "parts/encode/codec.safetensors"
        store.write_bytes(path, codec_bytes(networks.codec))
        patch_px, channels = networks.codec.patch_px, networks.codec.channels
        config["codec"] = {"kind": "patch", "path": path, "patch_px": patch_px, "channels": channels}
    else:
        config["codec"] = {"kind": "kl"}
    return make_manifest("encode", config=config, version=1, units=units)
