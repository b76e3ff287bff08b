"""Does an edit of a small hole follow its reference? python tests/benchmarks/small_holes.py MODEL PHOTOS BOXES

    python tests/benchmarks/small_holes.py models/full /data/images /data/boxes.csv --context whole inf 2.4 1.6 1.2

MODEL: a model folder. PHOTOS: folder of photos that it has not seen, searched with its subfolders. BOXES: their box CSV
in OpenImages' columns. A hole is a box of 0.2 to 2 % of its photo, at least 12 px wide and high; --items of them are
chosen by hash. Each is filled twice from the same noise: with an exemplar, a box of its class, and with a foreign
reference, a box of another class. Both come from other photos, have at least 2 % of them, and are chosen at random.

One row per --context: a context_factor of `Editor.edit`, whose default is 1.6 and whose inf is the photo's largest
square; or `whole`, the whole photo squashed to the model's square, as upstream's scripts do. A row has the mean gain,
the win rate (share of holes with a positive gain), and how much the gain is above that of the first row, hole by hole:
with 95 % intervals by photo, for all holes and by their area. Features: EfficientNet-lite2, which conditions nothing.
Nothing is asserted. Without arguments, as in `make bench`, it does nothing, because it needs a trained model.
"""

import argparse
import csv
import sys
import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from pbe.data import images  # noqa: E402
from pbe.data.boxes import Box, padded, pixel_box  # noqa: E402
from pbe.data.contact import sheet, with_hole  # noqa: E402
from pbe.data.rng import row_rng, shard_of  # noqa: E402
from pbe.diffusion.sampling import Sampling  # noqa: E402
from pbe.edit import Editor, EditTask  # noqa: E402
from pbe.evaluate.features.extractors import EfficientNetExtractor  # noqa: E402
from pbe.evaluate.metrics.intervals import bootstrap_mean  # noqa: E402
from pbe.evaluate.metrics.similarity import exemplar_gain, hole_region, match_resolution  # noqa: E402
from pbe.model.backbone import load_backbone  # noqa: E402
from pbe.protocol import OURS  # noqa: E402
from tests.benchmarks.device import add_device, open_device  # noqa: E402

SMALL_FRAC, SHOWN_FRAC = (0.002, 0.02), (0.02, 0.8)  # area of holes, and of references, in their photos
BINS = (SMALL_FRAC, (0.002, 0.005), (0.005, 0.01), (0.01, 0.02))
MIN_SIDE_PX, SHOWN_PX = 12, 96
KINDS = ("exemplar", "foreign")


@dataclass(frozen=True)
class Labelled:
    """A row of the box file."""

    photo: Path
    label: str
    fractions: tuple[float, float, float, float]  # xmin, xmax, ymin, ymax

    @cached_property
    def area_frac(self) -> float:
        xmin, xmax, ymin, ymax = self.fractions
        return (xmax - xmin) * (ymax - ymin)

    @cached_property
    def key(self) -> str:
        return f"{self.photo.stem} {self.fractions}"


