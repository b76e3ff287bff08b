"""Index a box CSV of OpenImages' size: python tests/benchmarks/openimages_csv.py [--rows N] [--quick]

Generates a file with the 21 columns of the train boxes (14,610,229 rows, 1,743,042 photos, unless --rows is given) and
image-info for its photos, then splits both into shards like the ingest stage, in a separate process. Prints time, rows
per second, and the peak memory of that process, also with nothing but the imports. Needs 6 GB of disk. --device cuda
changes nothing, and says so.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks.device import add_device, say_processor_alone

TRAIN_ROWS, TRAIN_PHOTOS = 14_610_229, 1_743_042
BLOCK_PHOTOS = 50_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=TRAIN_ROWS)
    parser.add_argument("--shards", type=int, default=3500)
    parser.add_argument("--quick", action="store_true", help="one row in fifty")
    parser.add_argument("--index", nargs=2, metavar=("FOLDER", "SHARDS"), help=argparse.SUPPRESS)
    add_device(parser)
    args = parser.parse_args()
    if args.index:
        return index(Path(args.index[0]), int(args.index[1]))
    say_processor_alone(args.device, "pyarrow reads and cuts CSV")
    rows, shards = (args.rows // 50, args.shards // 50) if args.quick else (args.rows, args.shards)
    with tempfile.TemporaryDirectory(prefix="pbe-bench-") as name:
        folder = Path(name)
        started = time.perf_counter()
        photos = generate(folder, rows)
        size = sum(path.stat().st_size for path in folder.glob("*.csv"))
        print(
            f"generated {rows} boxes of {photos} photos, {size / 1e9:.2f} GB, in {time.perf_counter() - started:.0f} s"
        )
        for what, count in (("nothing but the imports", 0), ("the index", shards)):
            print(f"{what}: ", end="", flush=True)
            command = [sys.executable, __file__, "--index", name, str(count)]
            subprocess.run(command, check=True)
    return 0


def generate(folder: Path, rows: int) -> int:
    """Write train boxes and image-info below `folder`; returns the number of photos."""
    photos = max(1, rows * TRAIN_PHOTOS // TRAIN_ROWS)
    rng = np.random.default_rng(0)
    ids = np.unique(rng.integers(0, 2**64 - 1, photos, dtype=np.uint64))
    per_photo = 1 + rng.multinomial(rows - len(ids), np.full(len(ids), 1 / len(ids)))
    classes = [f"/m/0{number:05x}" for number in range(600)]
    names = [
        "ImageID", "Source", "LabelName", "Confidence", "XMin", "XMax", "YMin", "YMax", "IsOccluded", "IsTruncated",
        "IsGroupOf", "IsDepiction", "IsInside",
        *(f"XClick{n}X" for n in range(1, 5)), *(f"XClick{n}Y" for n in range(1, 5)),
    ]  # fmt: skip
    boxes = Writer(folder / "oidv6-train-annotations-bbox.csv")
    info = Writer(folder / "train-images-boxable-with-rotation.csv")
    for start in range(0, len(ids), BLOCK_PHOTOS):
        text = np.array([f"{value:016x}" for value in ids[start : start + BLOCK_PHOTOS].tolist()])
        image_id = np.repeat(text, per_photo[start : start + BLOCK_PHOTOS])
        count = len(image_id)
        x, y = (np.sort(np.round(rng.random((count, 2)), 6), axis=1) for _ in range(2))
        flags = [rng.integers(0, 2, count) for _ in range(5)]
        columns = [image_id, np.repeat("xclick", count), rng.choice(classes, count), np.ones(count, int)]
        columns += [x[:, 0], x[:, 1] + 1e-6, y[:, 0], y[:, 1] + 1e-6, *flags, *np.round(rng.random((8, count)), 6)]
        boxes.write(pa.table([pa.array(column) for column in columns], names=names))
        number = len(text)
        info.write(
            pa.table(
                {
                    "ImageID": text,
                    "Subset": ["train"] * number,
                    "OriginalURL": [f"https://photos.example/{value}_o.jpg" for value in text],
                    "OriginalLandingURL": [f"https://photos.example/page/{value}" for value in text],
                    "License": ["https://creativecommons.org/licenses/by/2.0/"] * number,
                    "AuthorProfileURL": [f"https://photos.example/people/{value[:8]}" for value in text],
                    "Author": [f"Author {value[:5]}" for value in text],
                    "Title": [f"A title of usual length {value}" for value in text],
                    "OriginalSize": rng.integers(10**5, 10**7, number),
                    "OriginalMD5": [value + "==" for value in text],
                    "Thumbnail300KURL": [f"https://photos.example/{value}_z.jpg" for value in text],
                    "Rotation": ["0.0"] * number,
                }
            )
        )
    boxes.close()
    info.close()
    return len(ids)


class Writer:
    """Writes a CSV block by block, like OpenImages: quoted only where needed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.writer: pacsv.CSVWriter | None = None

    def write(self, table: pa.Table) -> None:
        if self.writer is None:
            self.writer = pacsv.CSVWriter(
                self.path, table.schema, write_options=pacsv.WriteOptions(quoting_style="needed")
            )
        self.writer.write_table(table)

    def close(self) -> None:
        assert self.writer is not None
        self.writer.close()


def index(folder: Path, shards: int) -> int:
    """Split into shards and write, like pipelines/ingest.py; shards 0: only import."""
    from pbe.config import load_params
    from pbe.data.download import Downloader
    from pbe.data.files import FileTree
    from pbe.data.settings import DownloadConfig, IngestConfig
    from pbe.data.sources import OpenImagesSource
    from pbe.store import Store
    from pipelines.ingest import write_index

    started = time.perf_counter()
    if shards:
        boxes, info = folder / "oidv6-train-annotations-bbox.csv", folder / "train-images-boxable-with-rotation.csv"
        changes = {"source": "openimages", "boxes": str(boxes), "images": str(info), "shards": shards}
        changes["image_base"] = "http://127.0.0.1:9"
        cfg = IngestConfig.model_validate(load_params().ingest.model_dump() | changes)
        limits = DownloadConfig(
            connections=1, attempts=1, connect_timeout_s=1, read_timeout_s=1, attempt_timeout_s=1, backoff_s=0
        )
        source = OpenImagesSource(FileTree(str(info), "images"), Downloader("http://127.0.0.1:9", limits, max_bytes=1))
        counts, records = write_index(Store(str(folder / "store")), source, cfg)
        rows = sum(record.file("annotations").rows for record in records)
        known = sum(record.file("photos").rows for record in records)
        size = sum(file.bytes for record in records for file in record.files)
        elapsed = time.perf_counter() - started
        print(f"{rows} boxes and {known} photos in {len(records)} shards, {size / 1e9:.2f} GB, {counts}")
        print(f"time_s={elapsed:.1f} boxes_per_s={rows / elapsed:.0f} ", end="")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak_rss_mib={peak:.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
