"""Does memory grow with the number of photos? python tests/benchmarks/memory.py [--photos FOLDER] [--times 8]

Runs ingest, filter and materialize as a user would (`python -m pipelines ...`, real Ray, a separate project) on the
photos of FOLDER enlarged to 1024 px, and on `--times` as many, in shards of the same size. Prints for each stage the
peak resident memory of the driver, of its largest worker, and of Ray's object store (the shared pages of the raylet).
The last line has the ratios of the larger to the smaller run; nothing is asserted. These stages run no network:
--device cuda changes nothing, and says so.
"""

import argparse
import csv
import shutil
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import cv2  # noqa: E402

from tests.benchmarks.device import add_device, say_processor_alone  # noqa: E402
from tests.pipelines.project import Project, make_project  # noqa: E402

STAGES = ("ingest", "filter", "materialize")
PHOTOS_PER_SHARD = 32
SIDE_PX = 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ROOT.parent / "shared" / "data" / "coco256"
    parser.add_argument("--photos", type=Path, default=default, help="folder with the layout of coco256")
    parser.add_argument("--times", type=int, default=8)
    add_device(parser)
    args = parser.parse_args()
    say_processor_alone(args.device, "ingest, filter and materialize have no network")
    if not args.photos.is_dir():
        print(f"skipped: no photos and boxes of coco256 in {args.photos}; name their folder with --photos")
        return 0
    peaks = []
    for times in (1, args.times):
        with tempfile.TemporaryDirectory(prefix="pbe-bench-") as name:
            count, project = make_input(args.photos, Path(name), times)
            peaks.append({stage: run(project, stage) for stage in STAGES})
        for stage, peak in peaks[-1].items():
            print(f"{count} photos, {stage}: " + ", ".join(f"{who} {mib:.0f} MiB" for who, mib in peak.items()))
    small, large = peaks
    ratios = {f"{s}_{who}": large[s][who] / mib for s in STAGES for who, mib in small[s].items() if mib}
    print(" ".join(f"{name}={ratio:.2f}" for name, ratio in ratios.items()))
    return 0


def make_input(photos: Path, folder: Path, times: int) -> tuple[int, Project]:
    """A project that reads `times` copies of every photo, each with its own id and its boxes."""
    (folder / "photos").mkdir()
    count = 0
    for path in sorted((photos / "images").rglob("*.jpg")):
        image = cv2.imread(str(path))
        assert image is not None, path
        scale = SIDE_PX / max(image.shape[:2])
        size = round(image.shape[1] * scale), round(image.shape[0] * scale)
        data = cv2.imencode(".jpg", cv2.resize(image, size, interpolation=cv2.INTER_CUBIC), [1, 90])[1].tobytes()
        for copy in range(times):
            (folder / "photos" / f"{path.stem}_{copy}.jpg").write_bytes(data)
            count += 1
    with (folder / "boxes.csv").open("w", newline="") as stream:
        out = csv.writer(stream)
        out.writerow(["ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax"])
        for path in sorted(photos.glob("boxes_openimages_*.csv")):
            with path.open(newline="") as source:
                for row in csv.DictReader(source):
                    ends = [row[name] for name in ("XMin", "XMax", "YMin", "YMax")]
                    for copy in range(times):
                        out.writerow([f"{row['ImageID']}_{copy}", row["LabelName"], *ends])
    project = make_project(folder / "project")
    project.set_params(
        ingest__source="folder", ingest__images=str(folder / "photos"), ingest__boxes=str(folder / "boxes.csv"),
        ingest__shards=max(1, count // PHOTOS_PER_SHARD), ingest__max_reject_frac=0.5,
        materialize__image_px=512, materialize__slots=4,
    )  # fmt: skip
    return count, project


def run(project: Project, stage: str) -> dict[str, float]:
    """Run a stage; peak MiB of the driver, the largest worker and the object store meanwhile."""
    process = project.start("pipelines", stage)
    driver = psutil.Process(process.pid)
    peak = {"driver": 0.0, "worker": 0.0, "object store": 0.0}
    while process.poll() is None:
        for member in (driver, *children(driver)):
            try:
                name, memory = member.name(), member.memory_info()
            except psutil.NoSuchProcess:
                continue
            kind, size = "worker", memory.rss - memory.shared
            if member == driver:
                kind = "driver"
            elif name == "raylet":
                kind, size = "object store", memory.shared
            elif not name.startswith("ray::"):
                continue
            peak[kind] = max(peak[kind], size / 2**20)
        time.sleep(0.05)
    if process.returncode:
        shutil.copyfileobj((project.folder / "started.log").open(), sys.stderr)
        raise SystemExit(f"{stage} failed")
    return peak


def children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


if __name__ == "__main__":
    sys.exit(main())
