"""What OpenImages costs at full size: python infra/scaling.py prints the tables.

Arithmetic on measured and cited inputs, nothing else. Every input names where it comes from; "measured" means on two
cores (AMD EPYC) with coco256 enlarged to 1024 px, the command beside it. Nothing here was run at this size.
"""

from collections.abc import Sequence

GB, TB, HOUR_S = 1e9, 1e12, 3600.0

# -- cited: the data set's own pages
PHOTOS = 1_743_042  # train photos, each with at least one box
BOXES = 14_610_229  # of the train split
PHOTO_BYTES = 513 * GB / PHOTOS  # 513 GB of train tars

# -- measured: python tests/benchmarks/materialize.py, 234 photos with a kept box
TRIPLET_BYTES = {"420": 128_700, "444": 157_400}  # a Parquet row at 512 and 224 px, quality 95; holes are 650 of them
BOX_BYTES = 53  # a Parquet row of boxes

# -- measured: the same, one core, coco256 at 1024 px
CHECKS_PER_S = 449  # photos that ingest opens, decodes and hashes
TRIPLETS_PER_S = {1: 271, 8: 577}  # by slots: a photo is decoded once for all of them
RAY_SHARE = 227 / 271  # of that rate through Ray Data with Parquet
# -- measured: python tests/benchmarks/openimages_csv.py, one core: all box lines and photos cut by bucket
INDEX_S = 97.6

# -- by the schema (pbe/data/schema.py), before compression
LATENT_CELLS = 4 * 64 * 64  # AutoencoderKL at 512 px
TOKEN_BYTES = {"class": 2 * 1024, "all": 2 * 257 * 1024}  # float16, CLIP ViT-L/14

SLOTS = (1, 4, 8, 16, 40)
BUCKETS = 3500


def encoded_bytes(draws: int, tokens: str = "class", value_bytes: int = 2) -> int:
    """A row of `encoded`: mean and std of three latents, two holes at latent size, the exemplar tokens of each draw."""
    latents = 6 * LATENT_CELLS * value_bytes
    holes = 2 * 64 * 64 * value_bytes
    return latents + holes + draws * TOKEN_BYTES[tokens]


def main() -> None:
    print("## Disk\n")
    rows = [["dataset", "bytes per row", "rows per slot", *(f"{slots} slots" for slots in SLOTS)]]
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

    print("\n## Files and requests, by ingest.buckets\n")
    rows = [["buckets", "photos per bucket", "images part", "triplet file", "triplet files at 8 slots", "at 40 slots",
             "memory of one materialize task at 8 slots"]]  # fmt: skip
    for buckets in (1000, 1750, BUCKETS, 7000, 14000):
        photos = PHOTOS / buckets
        held = photos * PHOTO_BYTES + 2 * photos * 8 * TRIPLET_BYTES["420"]
        rows.append(
            [
                f"{buckets:,}", f"{photos:,.0f}", volume(photos * PHOTO_BYTES), volume(photos * TRIPLET_BYTES["420"]),
                f"{buckets * 8:,}", f"{buckets * 40:,}", volume(held),
            ]
        )  # fmt: skip
    print(table(rows))

    print("\n## Reading while training, by encode.rows_per_group\n")
    rows = [["rows per group", "bytes per read", "reads per epoch", "rows held for 64 lanes, two groups each"]]
    for group in (16, 32, 64, 128):
        size = group * encoded_bytes(4)
        rows.append([f"{group}", volume(size), f"{PHOTOS / group:,.0f}", volume(2 * 64 * size)])
    print(table(rows))

    print("\n## Hours of one core\n")
    print(table(cpu_hours()))


def cpu_hours() -> list[list[str]]:
    """Seconds per photo of materialize are taken as decode + slots * rest, from the rates at 1 and 8 slots."""
    rest_s = (8 / TRIPLETS_PER_S[8] - 1 / TRIPLETS_PER_S[1]) / 7
    decode_s = 1 / TRIPLETS_PER_S[1] - rest_s
    rows = [["stage", *(f"{slots} slots" for slots in SLOTS)]]
    rows.append(["ingest: index", *([f"{INDEX_S / HOUR_S:.2f}"] * len(SLOTS))])
    rows.append(["ingest: check of the photos", *([f"{PHOTOS / CHECKS_PER_S / HOUR_S:.1f}"] * len(SLOTS))])
    hours = [PHOTOS * (decode_s + slots * rest_s) / RAY_SHARE / HOUR_S for slots in SLOTS]
    rows.append(["materialize", *(f"{value:.1f}" for value in hours)])
    return rows


def volume(size: float) -> str:
    """Bytes in the unit that fits."""
    for unit, name in ((TB, "TB"), (GB, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 1e3:.1f} kB"


def table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


if __name__ == "__main__":
    main()
