"""bench: the items that all methods edit, one Parquet part with a digest: held-out boxes of this data, or COCOEE.

Held-out items are chosen from the box tables alone; Ray actors then read the shards that have them or may have their
references, one part each. The parts are needed only until the bench is written: no manifest names them, and `pbe gc`
removes them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from pbe.data.files import file_tree
from pbe.data.schema import BENCH_CANDIDATES, BENCH_ITEMS, BOXES, REAL_IMAGES, require, with_optional, without_empty
from pbe.data.settings import MaterializeConfig
from pbe.errors import one_line
from pbe.evaluate.bench.cocoee import read_cocoee
from pbe.evaluate.bench.heldout import (
    KEYS,
    Choice,
    bench_table,
    boxes_of_split,
    choose,
    cut_shard,
    foreign_boxes,
    nearest_of_other_photos,
)
from pbe.evaluate.features.crops import Crop
from pbe.evaluate.features.tables import FeatureTable, extract
from pbe.evaluate.features.weights import Entry, open_extractor, store_extractor
from pbe.evaluate.metrics.intervals import MIN_GROUPS
from pbe.evaluate.settings import BenchConfig
from pbe.model.precision import float32_products
from pbe.places import local_path
from pbe.store import File, Manifest, Record, Store, digest, load_manifest, make_manifest, save_manifest
from pipelines.runtime.extras import Extras, extras_of, read_extras
from pipelines.runtime.parts import Unit, run_units, torch_device
from pipelines.runtime.stage import Stage, StageError, save_counts

# names the parts, in place of the code: raise it when their bytes change for the same settings and inputs
VERSION = 2
BATCH_ROWS = 16  # candidates per call of the matcher


@dataclass(frozen=True)
class Shard:
    """One task's work. names: bench ids of its items."""

    images: File
    boxes: File
    extras: Extras
    names: Sequence[str]


def main(stage: Stage) -> None:
    cfg = stage.params.bench
    record = _cocoee(stage, cfg) if cfg.source == "cocoee" else _heldout(stage, cfg)
    config = {"source": cfg.source, "split": cfg.split if cfg.source == "heldout" else None}
    manifest = make_manifest("bench", config=config, version=VERSION, units=[record])
    save_counts(stage, dict(manifest.counts))
    save_manifest(stage.outputs / "manifest.json", manifest)


def _heldout(stage: Stage, cfg: BenchConfig) -> Record:
    cut, seed = stage.params.materialize, stage.params.seed
    ingested, filtered = load_manifest(stage.input("ingest")), load_manifest(stage.input("filter"))
    matcher = store_extractor(stage.store, cfg.matcher)
    settings: list[Any] = [cut.identity(without={"slots", "jpeg_chroma", "per_shard"}), cfg.split, cfg.crops_per_box]
    settings += [seed, dict(matcher)]
    if any(extras_of(unit)[0] is not None for unit in ingested.units):
        settings.append("object masks")  # only these parts have them, and others keep their names
    sizes = [cfg.max_items, cfg.candidates]
    name = f"bench-{digest(['bench', VERSION, settings, sizes, ingested.digest, filtered.digest])}"
    record = stage.store.find_unit("bench", name)
    if record is not None:
        return record

    found = list(_shards_with_boxes(stage.store, cfg, ingested, filtered))
    try:
        boxes = pa.concat_tables([boxes for _, _, boxes in found]) if found else BOXES.empty_table().select(KEYS)
        choice = choose(boxes, crops_per_box=cfg.crops_per_box, max_items=cfg.max_items)
    except ValueError as error:
        raise StageError(f"bench.split = {cfg.split}: {error}") from None
    _refuse_too_few(choice)
    ends = np.searchsorted(choice.rows, np.cumsum([boxes.num_rows for _, _, boxes in found]))
    units = []
    for (images_unit, boxes_unit, _), first, end in zip(found, [0, *ends], ends, strict=False):
        extras = extras_of(images_unit)
        shard = Shard(images_unit.file("images"), boxes_unit.file("boxes"), extras, choice.names[first:end])
        inputs = [file.sha256 for file in (shard.images, shard.boxes, *extras) if file is not None]
        identity = digest(["bench", VERSION, settings, shard.names, *inputs])
        units.append(Unit(images_unit.unit.split("-")[0], identity, shard))
    worker = partial(_worker, stage.store, cfg, cut, matcher, seed)
    records = run_units(stage, "bench", units, worker=worker, each=cfg.per_actor, key="bench", actors=cfg.actors)

    exemplars = nearest_of_other_photos(choice, partial(_features, stage.store, records))

    def tables() -> Iterator[tuple[str, pa.Table]]:
        yield (
            "bench",
            bench_table(
                choice,
                _joined(stage.store, records, "items"),
                exemplars=exemplars,
                foreign=foreign_boxes(choice, seed),
                references=partial(_references, stage.store, records),
            ),
        )
        yield "real", _joined(stage.store, records, "real")

    return stage.store.write_unit("bench", name, tables(), counts=_counts(choice, exemplars))


