"""Encode: rows per second of `encode_triplets`, and of its networks alone."""

import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pbe.data import images
from pbe.data.masks import HOLE_KINDS, pack_mask
from pbe.data.reference import make_augmenter
from pbe.data.schema import TRIPLETS
from pbe.encode import encode_masked, encode_references, encode_source, encode_triplets
from pbe.model.precision import float32_products
from pbe.model.settings import Precision
from tests.gpu.networks import new_clip_backbone, new_kl_codec
from tests.gpu.sizes import Sizes

REPEATS, BATCH_ROWS = 2, 16


def measure_encode(device: torch.device, sizes: Sizes, precision: Precision) -> Iterator[dict[str, Any]]:
    """Every row is a photo, two masked photos and `reference_draws` references, as profile openimages asks for. The
    first result is the networks alone on arrays in memory, the second all: JPEG, augmentation, networks, Arrow."""
    codec, backbone = new_kl_codec(device, sizes), new_clip_backbone(device, sizes)
    if precision == "bf16":
        codec, backbone = codec.compute_in(torch.bfloat16), backbone.compute_in(torch.bfloat16)
    batch_rows = min(BATCH_ROWS, sizes.encode_rows)
    triplets = made_triplets(sizes, backbone.input_px)
    rng = np.random.default_rng(0)
    sources = rng.integers(0, 256, (batch_rows, sizes.image_px, sizes.image_px, 3)).astype(np.uint8)
    holes = (rng.random((batch_rows, sizes.image_px, sizes.image_px)) < 0.2).astype(np.uint8)
    references = rng.integers(0, 256, (batch_rows, backbone.input_px, backbone.input_px, 3)).astype(np.uint8)

    def networks() -> int:
        for _ in range(sizes.encode_rows // batch_rows):
            encode_source(codec, sources, device=device)
            for _ in HOLE_KINDS:
                encode_masked(codec, sources, holes, device=device)
            for _ in range(sizes.reference_draws):
                encode_references(backbone, references, device=device)
        return sizes.encode_rows // batch_rows * batch_rows

    def whole() -> int:
        table = encode_triplets(
            triplets,
            image_px=sizes.image_px,
            codec=codec,
            backbone=backbone,
            tokens="class",
            augmenter=make_augmenter(),
            draws=sizes.reference_draws,
            batch_rows=batch_rows,
            seed=23,
            clean_tokens={},
            device=device,
        )
        return table.num_rows

    for what, run in (("networks alone", networks), ("encode_triplets", whole)):
        rates = []
        with float32_products(tf32=precision == "tf32"):
            for _ in range(1 + REPEATS):
                since = time.perf_counter()
                rows = run()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                rates.append(rows / (time.perf_counter() - since))
        yield {"case": f"{what}, {precision}", "rows_per_s": statistics.median(rates[1:])}


def made_triplets(sizes: Sizes, reference_px: int) -> pa.Table:
    rng = np.random.default_rng(1)
    side = sizes.image_px
    rows = []
    for number in range(sizes.encode_rows):
        smooth = images.resize(rng.integers(0, 256, (8, 8, 3)).astype(np.uint8), width_px=side, height_px=side)
        hole = np.zeros((side, side), np.uint8)
        hole[side // 4 : side // 2, side // 4 : side // 2] = 1
        row: dict[str, Any] = {"image_id": f"image{number}", "slot": 0, "box_index": 0, "label_name": "Cat"}
        reference = images.resize(smooth, width_px=reference_px, height_px=reference_px)
        row |= {"source": images.encode_jpeg(smooth, 95), "reference": images.encode_jpeg(reference, 95)}
        row |= {f"{kind}_hole_mask": pack_mask(hole) for kind in HOLE_KINDS}
        row |= {f"box_{end}_px": 0.0 for end in ("x0", "y0", "x1", "y1")}
        rows.append(row)
    return pa.Table.from_pylist(rows, TRIPLETS)
