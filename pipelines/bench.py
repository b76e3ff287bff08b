"""bench: the items that all methods edit, one Parquet part with a digest: held-out boxes of this data, or COCOEE."""

from functools import partial
from pathlib import Path

import pyarrow as pa

from pbe.data.schema import REAL_IMAGES
from pbe.evaluate.bench.cocoee import read_cocoee
from pbe.evaluate.bench.heldout import BenchBox, bench_boxes, make_bench
from pbe.evaluate.features.weights import open_extractor, store_extractor
from pbe.evaluate.metrics.intervals import MIN_GROUPS
from pbe.evaluate.settings import BenchConfig
from pbe.places import repo_root
from pbe.store import Record, digest, load_manifest, make_manifest, save_manifest
from pipelines.runtime.stage import Stage, StageError, save_counts

# names the parts, in place of the code: raise it when their bytes change for the same settings and inputs
VERSION = 2


def main(stage: Stage) -> None:
    cfg = stage.params.bench
    record = _cocoee(stage, cfg) if cfg.source == "cocoee" else _heldout(stage, cfg)
    config = {"source": cfg.source, "split": cfg.split if cfg.source == "heldout" else None}
    manifest = make_manifest("bench", config=config, version=VERSION, units=[record])
    save_counts(stage, dict(manifest.counts))
    save_manifest(stage.outputs / "manifest.json", manifest)


def _heldout(stage: Stage, cfg: BenchConfig) -> Record:
    cut = stage.params.materialize
    ingested, filtered = load_manifest(stage.input("ingest")), load_manifest(stage.input("filter"))
    matcher = store_extractor(stage.store, cfg.matcher)
    sizes = [cfg.split, cfg.crops_per_box, cfg.max_items, stage.params.seed, dict(matcher)]
    geometry = cut.identity(without={"slots", "jpeg_chroma", "per_shard"})
    name = f"bench-{digest(['bench', VERSION, geometry, sizes, ingested.digest, filtered.digest])}"
    record = stage.store.find_unit("bench", name)
    if record is not None:
        return record
    boxes: list[BenchBox] = []
    for image_unit, box_unit in zip(ingested.units, filtered.units, strict=True):
        tables = [stage.store.read_table(file) for file in (image_unit.file("images"), box_unit.file("boxes"))]
        boxes += bench_boxes(*tables, split=cfg.split)
    try:
        bench, real_images = make_bench(
            boxes,
            cfg=cut,
            crops_per_box=cfg.crops_per_box,
            max_items=cfg.max_items,
            features=partial(open_extractor(stage.store, matcher), batch_rows=16),
            seed=stage.params.seed,
        )
    except ValueError as error:
        raise StageError(f"bench.split = {cfg.split}: {error}") from None
    return _write(stage, name, bench, real_images)


def _cocoee(stage: Stage, cfg: BenchConfig) -> Record:
    folder = repo_root() / Path(str(cfg.cocoee)).expanduser()
    bench = read_cocoee(
        folder, image_px=stage.params.materialize.image_px, seed=stage.params.seed, max_items=cfg.max_items
    )
    # COCOEE does not include the references' photos, so there are no real crops: evaluate.real_images names a folder
    contents = {"bench": bench, "real": pa.Table.from_pylist([], schema=REAL_IMAGES)}
    return stage.store.write_unit_by_content("bench", "cocoee", contents)


def _write(stage: Stage, name: str, bench: pa.Table, real_images: pa.Table) -> Record:
    photos = len(set(bench.column("image_id").to_pylist()))
    if photos < MIN_GROUPS:
        raise StageError(
            f"bench: {bench.num_rows} items in {photos} photos; an interval needs at least {MIN_GROUPS} photos. Raise "
            "bench.max_items, choose another bench.split, or add photos with boxes"
        )
    same = sum(bench.column("exemplar_same_class").to_pylist())
    counts = {
        "items": bench.num_rows,
        "photos": photos,
        "exemplars_of_same_class": same,
        "exemplars_of_another_class": bench.num_rows - same,
    }
    return stage.store.write_unit("bench", name, {"bench": bench, "real": real_images}, counts=counts)
