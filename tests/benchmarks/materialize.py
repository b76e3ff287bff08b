"""How fast is materialize? python tests/benchmarks/materialize.py [--quick] [--photos FOLDER] [--device cuda]

Compares in turns, in one process, on the same photos and crops, at the paper's sizes (512 and 224 px, JPEG quality 95,
one triplet per photo):

roofline   decode, crop, resize to 512 and 224, encode both: the unavoidable work. OpenCV alone, one thread.
plain      triplet_tables: the same, and geometry, both holes, row generators and Arrow tables. One core.
ray        the stage itself, through Ray Data with Parquet writing: one task at a time, then two.

The last line has the ratios; nothing is asserted. Photos: coco256 as it is, and enlarged to 1024 px at quality 90. Each
of the two sets gives a line of ratios; the last line has the smaller ratio of each kind. The stage runs no network:
--device cuda changes nothing, and says so.
"""

import argparse
import hashlib
import mmap
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from pipelines.runtime.environment import prepare_driver  # noqa: E402

prepare_driver()
os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402

from pbe.data import images as image_codec  # noqa: E402
from pbe.data.annotations import box_files, read_annotations  # noqa: E402
from pbe.data.boxes import Box, extended, padded, pixel_box, square_window  # noqa: E402
from pbe.data.files import FileTree  # noqa: E402
from pbe.data.filter import FilterConfig, filter_boxes  # noqa: E402
from pbe.data.index import by_shard  # noqa: E402
from pbe.data.ingest import PhotoLimits, read_shard  # noqa: E402
from pbe.data.materialize import triplet_tables  # noqa: E402
from pbe.data.rng import row_rng  # noqa: E402
from pbe.data.schema import ANNOTATIONS, PHOTOS  # noqa: E402
from pbe.data.settings import MaterializeConfig  # noqa: E402
from pbe.data.sources import FolderSource  # noqa: E402
from pbe.data.triplets import box_order  # noqa: E402
from pbe.store import Record, Store  # noqa: E402
from tests.benchmarks.device import add_device, say_processor_alone  # noqa: E402

if TYPE_CHECKING:
    from pipelines.runtime.parts import Unit

CUT = MaterializeConfig(
    image_px=512,
    slots=1,
    jpeg_chroma="420",
    reference_px=224,
    reference_pad_px=10,
    box_extend_frac=0.4,
    crop_shrink_frac=0.6,
    bezier_points_per_side=18,
    bezier_jitter_px=5,
)
SEED = 23
UPSTREAM = FilterConfig(min_area_frac=0.02, max_area_frac=0.8)


