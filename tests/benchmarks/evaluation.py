"""Where does evaluation spend its time? Edits, their features, and everything computed from features.

    python tests/benchmarks/evaluation.py [--quick] [--items N] [--device cuda]
    python tests/benchmarks/evaluation.py --stage FOLDER --against REVISION [--turns N] [--shared-ray]

One method on N items (48; --quick: 16), with box holes, exemplars and foreign references, at the sample's sizes: an
untrained network of the sample's shape (weights do not change the time), 20 DDIM steps at guidance scale 3, both
EfficientNet extractors, pixel counts, every metric with the sample's resampling, and the paired tests. Pictures are
smooth and random; one process, one thread. The last line has each part's share; nothing is asserted. --device cuda
moves the editor and the extractors to the first GPU; pixel counts, metrics and tests stay in numpy.

--stage instead times `python -m pipelines evaluate`, Ray and MLflow included, on the edits of a project in which
`make repro` has run: this code (HEAD) and a REVISION's in turns (3; --quick: 1), each in a copy of FOLDER without any
features. Seconds are the stage's, then the processor's over all of its processes, which other work on the machine
disturbs less. --shared-ray: this code connects to a Ray that runs already, as `make repro` has it, and the revision
starts its own; the processor's seconds are then of the stage's own process alone. The last line has the ratios of the
least of each, the largest relative difference of a number, and whether the parts of features are the same files.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import psutil
import torch

from pbe.data import images
from pbe.data.masks import pack_mask
from pbe.data.schema import PIXELS, ReferenceKind, require
from pbe.diffusion.sampling import Sampling
from pbe.diffusion.scheduler_config import scheduler_config
from pbe.edit import Editor
from pbe.evaluate.bench.scopes import Scope
from pbe.evaluate.features.crops import bench_crops, edited_crops, median_hole_px
from pbe.evaluate.features.extractors import EfficientNetExtractor
from pbe.evaluate.features.tables import FeatureTable, PixelTable, count_pixels, extract
from pbe.evaluate.metrics.frechet import feature_statistics
from pbe.evaluate.metrics.paired import paired_means, paired_sets
from pbe.evaluate.metrics.retrieval import candidates_of
from pbe.evaluate.reference_set import make_reference_set
from pbe.evaluate.score import Method, ScopeScores, score_method
from pbe.evaluate.settings import StatisticsConfig
from pbe.model.architecture import Architecture
from pbe.model.backbone import load_backbone
from pbe.model.card import ModelCard
from pbe.model.codec import fit_patch_codec
from pbe.model.settings import ExemplarConfig, UNetConfig
from pbe.model.unet import new_network
from pbe.model.weights import Model
from pipelines.runtime.environment import prepare_driver
from pipelines.runtime.local_ray import SHARED_RAY, shared
from tests.benchmarks.device import add_device, now, one_thread, open_device
from tests.pipelines.project import FOREIGN

IMAGE_PX, REFERENCE_PX, BATCH_ROWS, ITEMS_PER_PHOTO = 64, 224, 16, 4
KINDS: tuple[ReferenceKind, ...] = ("exemplar", "foreign")
SIZES = StatisticsConfig(resamples=2000, subsets=200, seed=42)  # as in the sample profile


def picture(rng: np.random.Generator, side_px: int) -> np.ndarray:
    coarse = rng.integers(0, 256, (6, 6, 3)).astype(np.uint8)
    return images.resize(coarse, width_px=side_px, height_px=side_px)


def new_editor(crops: np.ndarray, device: torch.device) -> Editor:
    codec, _ = fit_patch_codec(crops, patch_px=4, channels=16)
    arch = Architecture(
        latent_channels=16,
        latent_px=IMAGE_PX // 4,
        backbone_width=1280,
        unet=UNetConfig(),  # as profile scratch has it
        exemplar=ExemplarConfig(),
    )
    card = ModelCard(
        image_px=IMAGE_PX,
        reference_px=REFERENCE_PX,
        reference_pad_px=10,
        tokens="class",
        scheduler=scheduler_config("squaredcos_cap_v2", "x0"),
        run={},
    )
    return Editor(Model(new_network(arch), codec, load_backbone("efficientnet_lite0"), card), device)


def bench_rows(count: int) -> list[dict[str, Any]]:
    rng, rows = np.random.default_rng(0), []
    for index in range(count):
        hole = np.zeros((IMAGE_PX, IMAGE_PX), np.uint8)
        y, x = rng.integers(4, 24, 2)
        hole[y : y + 30, x : x + 30] = 1
        encoded: dict[str, Any] = {name: images.encode_png(picture(rng, REFERENCE_PX)) for name in KINDS}
        source = images.encode_png(picture(rng, IMAGE_PX))
        row: dict[str, Any] = {
            "bench_id": f"b{index}",
            "image_id": f"p{index // ITEMS_PER_PHOTO}",
            "source": source,
            **encoded,
        }
        rows.append(row | {"box_hole_mask": pack_mask(hole), "hole": hole})
    return rows


def fill(editor: Editor, bench: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    out = []
    for kind in KINDS:
        for start in range(0, len(bench), BATCH_ROWS):
            rows = bench[start : start + BATCH_ROWS]
            edits = editor.edit_crops(
                np.stack([images.decode(row["source"]) for row in rows]),
                np.stack([row["hole"] for row in rows]),
                [images.decode(row[kind]) for row in rows],
                seeds=[seed + start + index for index in range(len(rows))],
                sampling=Sampling(guidance_scale=3.0, steps=20),
            )
            for row, edit in zip(rows, edits, strict=True):
                key = {"bench_id": row["bench_id"], "hole_kind": "box", "reference_kind": kind, "seed": seed}
                out.append({**key, "edit": images.encode_png(edit)})
    return out


# -- the stage ---------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[2]
SETTINGS_AND_DATA = ("params.yaml", "dvc.lock", "data", ".store")
MADE = ("features", "statistics", "evaluate")  # parts that the stage makes


def copy_with_code(project: Path, revision: str, folder: Path) -> Path:
    """The revision's code with the project's settings, data and storage."""
    code = subprocess.run(["git", "archive", revision], cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(code)) as archive:
        archive.extractall(folder, filter="data")
    (folder / "params.yaml").unlink()
    for name in SETTINGS_AND_DATA:
        source = project / name
        if source.is_dir():
            shutil.copytree(source, folder / name)
        else:
            shutil.copy2(source, folder / name)
    return folder


@dataclass(frozen=True)
class Turn:
    """files: of the features, by name. numbers: of metrics.json and paired.json, by path."""

    seconds: float
    processor_s: float
    numbers: dict[str, float]
    files: dict[str, bytes]


def evaluate(folder: Path, *, own_ray: bool) -> Turn:
    parts = folder / ".store" / "parts"
    for made in (*(parts / name for name in MADE), folder / "data" / "evaluate"):
        shutil.rmtree(made, ignore_errors=True)
    foreign = (*FOREIGN, SHARED_RAY) if own_ray else FOREIGN
    env = {name: value for name, value in os.environ.items() if name not in foreign}
    env |= {"PYTHONPATH": str(folder), "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    command = [sys.executable, "-m", "pipelines", "evaluate"]
    started = time.perf_counter()
    with (
        (folder / "evaluate.log").open("w") as log,
        subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log) as stage,
    ):
        processor_s = processor_time(stage)
    seconds = time.perf_counter() - started
    if stage.returncode:
        sys.exit(f"{' '.join(command)}:\n{(folder / 'evaluate.log').read_text()}")
    numbers: dict[str, float] = {}
    for name in ("metrics", "paired"):
        found = json.loads((folder / "data" / "evaluate" / f"{name}.json").read_text())
        found.pop("card", None)
        numbers |= {f"{name}{path}": value for path, value in leaves(found) if isinstance(value, float)}
    files = {str(path.relative_to(parts)): path.read_bytes() for path in (parts / "features").rglob("*.parquet")}
    return Turn(seconds, processor_s, numbers, files)


def processor_time(process: subprocess.Popen[bytes]) -> float:
    """Wait for the process. Returns what it and its descendants have used, as last seen: looks ten times a second."""
    used: dict[int, float] = {}
    parent = psutil.Process(process.pid)
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for each in (parent, *parent.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    times = each.cpu_times()
                    used[each.pid] = times.user + times.system
        time.sleep(0.1)
    return sum(used.values())


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, inner in node.items():
            yield from leaves(inner, f"{path}/{key}")
    else:
        yield path, node


def in_turns(project: Path, against: str, turns: int, *, shared_ray: bool) -> None:
    prepare_driver()
    with shared() if shared_ray else contextlib.nullcontext(), tempfile.TemporaryDirectory() as scratch:
        sides = {
            name: copy_with_code(project, revision, Path(scratch) / name)
            for name, revision in (("before", against), ("after", "HEAD"))
        }
        taken: dict[str, list[Turn]] = {name: [] for name in sides}
        for index in range(turns):
            for name, folder in sides.items():
                taken[name].append(evaluate(folder, own_ray=name == "before"))
                last = taken[name][-1]
                print(f"turn {index + 1}, {name}: {last.seconds:.1f} s, processor {last.processor_s:.1f} s", flush=True)
    before, after = taken["before"], taken["after"]
    numbers = after[0].numbers
    differs = max(abs(numbers[path] - value) / max(abs(value), 1e-12) for path, value in before[0].numbers.items())
    speedup = min(turn.seconds for turn in before) / min(turn.seconds for turn in after)
    less_work = min(turn.processor_s for turn in before) / min(turn.processor_s for turn in after)
    print(
        f"evaluate_speedup={speedup:.2f} processor_ratio={less_work:.2f} largest_rel_difference={differs:.1e} "
        f"same_features={before[0].files == after[0].files}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="16 items: less than 50 s")
    parser.add_argument("--items", type=int, default=48)
    parser.add_argument("--stage", type=Path, metavar="FOLDER", help="a project with edits: time the stage instead")
    parser.add_argument("--against", default="HEAD~1", metavar="REVISION", help="with --stage: the code before")
    parser.add_argument("--turns", type=int, default=3, help="with --stage")
    parser.add_argument("--shared-ray", action="store_true", help="with --stage: this code as make repro runs it")
    add_device(parser)
    args = parser.parse_args()
    if args.stage:
        in_turns(args.stage.resolve(), args.against, 1 if args.quick else args.turns, shared_ray=args.shared_ray)
        return 0
    device = open_device(args.device)
    one_thread(device)
    torch.manual_seed(0)
    bench = bench_rows(16 if args.quick else args.items)
    by_id = {row["bench_id"]: row for row in bench}
    photos = {row["bench_id"]: row["image_id"] for row in bench}
    sources = np.stack([images.decode(row["source"]) for row in bench])
    editor = new_editor(sources, device)
    extractors = {
        name: EfficientNetExtractor(load_backbone(name).to(device))
        for name in ("efficientnet_lite2", "efficientnet_lite0")
    }
    fill(editor, bench[:1], 0)  # work that happens only once
    started = now(device)
    methods = {seed: fill(editor, bench, seed) for seed in (0, 1)}
    generated = now(device)

    scopes: list[Scope] = [("box", kind) for kind in KINDS]
    bench_features = {}
    seen: dict[int, dict[str, FeatureTable]] = {seed: {} for seed in methods}
    counts = {}
    for name, extractor in extractors.items():
        of_bench = bench_crops(bench, scopes, matched=True, median_px=median_hole_px(bench), region="whole")
        bench_features[name] = FeatureTable([extract(of_bench, extractor, batch_rows=BATCH_ROWS)])
        for seed, edits in methods.items():
            views = edited_crops(edits, by_id, region="whole")
            seen[seed][name] = FeatureTable([extract(views, extractor, batch_rows=BATCH_ROWS)])
    for seed, edits in methods.items():
        counts[seed] = PixelTable([require(count_pixels(edits, by_id), PIXELS, "counts")])
    looked = now(device)

    rng = np.random.default_rng(1)
    scales = {}
    for name, features in bench_features.items():
        photos_seen = features.all_of("source")
        real_images = photos_seen + 0.1 * rng.standard_normal(photos_seen.shape)
        scales[name] = make_reference_set(
            name,
            real_images=real_images,
            statistics=feature_statistics(real_images),
            bench_photos=photos_seen,
            photo_holes={"box/region": features.all_of("box/region")},
            exemplars=candidates_of(features.keys_of("exemplar"), features.all_of("exemplar")),
            mixture=None,
            upstream_region=False,
            cmmds_network=False,
            components=2,
            pca_dims=8,
            seed=42,
        )
    scored: dict[int, ScopeScores] = {}
    for seed, edits in methods.items():
        method = Method(edits, seen[seed], bench_features, counts[seed], photos)
        [scored[seed]] = score_method(method, scales, SIZES)
    of_items = [photos[name] for name in scored[0].bench_ids]
    for first, second in zip(scored[0].scores, scored[1].scores, strict=True):
        if first.per_item is not None and second.per_item is not None:
            paired_means(
                second.per_item, first.per_item, image_ids=of_items, resamples=SIZES.resamples, seed=SIZES.seed
            )
    name, scale = next(iter(scales.items()))
    sets = [[seen[seed][name].of(keys, "whole") for keys in scored[seed].keys_by_seed] for seed in methods]
    paired_sets(scale.frechet, *sets, image_ids=of_items, resamples=SIZES.subsets, seed=SIZES.seed)
    done = now(device)

    parts = {"generation": generated - started, "features": looked - generated, "rest": done - looked}
    total = sum(parts.values())
    numbers = sum(len(found.scores) for found in scored.values())
    print(
        f"{len(methods)} methods, {len(bench)} items, {len(KINDS)} references each: {numbers} numbers in {total:.1f} s"
    )
    print(" ".join(f"{part}_s={seconds:.1f}" for part, seconds in parts.items()))
    print(" ".join(f"{part}={seconds / total:.2f}" for part, seconds in parts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
