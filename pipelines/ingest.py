"""ingest: photos and boxes of the source into Parquet parts, one per bucket; every dropped row has a reason."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from pbe.config import repo_root
from pbe.data import ingest, sources
from pbe.data.rng import bucket_of
from pbe.store import Record, Store, digest, make_manifest, save_manifest
from pipelines.stage import Stage, StageError, save_counts
from pipelines.units import Unit, run_units


@dataclass(frozen=True)
class Bucket:
    images: tuple[sources.ImageFile, ...]
    lines: tuple[sources.BoxLine, ...]


def main(stage: Stage) -> None:
    cfg = stage.params.ingest
    location = repo_root() / cfg.boxes
    images = sources.sample_images() if cfg.source == "sample" else sources.folder_images(repo_root() / str(cfg.images))
    lines = list(sources.read_box_lines(location))
    names = sources.class_names(location)

    with ThreadPoolExecutor(8) as pool:
        sha256 = dict(zip(images, pool.map(lambda image: image.sha256(), images.values()), strict=True))
    units = []
    for index in range(cfg.buckets):
        mine = tuple(image for image_id, image in images.items() if bucket_of(image_id, cfg.buckets) == index)
        boxes = tuple(line for line in lines if bucket_of(line.cells["ImageID"], cfg.buckets) == index)
        identity = digest(
            [
                "ingest",
                stage.code,
                [(image.image_id, image.license, sha256[image.image_id]) for image in mine],
                [(line.where, line.split, dict(line.cells)) for line in boxes],
                {line.cells["LabelName"]: names.get(line.cells["LabelName"]) for line in boxes},
            ]
        )
        units.append(Unit(f"b{index:04d}", identity, Bucket(mine, boxes)))

    records = run_units("ingest", units, store=stage.store, worker=partial(_worker, stage.store, names), cpus=0.5)
    manifest = make_manifest("ingest", config=cfg.model_dump(mode="json"), code=stage.code, units=records)
    counts = dict(manifest.counts)
    assert counts["images_in"] == counts["images_kept"] + counts["images_rejected"]
    assert counts["boxes_in"] == counts["boxes_kept"] + counts["boxes_rejected"]
    save_counts(stage, counts)
    _refuse_too_many_rejects(counts, cfg.max_reject_frac)
    save_manifest(stage.outputs / "manifest.json", manifest)


def _worker(store: Store, names: dict[str, str]) -> Callable[[Unit], Record]:
    def work(unit: Unit) -> Record:
        tables, counts = ingest.read_bucket(unit.payload.images, unit.payload.lines, names)
        return store.write_unit("ingest", unit.name, tables, counts=counts)

    return work


def _refuse_too_many_rejects(counts: dict[str, int], max_reject_frac: float) -> None:
    for kind in ("images", "boxes"):
        total, rejected = counts[f"{kind}_in"], counts[f"{kind}_rejected"]
        reasons = ", ".join(
            f"{key.removeprefix('rejected_')} {n}" for key, n in counts.items() if key.startswith("rejected_") and n
        )
        if counts[f"{kind}_kept"] == 0:
            raise StageError(f"ingest: none of {total} {kind} could be used ({reasons}); see data/ingest/counts.json")
        if rejected > max_reject_frac * total:
            raise StageError(
                f"ingest: {rejected} of {total} {kind} rejected ({reasons}), above ingest.max_reject_frac = "
                f"{max_reject_frac}. Mend the input or raise the limit; what was read stays in the storage"
            )
