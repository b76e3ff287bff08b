"""How fast is materialize? python tests/benchmarks/materialize.py [--quick] [--photos FOLDER] [--device cuda]

Compares in turns, in one process, on the same photos and crops, at the paper's sizes (512 and 224 px, JPEG quality 95,
one triplet per photo):

roofline   decode, crop, resize to 512 and 224, encode both: the unavoidable work. OpenCV alone, one thread; in one
           process, then in two.
stored     the roofline, and what any stage must do besides: read the photos' bytes, write those of the crops with their
           SHA-256. Processor time of one core, as the next two.
plain      triplet_tables: the roofline, and geometry, both holes, row generators and Arrow tables.
masked     plain with a mask of every object, which gives a third hole; `cut out`: and references without their
           background. Masks are ellipses in the boxes.
part       the stage's task without Ray: plain between reading and writing Parquet with checksums.
ray        the stage itself, through Ray Data: one task at a time, then two. Wall clock, in turns with the roofline; a
           ratio is the median over turns, so that other work on the machine hits both of its sides.

The last lines have the ratios; nothing is asserted. Photos: coco256 as it is, without those
in another colour space than sRGB, whose conversion is work of its own, and coco256 enlarged to 1024 px at quality 90.
Each of the two sets gives a line of rates; the last lines have the smaller ratio of each kind. The stage runs no
network: --device cuda changes nothing, and says so.
"""

import argparse
import hashlib
import mmap
import os
import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
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
from pbe.data.materialize import Masks, triplet_tables  # noqa: E402
from pbe.data.object_masks import ObjectMask  # noqa: E402
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
CHROMA_420, CHROMA_444 = (
    (cv2.IMWRITE_JPEG_SAMPLING_FACTOR, getattr(cv2, f"IMWRITE_JPEG_SAMPLING_FACTOR_{name}")) for name in ("420", "444")
)
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
    alone = {photos.name: processor_rates(photos, repeats) for photos in sets}
    touch_memory((1 if args.quick else 8) << 30)
    turns = wall_rates(
        sets, repeats=2 if args.quick else 6, parts=3 if args.quick else 6, times_per_part=1 if args.quick else 2
    )
    ratios = []
    for photos in sets:
        given, found = alone[photos.name], turns[photos.name]
        ratios.append(
            {
                "plain_over_roofline": given["plain"] / given["roofline"],
                "stored_over_roofline": given["stored"] / given["roofline"],
                "masked_over_plain": given["masked"] / given["plain"],
                "cut_out_over_plain": given["cut out"] / given["plain"],
                "part_over_roofline": given["part"] / given["roofline"],
                "part_over_stored": given["part"] / given["stored"],
                "ray_over_roofline": median_ratio(found, "ray", "roofline"),
                "roofline_scaling_1_to_2": median_ratio(found, "roofline on two", "roofline"),
                "ray_scaling_1_to_2": median_ratio(found, "ray on two", "ray"),
                "ray_over_roofline_on_two": median_ratio(found, "ray on two", "roofline on two"),
            }
        )
        clock = {name: statistics.median(turn[name] for turn in found) for name in found[0]}
        for title, rates in (("processor time", given), ("wall clock", clock)):
            listed = ", ".join(f"{name} {rate:.0f}/s" for name, rate in rates.items())
            print(f"{photos.name}, {photos.images.num_rows} photos, {title}: {listed}")
    if not args.quick:
        for photos in sets:
            print(f"{photos.name}: {more_rates(photos, repeats)}")
    for name in ratios[0]:
        print(f"{name}={min(ratio[name] for ratio in ratios):.3f}")
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    return 0


def median_ratio(turns: Sequence[Mapping[str, float]], above: str, below: str) -> float:
    return statistics.median(turn[above] / turn[below] for turn in turns)


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
    is_srgb = [image_codec.other_colours(data) is None for data in images.column("bytes").to_pylist()]
    images = images.filter(pa.array(is_srgb))
    kept = kept.filter(pa.compute.is_in(kept.column("image_id"), images.column("image_id").combine_chunks()))
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


def crops_by_opencv(windows: Sequence[tuple[bytes, Box, Box]]) -> list[np.ndarray]:
    """The work in OpenCV alone, in BGR, with its own JPEG settings at quality 95; returns the JPEGs."""
    crops = []
    for data, window, reference in windows:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        assert image is not None
        for area, side_px, chroma in ((window, CUT.image_px, CHROMA_420), (reference, CUT.reference_px, CHROMA_444)):
            crop = image[area.y0 : area.y1, area.x0 : area.x1]
            small = cv2.resize(crop, (side_px, side_px), interpolation=cv2.INTER_LINEAR)
            crops.append(cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, CUT.jpeg_quality, *chroma])[1])
    return crops


def roofline(photos: Photos) -> int:
    return len(crops_by_opencv(photos.windows)) // 2


def stored(photos: Photos, folder: Path) -> int:
    """The roofline between reading one file and writing another. folder: has the file "photos"."""
    data, start, windows = (folder / "photos").read_bytes(), 0, []
    for jpeg, window, reference in photos.windows:
        windows.append((data[start : start + len(jpeg)], window, reference))
        start += len(jpeg)
    out = b"".join(crop.tobytes() for crop in crops_by_opencv(windows))
    with (folder / "crops").open("wb") as stream:
        stream.write(out)
        stream.flush()
        os.fsync(stream.fileno())
    (folder / "crops.sha256").write_text(hashlib.sha256(out).hexdigest())
    return len(windows)


def ours(photos: Photos) -> int:
    _, counts = triplet_tables(photos.images, photos.boxes, cfg=CUT, seed=SEED)
    return counts["triplets"]


