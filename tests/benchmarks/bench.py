"""Do time and memory of bench follow the split? python tests/benchmarks/bench.py [--photos 40000] [--small 4000]

Runs the stage as a user would (`python -m pipelines bench`, real Ray, a separate project) on a split of --small and on
one of --photos made photos of 1024 x 768 px with two boxes each, in shards of 500, for --items items among --candidates
boxes. Prints for each split the seconds, the shards read, and the peak resident memory of the driver, of its largest
worker and of Ray's object store. The last line has the ratios of the larger to the smaller split; nothing is asserted.
The photos are 64 different pictures, written as parts of ingest and filter: 26 MB per 500. With --device cuda the
matcher runs on the GPU.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import cv2  # noqa: E402
import numpy as np  # noqa: E402

from pbe.data import images  # noqa: E402
from pbe.data.rng import row_rng, shard_of  # noqa: E402
from pbe.data.schema import BOXES, DESCRIPTOR_BYTES, FLAGS, IMAGES, table_from_rows  # noqa: E402
from pbe.store import Record, Store, load_manifest, make_manifest, save_manifest  # noqa: E402
from tests.benchmarks.device import add_device  # noqa: E402
from tests.benchmarks.memory import run  # noqa: E402
from tests.pipelines.project import Project, make_project  # noqa: E402

PHOTOS_PER_SHARD, BOXES_PER_PHOTO, CLASSES, PICTURES = 500, 2, 80, 64
WIDTH_PX, HEIGHT_PX = 1024, 768


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=40_000)
    parser.add_argument("--small", type=int, default=4_000)
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--candidates", type=int, default=2_000)
    parser.add_argument("--quick", action="store_true", help="a tenth of all that: less than two minutes on two cores")
    add_device(parser)
    args = parser.parse_args()
    scale = 10 if args.quick else 1
    peaks = []
    for photos in (args.small // scale, args.photos // scale):
        with tempfile.TemporaryDirectory(prefix="pbe-bench-") as name:
            project = make_project(Path(name) / "project")
            store = Store(str(project.folder / ".store"))
            make_split(store, project.folder, photos=photos, shards=-(-photos // PHOTOS_PER_SHARD))
            project.set_params(
                bench__split="validation",
                bench__max_items=args.items // scale,
                bench__candidates=args.candidates // scale,
                bench__per_actor={"cpus": 0.5, "gpus": 0.5 if args.device == "cuda" else 0, "memory_gib": 1},
                materialize__image_px=512,
            )
            peaks.append(measured(project, store))
        print(f"{photos} photos: " + ", ".join(f"{what} {value:.0f}" for what, value in peaks[-1].items()), flush=True)
    small, large = peaks
    print(" ".join(f"{what.split(',')[0].replace(' ', '_')}={large[what] / small[what]:.2f}" for what in small))
    return 0


def measured(project: Project, store: Store) -> dict[str, float]:
    started = time.monotonic()
    mib = run(project, "bench")
    seconds = time.monotonic() - started
    bench = load_manifest(project.folder / "data" / "bench" / "manifest.json").units[0].unit
    shards = [unit for unit in store.list_folders("parts/bench") if unit != bench]
    return {"seconds": seconds, "shards": len(shards), **{f"{who}, MiB": size for who, size in mib.items()}}


def make_split(
    store: Store, root: Path, *, photos: int, shards: int, width_px: int = WIDTH_PX, height_px: int = HEIGHT_PX
) -> None:
    """Write parts and manifests of ingest and filter, as these stages do, of made photos in split validation."""
    pictures = [made_picture(number, width_px, height_px) for number in range(min(photos, PICTURES))]
    ids_of: list[list[str]] = [[] for _ in range(shards)]
    for number in range(photos):
        image_id = f"photo{number:06d}"
        ids_of[shard_of(image_id, shards)].append(image_id)
    records: dict[str, list[Record]] = {"ingest": [], "filter": []}
    for shard, ids in enumerate(ids_of):
        photo_rows = [photo_row(image_id, pictures, width_px, height_px) for image_id in ids]
        tables = {
            "ingest": {"images": table_from_rows(photo_rows, IMAGES)},
            "filter": {"boxes": table_from_rows([row for image_id in ids for row in box_rows(image_id)], BOXES)},
        }
        for stage, found in tables.items():
            records[stage].append(store.write_unit(stage, f"s{shard:04d}-made", found, counts={}))
    for stage, units in records.items():
        manifest = make_manifest(stage, config={}, version=1, units=units)
        save_manifest(root / "data" / stage / "manifest.json", manifest)


def made_picture(number: int, width_px: int, height_px: int) -> bytes:
    coarse = np.random.default_rng(number).integers(0, 256, (24, 32, 3)).astype(np.uint8)
    return images.encode_jpeg(cv2.resize(coarse, (width_px, height_px), interpolation=cv2.INTER_CUBIC), 90)


def photo_row(image_id: str, pictures: list[bytes], width_px: int, height_px: int) -> dict[str, Any]:
    return {
        "image_id": image_id,
        "split": "validation",
        "bytes": pictures[int(image_id.removeprefix("photo")) % len(pictures)],
        "width_px": width_px,
        "height_px": height_px,
        "sha256": "",
        "exif_orientation": 1,
        "descriptor": bytes(DESCRIPTOR_BYTES),
    }


def box_rows(image_id: str) -> list[dict[str, Any]]:
    rows = []
    for index in range(BOXES_PER_PHOTO):
        rng = row_rng(0, image_id, index)
        (xmin, ymin), side = rng.uniform(0, 0.5, 2), rng.uniform(0.2, 0.5)
        label = f"class{rng.integers(CLASSES)}"
        row: dict[str, Any] = dict.fromkeys(FLAGS, 0)
        row |= {"image_id": image_id, "split": "validation", "box_index": index, "label": label, "label_name": label}
        row |= {"xmin": xmin, "xmax": xmin + side, "ymin": ymin, "ymax": ymin + side}
        rows.append(row)
    return rows


if __name__ == "__main__":
    sys.exit(main())