@dataclass(frozen=True)
class Item:
    hole: Labelled
    photo: np.ndarray
    hole_mask: np.ndarray
    references: dict[str, np.ndarray]  # by KINDS

    @property
    def hole_px(self) -> tuple[int, int]:
        """Height and width."""
        height_px, width_px = hole_region(self.hole_mask, self.hole_mask).shape
        return height_px, width_px


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("photos", nargs="?", type=Path)
    parser.add_argument("boxes", nargs="?", type=Path)
    parser.add_argument("--context", nargs="+", default=["whole", "inf", "1.6"], metavar="FACTOR")
    parser.add_argument("--items", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--scale", type=float, default=3.0)
    parser.add_argument("--pictures", type=Path, help="PNG to write: some holes, exemplars and edits of every row")
    add_device(parser)
    args = parser.parse_args()
    if args.boxes is None:
        print("skipped: it takes the folder of a trained model, a folder of photos and their box file")
        return 0
    device = open_device(args.device)
    torch.set_num_threads(1)
    items = chosen(read_boxes(args.photos, args.boxes), args.items)
    editor = Editor.load(args.model, device=args.device)
    extractor = EfficientNetExtractor(load_backbone("efficientnet_lite2").to(device))
    photos = len({item.hole.photo for item in items})
    print(f"{len(items)} holes in {photos} photos, model of {editor.card.image_px} px", flush=True)
    references = {
        kind: extractor([match_resolution(item.references[kind], *item.hole_px) for item in items], batch_rows=16)
        for kind in KINDS
    }
    gains, shown = {}, {}
    for name in args.context:
        started = time.perf_counter()
        factor = None if name == "whole" else float(name)
        edits = edits_of(editor, items, factor, Sampling(args.scale, args.steps))
        seconds = (time.perf_counter() - started) / len(items) / len(KINDS)
        gains[name], shown[name] = gain(extractor, items, edits, references), edits["exemplar"]
        for low, high in BINS:
            rows = [row for row, item in enumerate(items) if low <= item.hole.area_frac < high]
            if rows:
                print(line(name, (low, high), items, gains, rows), flush=True)
        print(f"{name}: {1000 * seconds:.0f} ms per edit", flush=True)
    if args.pictures:
        args.pictures.write_bytes(images.encode_png(picture(items, shown)))
    return 0


def read_boxes(photos: Path, boxes: Path) -> list[Labelled]:
    paths = {path.stem: path for path in photos.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png")}
    with boxes.open(newline="") as file:
        return [
            Labelled(
                paths[row["ImageID"]],
                row["LabelName"],
                (float(row["XMin"]), float(row["XMax"]), float(row["YMin"]), float(row["YMax"])),
            )
            for row in csv.DictReader(file)
            if row["ImageID"] in paths
        ]


def chosen(boxes: list[Labelled], count: int) -> list[Item]:
    """The items whose boxes have the smallest hashes, with the references that their generators draw."""
    shown = [box for box in boxes if SHOWN_FRAC[0] <= box.area_frac <= SHOWN_FRAC[1]]
    out: list[Item] = []
    for hole in sorted(boxes, key=lambda box: shard_of(box.key, 2**61)):
        if len(out) == count:
            break
        if not SMALL_FRAC[0] <= hole.area_frac < SMALL_FRAC[1]:
            continue
        others = [box for box in shown if box.photo != hole.photo]
        found = {
            "exemplar": [box for box in others if box.label == hole.label],
            "foreign": [box for box in others if box.label != hole.label],
        }
        photo = images.decode(hole.photo.read_bytes())
        area = area_in(photo, hole)
        if min(area.width_px, area.height_px) < MIN_SIDE_PX or not all(found.values()):
            continue
        hole_mask = np.zeros(photo.shape[:2], np.uint8)
        hole_mask[area.y0 : area.y1, area.x0 : area.x1] = 1
        draws = {kind: row_rng(0, hole.key, kind).integers(len(found[kind])) for kind in KINDS}
        out.append(Item(hole, photo, hole_mask, {kind: reference(found[kind][draws[kind]]) for kind in KINDS}))
    return out


def area_in(photo: np.ndarray, box: Labelled) -> Box:
    return pixel_box(*box.fractions, width_px=photo.shape[1], height_px=photo.shape[0])


def reference(box: Labelled) -> np.ndarray:
    photo = images.decode(box.photo.read_bytes())
    area = padded(area_in(photo, box), 10, width_px=photo.shape[1], height_px=photo.shape[0])
    return photo[area.y0 : area.y1, area.x0 : area.x1]


def edits_of(
    editor: Editor, items: list[Item], context_factor: float | None, sampling: Sampling
) -> dict[str, list[np.ndarray]]:
    """Edits (H, W, 3) uint8 by kind of reference; of the whole photo for None."""
    protocol = replace(OURS, area="photo") if context_factor is None else OURS
    return {
        kind: editor.edit_batch(
            [EditTask(item.photo, item.hole_mask, item.references[kind], seed) for seed, item in enumerate(items)],
            sampling=sampling,
            context_factor=context_factor,
            protocol=protocol,
        )
        for kind in KINDS
    }


def gain(
    extractor: EfficientNetExtractor,
    items: list[Item],
    edits: dict[str, list[np.ndarray]],
    references: dict[str, np.ndarray],
) -> np.ndarray:
    """(N,) exemplar gain of each item. references: their features (N, d) by kind."""
    regions = {
        kind: extractor(
            [hole_region(edit, item.hole_mask) for item, edit in zip(items, edits[kind], strict=True)], batch_rows=16
        )
        for kind in KINDS
    }
    return exemplar_gain(regions["exemplar"], regions["foreign"], references["exemplar"], references["foreign"]).both


def line(name: str, area: tuple[float, float], items: list[Item], gains: dict[str, np.ndarray], rows: list[int]) -> str:
    photos = [str(items[row].hole.photo) for row in rows]

    def mean(values: np.ndarray) -> str:
        if len(set(photos)) < 2:
            return f"{values.mean():.3f}"
        found = bootstrap_mean(values, groups=photos, resamples=2000, seed=0)
        return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"

    found = gains[name][rows]
    difference = found - next(iter(gains.values()))[rows]
    return (
        f"{name:>6}  {100 * area[0]:.1f}-{100 * area[1]:.1f} %  {len(rows):4d} holes  gain {mean(found)}  "
        f"win {mean((found > 0).astype(np.float64))}  more than {next(iter(gains))} {mean(difference)}"
    )


def picture(items: list[Item], shown: dict[str, list[np.ndarray]]) -> np.ndarray:
    """Surroundings of some holes, three times as wide: photo, hole, exemplar, edits of every row."""
    some = range(0, len(items), max(1, len(items) // 12))

    def around(number: int, photo: np.ndarray) -> np.ndarray:
        hole = area_in(photo, items[number].hole)
        area = padded(hole, hole.longer_px, width_px=photo.shape[1], height_px=photo.shape[0])
        return images.resize(photo[area.y0 : area.y1, area.x0 : area.x1], width_px=SHOWN_PX, height_px=SHOWN_PX)

    return sheet(
        [
            [around(number, items[number].photo) for number in some],
            [around(number, with_hole(items[number].photo, items[number].hole_mask)) for number in some],
            [match_resolution(items[number].references["exemplar"], SHOWN_PX, SHOWN_PX) for number in some],
            *([around(number, edits[number]) for number in some] for edits in shown.values()),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