def ellipses(photos: Photos) -> Masks:
    """A mask for every box."""
    sizes = {row["image_id"]: row for row in photos.images.select(["image_id", "width_px", "height_px"]).to_pylist()}
    masks = {}
    for box in photos.boxes.to_pylist():
        width, height = (sizes[box["image_id"]][side] for side in ("width_px", "height_px"))
        mask = np.zeros((height, width), np.uint8)
        centre = (box["xmin"] + box["xmax"]) / 2 * width, (box["ymin"] + box["ymax"]) / 2 * height
        axes = (box["xmax"] - box["xmin"]) / 2 * width, (box["ymax"] - box["ymin"]) / 2 * height
        cv2.ellipse(mask, tuple(map(round, centre)), tuple(max(1, round(axis)) for axis in axes), 0, 0, 360, 1, -1)
        masks[box["image_id"], box["box_index"]] = ObjectMask.of(mask).packed()
    return masks


def masked(photos: Photos, masks: Masks, background: str) -> int:
    cfg = CUT.model_copy(update={"reference_background": background})
    _, counts = triplet_tables(photos.images, photos.boxes, cfg=cfg, seed=SEED, masks=masks)
    return counts["triplets"]


def processor_rates(photos: Photos, repeats: int) -> dict[str, float]:
    """Samples per second of processor time: medians of alternating runs on one core."""
    with tempfile.TemporaryDirectory(prefix="pbe-bench-") as folder:
        store = Store(f"{folder}/store")
        [inputs] = write_inputs(store, photos, 1, 1)
        (Path(folder) / "photos").write_bytes(b"".join(data for data, _, _ in photos.windows))

        def part() -> int:
            triplets = make_part(store, "part", inputs).counts["triplets"]
            store.delete_tree("parts/bench")
            return triplets

        runs: dict[str, Callable[[], int]] = {
            "roofline": partial(roofline, photos),
            "stored": partial(stored, photos, Path(folder)),
            "plain": partial(ours, photos),
            "masked": partial(masked, photos, ellipses(photos), "kept"),
            "cut out": partial(masked, photos, ellipses(photos), "white"),
            "part": part,
        }
        rates: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(repeats + 1):
            for name, run in runs.items():
                started = time.process_time()
                samples = run()
                if turn:  # the first is a warm-up
                    rates[name].append(samples / (time.process_time() - started))
    return {name: statistics.median(found) for name, found in rates.items()}


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


def wall_rates(
    sets: Sequence[Photos], *, repeats: int, parts: int, times_per_part: int
) -> dict[str, list[dict[str, float]]]:
    """Samples per second on the wall clock by name of the set: of each turn, by what was run.

    The stage's own tasks, one and two at a time, are timed from the end of the first part (or pair) to the end of the
    last, because Ray takes a second or two to start a run and its workers, for any number of photos. What a run writes
    is deleted before the next.
    """
    import ray

    from pipelines.runtime.parts import start_ray

    start_ray()
    cores = int(ray.cluster_resources()["CPU"])
    out: dict[str, list[dict[str, float]]] = {}
    for photos in sets:
        with (
            tempfile.TemporaryDirectory(prefix="pbe-bench-") as folder,
            ProcessPoolExecutor(2, get_context("spawn")) as pool,
        ):
            store = Store(f"{folder}/store")
            inputs = write_inputs(store, photos, parts + 2, times_per_part)
            (Path(folder) / "set").write_bytes(pickle.dumps(photos))
            alone = partial(run_roofline, Path(folder))
            runs: dict[str, Callable[[], float]] = {
                "roofline": partial(process_rate, pool, alone, at_once=1, times=parts * times_per_part),
                "ray": partial(rate, store, inputs[: parts + 1], at_once=1, cores=cores),
                "roofline on two": partial(process_rate, pool, alone, at_once=2, times=parts * times_per_part),
                "ray on two": partial(rate, store, inputs[: parts + 2], at_once=2, cores=cores),
            }
            process_rate(pool, alone, at_once=2, times=4)  # starts both processes
            rate(store, inputs[:4], at_once=2, cores=cores)  # and both workers; Ray would end an idle one
            out[photos.name] = [{name: run() for name, run in runs.items()} for _ in range(repeats)]
    return out


@cache
def read_set(folder: Path) -> Photos:
    """The photos that a process of the pool works on, read once."""
    cv2.setNumThreads(1)
    return pickle.loads((folder / "set").read_bytes())


def run_roofline(folder: Path) -> int:
    return roofline(read_set(folder))


def process_rate(pool: Executor, run: Callable[[], int], *, at_once: int, times: int) -> float:
    """Samples per second of `times` runs, of which `at_once` run at the same time."""
    started = time.perf_counter()
    waiting = [pool.submit(run) for _ in range(at_once)]
    samples = 0
    for left in reversed(range(times)):
        samples += waiting.pop(0).result()
        if left >= at_once:
            waiting.append(pool.submit(run))
    return samples / (time.perf_counter() - started)


def rate(store: Store, inputs: Sequence[Record], *, at_once: int, cores: int) -> float:
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
    cv2.setNumThreads(1)

    def work(unit: "Unit") -> Record:
        return make_part(store, unit.name, unit.payload)

    return work


def make_part(store: Store, name: str, inputs: Record) -> Record:
    """The work of pipelines/materialize.py on one shard, one slot."""
    tables, counts = triplet_tables(
        store.read_table(inputs.file("images")), store.read_table(inputs.file("boxes")), cfg=CUT, seed=SEED,
    )  # fmt: skip
    counts["ended_us"] = time.time_ns() // 1000
    return store.write_unit("bench", name, tables, counts=counts)


if __name__ == "__main__":
    sys.exit(main())
