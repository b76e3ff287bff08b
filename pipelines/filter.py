"""filter: boxes that make useful triplets, by relative area and the other rules; each dropped one has a reason.

Vectorised over one shard at a time in this process: 14.6 million boxes need no cluster. Training photos that show what
a held-out photo shows are dropped too, which compares each with all of those: 12 minutes for a million with 40,000.
"""

from collections.abc import Iterable, Iterator

import pyarrow as pa
import pyarrow.compute as pc

from pbe.data.duplicates import HeldOut
from pbe.data.filter import RULES, filter_boxes
from pbe.data.schema import BOXES, require, without_empty
from pbe.store import Record, Store, digest, load_manifest, make_manifest, save_manifest
from pipelines.runtime.progress import with_progress
from pipelines.runtime.stage import Stage, StageError, save_counts

# names the parts, in place of the code: raise it when their bytes change for the same settings and inputs
VERSION = 2


def main(stage: Stage) -> None:
    cfg = stage.params.filter
    ingested = load_manifest(stage.input("ingest"))
    held_out = HeldOut(_descriptors(stage.store, ingested.units, held_out=True) if cfg.max_heldout_similarity else [])
    names = []
    for unit in ingested.units:
        inputs = [unit.file("boxes").sha256, unit.file("images").sha256, held_out.digest]
        names.append(f"{unit.unit.split('-')[0]}-{digest(['filter', VERSION, cfg.identity(), *inputs])}")
    found_units = stage.store.find_units([("filter", name) for name in names])
    records = []
    work = zip(ingested.units, names, found_units, strict=True)
    for unit, name, record in with_progress(work, "filter", total=len(names), unit="part"):
        if record is None:
            source, photos = unit.file("boxes"), unit.file("images")
            # without their masks, which are stored once: in ingest's boxes
            boxes = require(stage.store.read_table(source), BOXES, source.path).drop_columns(["mask"])
            sizes = stage.store.read_table(photos, columns=["image_id", "width_px", "height_px"])
            mine = list(_descriptors(stage.store, [unit], held_out=False)) if held_out.ids else []
            found = held_out.nearest([data for _, data in mine])
            nearest = {image_id: near for (image_id, _), near in zip(mine, found, strict=True) if near is not None}
            kept, rejects = filter_boxes(boxes, sizes, cfg, nearest=nearest)
            record = stage.store.write_unit(
                "filter", name, {"boxes": without_empty(kept), "rejects": rejects}, counts=_counts(boxes, kept, rejects)
            )
        records.append(record)
    manifest = make_manifest("filter", config=cfg.model_dump(mode="json"), version=VERSION, units=records)
    counts = dict(manifest.counts)
    assert counts["boxes_in"] == counts["boxes_kept"] + counts["boxes_rejected"]
    save_counts(stage, counts)
    save_manifest(stage.outputs / "manifest.json", manifest)
    if not counts["boxes_kept"]:
        removed = ", ".join(f"{rule.reason} {counts[f'rejected_{rule.reason}']}" for rule in RULES)
        raise StageError(
            f"filter: no box left of {counts['boxes_in']} ({removed}); loosen the rule that removed most: params.yaml, "
            "filter"
        )


def _descriptors(store: Store, units: Iterable[Record], *, held_out: bool) -> Iterator[tuple[str, bytes]]:
    """Image id and descriptor of the units' photos, of the training split or of the others."""
    for unit in units:
        for row in store.read_table(unit.file("images"), columns=["image_id", "split", "descriptor"]).to_pylist():
            if (row["split"] != "train") == held_out:
                yield row["image_id"], row["descriptor"]


def _keys(rejects: pa.Table, reason: str) -> list[str]:
    return rejects.filter(pc.field("reason") == reason).column("key").to_pylist()


def _counts(boxes: pa.Table, kept: pa.Table, rejects: pa.Table) -> dict[str, int]:
    reasons = rejects.column("reason").to_pylist()
    return {
        "boxes_in": boxes.num_rows,
        "boxes_kept": kept.num_rows,
        "boxes_rejected": rejects.num_rows,
        "images_with_kept_box": len(kept.column("image_id").unique()),
        "images_like_heldout": len({key.rpartition("#")[0] for key in _keys(rejects, "image_like_heldout")}),
        **{f"rejected_{rule.reason}": reasons.count(rule.reason) for rule in RULES},
    }
