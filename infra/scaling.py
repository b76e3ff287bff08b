"""Computes what OpenImages costs at full size: python infra/scaling.py prints the tables.

Every input names its source. "Measured" means on two cores (AMD EPYC) with coco256 enlarged to 1024 px, by the command
given with it. Nothing was run at this size. infra/memory.py counts GPU memory, infra/cost.py computes time.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pbe.config import parse_params
from pipelines.commands.profile import full_text

GB, TB, HOUR_S, DAY_S = 1e9, 1e12, 3600.0, 86400.0
PAPER_SIZED = ("openimages-8gpu", "openimages")  # profiles of the paper's sizes, which the cited rates are for
PROFILES = Path(__file__).resolve().parent / "profiles"

# -- cited: the data set's own pages
PHOTOS = 1_743_042  # train photos, each with at least one box
BOXES = 14_610_229  # of the train split
PHOTO_BYTES = 513 * GB / PHOTOS  # 513 GB of train tars

VALIDATION_BYTES = 12 * GB  # of validation tars, 41,620 photos
# -- cited: the paper, "about 7 days on 64 V100", 40 epochs
PAPER_GPUS, PAPER_DAYS = 64, 7
PAPER_RATE = 40 * PHOTOS / (PAPER_GPUS * PAPER_DAYS * DAY_S)  # rows per second and GPU
# -- cited: README.md of github.com/mosaicml/diffusion at 066e68f, by number of A100: photos per second in training the
# UNet of Stable Diffusion 2 base at 512 px on precomputed latents. Similar to this network, not equal
A100_PHOTOS_PER_S = {8: 290, 16: 585, 32: 1195, 64: 2340}
# -- of the model: trainable parameters. A checkpoint holds their weights, masters and two moments in float32
PARAMETERS = 923_306_500
CHECKPOINT_BYTES = 16 * PARAMETERS

# -- measured: python tests/benchmarks/materialize.py, 234 photos with a kept box
TRIPLET_BYTES = {"420": 133_900, "444": 157_400}  # a Parquet row at 512 and 224 px, quality 95; 650 of them are holes
BOX_BYTES = 53  # a Parquet row of boxes

# -- measured: the same program, one core, coco256 at 1024 px
CHECKS_PER_S = 449  # photos that ingest opens, decodes and hashes
TRIPLETS_PER_S = {1: 271, 8: 577}  # by number of slots: a photo is decoded once for all of them
RAY_SHARE = 227 / 271  # of that rate, through Ray Data with Parquet
# -- measured: python tests/benchmarks/openimages_csv.py, one core: all box lines and photos split into shards
INDEX_S = 97.6

# -- from the schema (pbe/data/schema.py), before compression
LATENT_CELLS = 4 * 64 * 64  # AutoencoderKL at 512 px
TOKEN_BYTES = {"class": 2 * 1024, "all": 2 * 257 * 1024}  # float16, CLIP ViT-L/14

SLOTS = (1, 4, 8, 16, 40)
SHARDS = 3500


def encoded_bytes(draws: int, tokens: str = "class", value_bytes: int = 2) -> int:
    """Bytes of an `encoded` row: mean and std of three latents, two holes, each draw's exemplar tokens."""
    latents = 6 * LATENT_CELLS * value_bytes
    holes = 2 * 64 * 64 * value_bytes
    return latents + holes + draws * TOKEN_BYTES[tokens]


def row_bytes(params: dict[str, Any]) -> int:
    """Bytes of an `encoded` row with the settings of a profile."""
    encode = params["encode"]
    value_bytes = {"float16": 2, "float32": 4}[encode["dtype"]]
    return encoded_bytes(encode["reference_draws"], encode["backbone"]["tokens"], value_bytes)


def materialize_core_s(slots: int) -> float:
    """Seconds of one core for all photos: decode + slots * rest, fitted to the rates at 1 and 8 slots."""
    rest_s = (8 / TRIPLETS_PER_S[8] - 1 / TRIPLETS_PER_S[1]) / 7
    decode_s = 1 / TRIPLETS_PER_S[1] - rest_s
    return PHOTOS * (decode_s + slots * rest_s) / RAY_SHARE


