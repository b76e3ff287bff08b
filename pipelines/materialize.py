"""materialize: cuts `slots` triplets (source crop, two holes, reference) from every kept photo, on Ray Data.

One unit is one shard: it reads its images and boxes, and writes one Parquet file per slot. Slot s takes the next
box of a seeded permutation of the photo's boxes, so epoch e of training reads slot e mod slots and visits each
photo once, as upstream's loader does.
"""

from collections.abc import Callable
from functools import partial

from pbe.data.materialize import triplet_tables
from pbe.data.schema import BOXES, IMAGES, require
from pbe.data.settings import MaterializeConfig
from pbe.data.slots import TRIPLETS_PER_GROUP
from pbe.store import File, Record, Store, digest, load_manifest, make_manifest, save_manifest
from pipelines.runtime.extras import extras_of, read_extras
from pipelines.runtime.parts import Unit, run_units
from pipelines.runtime.stage import Stage, StageError, save_counts

# names the parts, in place of the code: raise it when their bytes change for the same settings and inputs
VERSION = 2
EXECUTION_ONLY = {"per_shard"}  # settings that no byte depends on


def main(stage: Stage) -> None:
    cfg, seed = stage.params.materialize, stage.params.seed
    images = load_manifest(stage.input("ingest")).units
    boxes = load_manifest(stage.input("filter")).units
    if [unit.unit.split("-")[0] for unit in images] != [unit.unit.split("-")[0] for unit in boxes]:
        raise StageError("materialize: filter's parts belong to another ingest; run `dvc repro filter` first")
    units = []
    for image_unit, box_unit in zip(images, boxes, strict=True):
        inputs: tuple[File, ...] = (image_unit.file("images"), box_unit.file("boxes"))
        extras = extras_of(image_unit)
        inputs += tuple(file for file in extras if file is not None)
        settings = cfg.identity(without=EXECUTION_ONLY)
        identity = digest(["materialize", VERSION, seed, settings, [file.sha256 for file in inputs]])
        units.append(Unit(image_unit.unit.split("-")[0], identity, (inputs[:2], extras)))

    worker = partial(_worker, stage.store, cfg, seed)
    records = run_units(
        stage,
        "materialize",
        units,
        worker=worker,
        each=cfg.per_shard,
        key="materialize",
    )
    config = cfg.model_dump(mode="json", exclude=EXECUTION_ONLY)
    manifest = make_manifest("materialize", config=config, version=VERSION, units=records)
    counts = dict(manifest.counts)
    assert counts["images_in"] == counts["images_kept"] + counts["images_rejected"]
    assert counts["triplets"] == counts["images_kept"] * cfg.slots
    save_counts(stage, counts)
    if not counts["triplets"]:
        raise StageError(
            f"materialize: none of {counts['images_in']} photos of the train split has a kept box; the filter may have "
            "dropped them (data/filter/counts.json), or the box files' names say another split: set ingest.val_frac"
        )
    save_manifest(stage.outputs / "manifest.json", manifest)


def _worker(store: Store, cfg: MaterializeConfig, seed: int) -> Callable[[Unit], Record]:
    def work(unit: Unit) -> Record:
        (image_file, box_file), extras = unit.payload
        masks, pairs = read_extras(store, extras)
        tables, counts = triplet_tables(
            require(store.read_table(image_file), IMAGES, image_file.path),
            require(store.read_table(box_file), BOXES, box_file.path),
            cfg=cfg,
            seed=seed,
            masks=masks,
            pairs=pairs,
        )
        return store.write_unit("materialize", unit.name, tables, counts=counts, rows_per_group=TRIPLETS_PER_GROUP)

    return work