@dataclass(frozen=True)
class Photos:
    """Images and kept boxes of one shard, all in the train split. windows: the crops of slot 0."""

    name: str
    images: pa.Table
    boxes: pa.Table
    windows: list[tuple[bytes, Box, Box]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ROOT.parent / "shared" / "data" / "coco256"
    parser.add_argument("--photos", type=Path, default=default, help="folder with the layout of coco256")
    parser.add_argument(
        "--quick", action="store_true", help="fewer repeats, half the photos of a part: less than 50 s on two cores"
    )
    add_device(parser)
    args = parser.parse_args()
    say_processor_alone(args.device, "photos are decoded, cut and encoded by OpenCV and libjpeg")
    if not args.photos.is_dir():
        print(f"skipped: no photos and boxes of coco256 in {args.photos}; name their folder with --photos")
        return 0
    cv2.setNumThreads(1)
    repeats = 2 if args.quick else 7
    sets = [coco256(args.photos, enlarge_to_px=None), coco256(args.photos, enlarge_to_px=1024)]
    plain = {photos.name: plain_rates(photos, repeats) for photos in sets}
    touch_memory((1 if args.quick else 8) << 30)
    ray = ray_rates(
        sets, repeats=1 if args.quick else 4, parts=3 if args.quick else 6, times_per_part=1 if args.quick else 2
    )
    ratios = []
    for photos in sets:
        roofline, ours = plain[photos.name]
        one, two = ray[photos.name]
        ratios.append((ours / roofline, one / roofline, two / one))
        print(
            f"{photos.name}: {photos.images.num_rows} photos, roofline {roofline:.0f}/s, plain {ours:.0f}/s, "
            f"ray {one:.0f}/s on one core, {two:.0f}/s on two"
        )
    if not args.quick:
        for photos in sets:
            print(f"{photos.name}: {more_rates(photos, repeats)}")
    low = [min(ratio[index] for ratio in ratios) for index in range(3)]
    print(f"plain_over_roofline={low[0]:.3f} ray_over_roofline={low[1]:.3f} scaling_1_to_2={low[2]:.3f}")
    return 0


def coco256(folder: Path, *, enlarge_to_px: int | None) -> Photos:
    """Read the folder with pbe's ingest and filter, without Ray; every photo counts as train."""
    boxes_tree = FileTree(str(folder), "--photos")
    annotations = [table for file in box_files(boxes_tree) for table in read_annotations(boxes_tree, file)]
    source = FolderSource(FileTree(str(folder / "images"), "--photos"))
    listed = map(without_versions, source.photos())
    with by_shard(annotations, ANNOTATIONS, 1) as lines, by_shard(listed, PHOTOS, 1) as photos:
        tables, _ = read_shard(
            next(iter(lines)),
            next(iter(photos)),
            read=lambda _, address: enlarged(source.read(address, 1 << 30), enlarge_to_px),
            address_without_photo=source.address_without_photo,
            lists_all=True,
            limits=PhotoLimits(exif="ignore", max_pixels=1 << 30),
            threads=2,
        )
    kept, _ = filter_boxes(tables["boxes"], tables["images"], UPSTREAM)
    used = pa.compute.is_in(tables["images"].column("image_id"), kept.column("image_id").combine_chunks())
    images = as_train(tables["images"].filter(used))
    name = "coco256" if enlarge_to_px is None else f"coco256 at {enlarge_to_px} px"
    return Photos(name, images, as_train(kept), windows_of_slot_0(images, kept))


def without_versions(photos: pa.Table) -> pa.Table:
    """Empty the version column, because enlarged photos are not the files that were hashed."""
    index = photos.schema.get_field_index("version")
    return photos.set_column(index, photos.schema.field(index), pa.repeat("", photos.num_rows))


def enlarged(data: bytes, side_px: int | None) -> bytes:
    """The photo with its longer side resized to `side_px`, JPEG quality 90; None: unchanged."""
    if side_px is None:
        return data
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    assert image is not None
    scale = side_px / max(image.shape[:2])
    size = round(image.shape[1] * scale), round(image.shape[0] * scale)
    larger = cv2.resize(image, size, interpolation=cv2.INTER_CUBIC)
    return cv2.imencode(".jpg", larger, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()


def as_train(table: pa.Table) -> pa.Table:
    index = table.schema.get_field_index("split")
    return table.set_column(index, table.schema.field(index), pa.repeat("train", table.num_rows))


def windows_of_slot_0(images: pa.Table, boxes: pa.Table) -> list[tuple[bytes, Box, Box]]:
    """For each photo its bytes, source window and reference box, as triplet_tables draws them for slot 0."""
    mine: dict[str, list[dict]] = {}
    for box in boxes.to_pylist():
        mine.setdefault(box["image_id"], []).append(box)
    out = []
    for image in images.to_pylist():
        image_id, size = image["image_id"], {"width_px": image["width_px"], "height_px": image["height_px"]}
        found = mine[image_id]
        box = found[int(box_order(len(found), row_rng(SEED, image_id, "boxes"))[0])]
        tight = pixel_box(box["xmin"], box["xmax"], box["ymin"], box["ymax"], **size)
        rng = row_rng(SEED, image_id, 0, "triplet")
        ext = extended(tight, **size, extend_frac=CUT.box_extend_frac, rng=rng)
        window = square_window(ext, **size, shrink_frac=CUT.crop_shrink_frac, rng=rng).box
        out.append((image["bytes"], window, padded(tight, CUT.reference_pad_px, **size)))
    return out


def roofline(photos: Photos) -> int:
    """The work in OpenCV alone, in BGR, with its default JPEG settings at quality 95; returns the samples."""
    for data, window, reference in photos.windows:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        assert image is not None
        full = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]  # of references alone
        for area, side_px, chroma in ((window, CUT.image_px, []), (reference, CUT.reference_px, full)):
            crop = image[area.y0 : area.y1, area.x0 : area.x1]
            small = cv2.resize(crop, (side_px, side_px), interpolation=cv2.INTER_LINEAR)
            cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, CUT.jpeg_quality, *chroma])
    return len(photos.windows)


def ours(photos: Photos) -> int:
    _, counts = triplet_tables(photos.images, photos.boxes, cfg=CUT, seed=SEED)
    return counts["triplets"]


def plain_rates(photos: Photos, repeats: int) -> tuple[float, float]:
    """Samples per second of roofline and of triplet_tables: medians of alternating runs, processor time."""
    rates: dict[Callable[[Photos], int], list[float]] = {roofline: [], ours: []}
    for turn in range(repeats + 1):
        for run, found in rates.items():
            started = time.process_time()
            samples = run(photos)
            if turn:  # the first is a warm-up
                found.append(samples / (time.process_time() - started))
    return statistics.median(rates[roofline]), statistics.median(rates[ours])