def _shards_with_boxes(
    store: Store, cfg: BenchConfig, ingested: Manifest, filtered: Manifest
) -> Iterator[tuple[Record, Record, pa.Table]]:
    """Yield photos, boxes and the split's box keys of the first shards, until they hold enough candidates.

    A shard is photos whose ids hash alike, so these are a random part of the split, and the others are not read.
    """
    boxes, photos = 0, 0
    for images_unit, boxes_unit in zip(ingested.units, filtered.units, strict=True):
        table = store.read_table(boxes_unit.file("boxes"), columns=[*KEYS, "split"])
        keys = boxes_of_split(table, cfg.split).select(KEYS)
        if keys.num_rows:
            yield images_unit, boxes_unit, keys
        boxes, photos = boxes + keys.num_rows, photos + len(keys.column("image_id").unique())
        if boxes >= max(cfg.candidates, cfg.max_items) and photos >= MIN_GROUPS:
            return


def _worker(
    store: Store, cfg: BenchConfig, cut: MaterializeConfig, matcher: Entry, seed: int
) -> Callable[[Unit], Record]:
    import torch

    torch.set_num_threads(1)  # the actor count is the parallelism
    extractor = open_extractor(store, matcher, device=torch_device(cfg.per_actor))

    def features(pictures: Iterable[np.ndarray]) -> np.ndarray:
        crops = (Crop(str(number), "whole", "whole", picture) for number, picture in enumerate(pictures))
        return FeatureTable([extract(crops, extractor, batch_rows=BATCH_ROWS)]).all_of("whole")

    @float32_products(tf32=False)  # a part's name says nothing of the device
    def work(unit: Unit) -> Record:
        shard: Shard = unit.payload
        boxes = require(store.read_table(shard.boxes), BOXES, shard.boxes.path)
        images = store.read_table(shard.images, columns=["image_id", "bytes", "exif_orientation"])
        masks, pairs = read_extras(store, shard.extras)
        try:
            tables = cut_shard(
                images,
                boxes_of_split(boxes, cfg.split),
                set(shard.names),
                cfg=cut,
                crops_per_box=cfg.crops_per_box,
                features=features,
                seed=seed,
                masks=masks,
                pairs=pairs,
            )
        except (ValueError, RuntimeError) as error:
            raise StageError(f"bench: {store.full_uri(shard.images.path)}: {one_line(error)}") from error
        return store.write_unit("bench", unit.name, tables, counts={name: len(rows) for name, rows in tables.items()})

    return work


def _joined(store: Store, records: Sequence[Record], dataset: str) -> pa.Table:
    """One table of all parts' rows. In one piece: their pieces would be held as well until the last is used."""
    schema = {"items": BENCH_ITEMS, "real": REAL_IMAGES}[dataset]
    tables = [with_optional(store.read_table(record.file(dataset)), schema) for record in records]
    return without_empty(pa.concat_tables(tables).combine_chunks())


def _features(store: Store, records: Sequence[Record]) -> Iterator[np.ndarray]:
    """Yield the features (n, d) of each part's candidates."""
    for record in records:
        vectors = store.read_table(record.file("candidates"), columns=["vector"]).column("vector").to_pylist()
        yield np.frombuffer(b"".join(vectors), "<f4").reshape(len(vectors), -1)


def _references(store: Store, records: Sequence[Record], rows: np.ndarray) -> pa.Table:
    """Return reference, object_mask and caption of candidates by their rows, which ascend; reads one part at a time."""
    schema = pa.schema([BENCH_CANDIDATES.field(name) for name in ("reference", "object_mask", "caption")])
    tables = [schema.empty_table()]
    start = 0
    for record in records:
        file = record.file("candidates")
        first, end = np.searchsorted(rows, [start, start + file.rows])
        if first < end:
            table = with_optional(store.read_table(file), BENCH_CANDIDATES).select(schema.names)
            tables.append(table.take(pa.array(rows[first:end] - start)))
        start += file.rows
    return pa.concat_tables(tables)


def _cocoee(stage: Stage, cfg: BenchConfig) -> Record:
    named, key = cfg.cocoee_annotations, "bench.cocoee_annotations"
    bench = read_cocoee(
        local_path(str(cfg.cocoee)),
        image_px=stage.params.materialize.image_px,
        seed=stage.params.seed,
        max_items=cfg.max_items,
        annotations=file_tree(named, key=key) if named else None,
    )
    # COCOEE does not include the references' photos, so there are no real crops: evaluate.real_images names a folder
    contents = {"bench": bench, "real": pa.Table.from_pylist([], schema=REAL_IMAGES)}
    return stage.store.write_unit_by_content("bench", "cocoee", contents)


def _refuse_too_few(choice: Choice) -> None:
    if _photos_of(choice) < MIN_GROUPS:
        raise StageError(
            f"bench: {len(choice.items)} items in {_photos_of(choice)} photos; an interval needs at least {MIN_GROUPS} "
            "photos. Raise bench.max_items, choose another bench.split, or add photos with boxes"
        )


def _counts(choice: Choice, exemplars: np.ndarray) -> dict[str, int]:
    same = int((choice.labels[exemplars] == choice.labels[choice.rows]).sum())
    return {
        "items": len(choice.items),
        "photos": _photos_of(choice),
        "exemplars_of_same_class": same,
        "exemplars_of_another_class": len(choice.items) - same,
    }


def _photos_of(choice: Choice) -> int:
    return len(np.unique(choice.photos[choice.rows]))
