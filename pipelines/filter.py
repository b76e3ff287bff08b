"""filter: boxes that make useful triplets, by relative area; every dropped box has a reason.

Vectorised over one bucket at a time in this process: 14.6 million boxes need no cluster.
"""

import pyarrow as pa

from pbe.data.filter import filter_boxes
from pbe.data.schema import BOXES, require
from pbe.store import digest, load_manifest, make_manifest, save_manifest
from pipelines.progress import with_progress
from pipelines.stage import Stage, StageError, save_counts


def main(stage: Stage) -> None:
    cfg = stage.params.filter
    ingested = load_manifest(stage.input("ingest"))
    records = []
    for unit in with_progress(ingested.units, "filter", total=len(ingested.units), unit="part"):
        source = unit.file("boxes")
        name = f"{unit.unit.split('-')[0]}-{digest(['filter', stage.code, cfg.model_dump(), source.sha256])}"
        record = stage.store.find_unit("filter", name)
        if record is None:
            boxes = require(stage.store.read_table(source), BOXES, source.path)
            kept, rejects = filter_boxes(boxes, min_area_frac=cfg.min_area_frac, max_area_frac=cfg.max_area_frac)
            record = stage.store.write_unit(
                "filter", name, {"boxes": kept, "rejects": rejects}, counts=_counts(boxes, kept, rejects)
            )
        records.append(record)
    manifest = make_manifest("filter", config=cfg.model_dump(), code=stage.code, units=records)
    counts = dict(manifest.counts)
    assert counts["boxes_in"] == counts["boxes_kept"] + counts["boxes_rejected"]
    save_counts(stage, counts)
    if not counts["boxes_kept"]:
        raise StageError(
            f"filter: no box left of {counts['boxes_in']}: "
            f"{counts['rejected_area_below_min']} below filter.min_area_frac = {cfg.min_area_frac}, "
            f"{counts['rejected_area_above_max']} above filter.max_area_frac = {cfg.max_area_frac}; widen the range"
        )
    save_manifest(stage.outputs / "manifest.json", manifest)


def _counts(boxes: pa.Table, kept: pa.Table, rejects: pa.Table) -> dict[str, int]:
    reasons = rejects.column("reason").to_pylist()
    return {
        "boxes_in": boxes.num_rows,
        "boxes_kept": kept.num_rows,
        "boxes_rejected": rejects.num_rows,
        "images_with_kept_box": len(set(kept.column("image_id").to_pylist())),
        "rejected_area_below_min": reasons.count("area_below_min"),
        "rejected_area_above_max": reasons.count("area_above_max"),
    }