def main() -> None:
    print("## Disk\n")
    rows = [["dataset", "bytes per row", "rows per slot", *slot_columns()]]
    once = [
        ("images", PHOTO_BYTES, PHOTOS),
        ("boxes", BOX_BYTES, BOXES),
    ]
    for name, size, count in once:
        rows.append([name, f"{size:,.0f}", f"{count:,} in all", *([volume(size * count)] * len(SLOTS))])
    per_slot = [
        ("triplets, 4:2:0", TRIPLET_BYTES["420"]),
        ("triplets, 4:4:4", TRIPLET_BYTES["444"]),
        ("encoded, float16, class token, 4 draws", encoded_bytes(4)),
        ("encoded, float32, class token, 4 draws", encoded_bytes(4, value_bytes=4)),
        ("encoded, float16, all 257 tokens, 1 draw", encoded_bytes(1, "all")),
    ]
    for name, size in per_slot:
        rows.append([name, f"{size:,}", f"{PHOTOS:,}", *(volume(size * PHOTOS * slots) for slots in SLOTS)])
    print(table(rows))

    print("\n## Files and requests, by ingest.shards\n")
    rows = [["shards", "photos per shard", "images part", "triplet file", "triplet files at 8 slots", "at 40 slots",
             "memory of one materialize task at 8 slots"]]  # fmt: skip
    for shards in (1000, 1750, SHARDS, 7000, 14000):
        photos = PHOTOS / shards
        held = photos * PHOTO_BYTES + 2 * photos * 8 * TRIPLET_BYTES["420"]
        rows.append(
            [
                f"{shards:,}", f"{photos:,.0f}", volume(photos * PHOTO_BYTES), volume(photos * TRIPLET_BYTES["420"]),
                f"{shards * 8:,}", f"{shards * 40:,}", volume(held),
            ]
        )  # fmt: skip
    print(table(rows))

    print("\n## Reading while training, by encode.rows_per_group\n")
    rows = [["rows per group", "bytes per read", "reads per epoch", "rows held for 64 streams, two groups each"]]
    for group in (16, 32, 64, 128):
        size = group * encoded_bytes(4)
        rows.append([f"{group}", volume(size), f"{PHOTOS / group:,.0f}", volume(2 * 64 * size)])
    print(table(rows))

    print("\n## Hours of one core\n")
    print(table(cpu_hours()))

    print("\n## The profiles of the paper's training\n")
    print(table(profiles()))


class Parser(argparse.ArgumentParser):
    """Its errors are one line, without the usage, and begin with the program's path."""

    def __init__(self, program: str, **settings: Any) -> None:
        super().__init__(**settings)
        self._program = program

    def error(self, message: str) -> NoReturn:
        sys.exit(f"{self._program}: {message}")


def profile(name: str) -> dict[str, Any]:
    """All settings of a profile."""
    return parse_params(full_text(PROFILES, name), name).model_dump()


def profiles() -> list[list[str]]:
    """Table of disk and days, one column per profile in PAPER_SIZED."""
    named = {name: profile(name) for name in PAPER_SIZED}
    columns = [profile_rows(params) for params in named.values()]
    return [["", *named], *([label, *(column[label] for column in columns)] for label in columns[0])]


def profile_rows(params: dict[str, Any]) -> dict[str, str]:
    train, slots, gpus = params["train"], params["materialize"]["slots"], params["train"]["workers"]
    triplets = TRIPLET_BYTES[params["materialize"]["jpeg_chroma"]] * PHOTOS * slots
    row = row_bytes(params)
    encoded, checkpoints = row * PHOTOS * slots, CHECKPOINT_BYTES * train["keep_checkpoints"]
    photos = PHOTO_BYTES * PHOTOS + VALIDATION_BYTES
    seen = train["steps"] * train["batch"]
    rate = A100_PHOTOS_PER_S[gpus]
    return {
        "GPUs": f"{gpus}",
        "rows per GPU, forward, step": f"{train['micro_batch']}, {train['batch'] // gpus}",
        "slots": f"{slots}",
        "photos": volume(photos),
        "triplets": volume(triplets),
        "encoded": volume(encoded),
        f"checkpoints, {volume(CHECKPOINT_BYTES)} each": volume(checkpoints),
        "disk in all": volume(photos + triplets + encoded + checkpoints),
        "disk once triplets are gone": volume(photos + encoded + checkpoints),
        "rows seen": f"{seen / 1e6:.1f} million in {train['steps']:,} steps",
        f"days, V100 at the paper's {PAPER_RATE:.1f} rows/s each": f"{seen / PAPER_RATE / gpus / DAY_S:.1f}",
        "days, A100 at a published rate": f"{seen / rate / DAY_S:.2f} ({rate:,} rows/s)",
        "storage must deliver, at that rate": f"{volume(rate * row)}/s",
    }


def cpu_hours() -> list[list[str]]:
    rows = [["stage", *slot_columns()]]
    rows.append(["ingest: index", *([f"{INDEX_S / HOUR_S:.2f}"] * len(SLOTS))])
    rows.append(["ingest: check of the photos", *([f"{PHOTOS / CHECKS_PER_S / HOUR_S:.1f}"] * len(SLOTS))])
    rows.append(["materialize", *(f"{materialize_core_s(slots) / HOUR_S:.1f}" for slots in SLOTS)])
    return rows


def slot_columns() -> list[str]:
    return [f"{slots} slot{'s' if slots > 1 else ''}" for slots in SLOTS]


def volume(size: float) -> str:
    """Bytes as text in the largest unit that fits."""
    for unit, name in ((TB, "TB"), (GB, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 1e3:.1f} kB"


def table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


if __name__ == "__main__":
    main()