def more_rates(photos: Photos, repeats: int) -> str:
    """The rates that infra/scaling.py uses: one core, processor time, medians."""

    def seconds(run: Callable[[], object]) -> float:
        run()
        found = []
        for _ in range(repeats):
            started = time.process_time()
            run()
            found.append(time.process_time() - started)
        return statistics.median(found)

    def check() -> None:
        for data in photos.images.column("bytes").to_pylist():
            image_codec.read_header(data)
            image_codec.decode(data)
            hashlib.sha256(data).hexdigest()

    def slots_8() -> None:
        triplet_tables(photos.images, photos.boxes, cfg=CUT.model_copy(update={"slots": 8}), seed=SEED)

    rows = photos.images.num_rows
    return f"8 slots {8 * rows / seconds(slots_8):.0f} triplets/s, ingest checks {rows / seconds(check):.0f} photos/s"


def ray_rates(
    sets: Sequence[Photos], *, repeats: int, parts: int, times_per_part: int
) -> dict[str, tuple[float, float]]:
    """Samples per second of the stage's own tasks, one and two at a time, by name of the set: medians, wall clock.

    Timed from the end of the first part (or pair) to the end of the last, because Ray takes a second or two to start a
    run and its workers, for any number of photos. What a run writes is deleted before the next.
    """
    import ray

    from pipelines.runtime.parts import start_ray

    start_ray()
    cores = int(ray.cluster_resources()["CPU"])
    out = {}
    for photos in sets:
        rates: dict[int, list[float]] = {1: [], 2: []}
        with tempfile.TemporaryDirectory(prefix="pbe-bench-") as folder:
            store = Store(folder)
            inputs = write_inputs(store, photos, parts + 2, times_per_part)
            rate(store, inputs[:4], at_once=2, cores=cores)  # starts both workers; Ray would end an idle one
            for _ in range(repeats):
                for at_once in (2, 1):
                    rates[at_once].append(rate(store, inputs[: parts + at_once], at_once=at_once, cores=cores))
        out[photos.name] = statistics.median(rates[1]), statistics.median(rates[2])
    return out


def rate(store: Store, inputs: Sequence[Record], *, at_once: int, cores: int) -> float:
    from functools import partial

    from pbe.config import load_params
    from pbe.settings import TaskResources
    from pipelines.runtime.parts import Unit, run_units
    from pipelines.runtime.stage import Stage

    units = [Unit(f"b{number}", "bench", record) for number, record in enumerate(inputs)]
    stage = Stage("bench", None, load_params(), store, Path())
    each = TaskResources(cpus=cores / at_once, memory_gib=0)
    records = run_units(stage, "bench", units, worker=partial(task, store), each=each, key="bench")
    store.delete_tree("parts/bench")
    ended_us = sorted(record.counts["ended_us"] for record in records)
    samples = sum(record.counts["triplets"] for record in records[at_once:])
    return samples / (ended_us[-1] - ended_us[at_once - 1]) * 1e6


def write_inputs(store: Store, photos: Photos, copies: int, times: int) -> list[Record]:
    """`copies` equal shards, each of all photos. Twice the 234 of coco256 are about a shard of OpenImages (1.74 million
    photos in 3,500 shards: 498)."""

    def repeated(table: pa.Table) -> pa.Table:
        index = table.schema.get_field_index("image_id")
        ids = [pa.compute.binary_join_element_wise(table.column("image_id"), str(n), "-") for n in range(times)]
        return pa.concat_tables(table.set_column(index, table.schema.field(index), column) for column in ids)

    tables = {"images": repeated(photos.images), "boxes": repeated(photos.boxes)}
    return [store.write_unit("input", f"{photos.name}-{copy}", tables, counts={}) for copy in range(copies)]


def touch_memory(size_bytes: int) -> None:
    """Touch as much memory as the runs will fill with files. A virtual machine gets its memory on first touch: until
    then writing a file of 30 MB took 77 ms here, afterwards 6 ms."""
    block = mmap.mmap(-1, size_bytes)
    for start in range(0, size_bytes, mmap.PAGESIZE):
        block[start] = 1
    block.close()


def task(store: Store) -> Callable[["Unit"], Record]:
    """The work of pipelines/materialize.py on one shard, one slot."""
    cv2.setNumThreads(1)

    def work(unit: "Unit") -> Record:
        record = unit.payload
        tables, counts = triplet_tables(
            store.read_table(record.file("images")), store.read_table(record.file("boxes")), cfg=CUT, seed=SEED,
        )  # fmt: skip
        counts["ended_us"] = time.time_ns() // 1000
        return store.write_unit("bench", unit.name, tables, counts=counts)

    return work


if __name__ == "__main__":
    sys.exit(main())
