"""baseline: fill the bench without training: hole left open, copy-paste, Poisson blending, colour transfer, results
made elsewhere, or other people's models.

Parts have the format of `edit`, so the same metrics score them, as rows of the same table.
"""

from typing import Any

import numpy as np
import pyarrow as pa

from pbe.data import images
from pbe.data.masks import hole_of
from pbe.data.schema import BENCH, EDITS, NO_SEED, require
from pbe.evaluate.bench.baselines import colour_transfer, copy_paste, hole_kept, poisson
from pbe.evaluate.bench.heldout import refuse_what_it_lacks
from pbe.evaluate.bench.results import read_results
from pbe.evaluate.bench.scopes import object_mask_of, scopes_of
from pbe.evaluate.settings import EditConfig, FilledBaseline, FolderBaseline
from pbe.places import local_path
from pbe.store import digest, load_manifest, make_manifest, save_manifest
from pipelines.runtime.stage import Stage

# names the parts, in place of the code: raise it when their bytes change for the same settings and inputs
VERSION = 1


def main(stage: Stage) -> None:
    assert stage.variant is not None
    cfg, baseline = stage.params.edit, stage.params.baselines[stage.variant]
    bench_file = load_manifest(stage.input("bench")).files("bench")[0]
    bench = require(stage.store.read_table(bench_file), BENCH, bench_file.path)
    refuse_what_it_lacks(bench, holes=cfg.holes, references=cfg.references)
    config = {"bench": bench_file.sha256, "method": stage.variant, **baseline.model_dump(mode="json")}
    if isinstance(baseline, FolderBaseline):
        rows = _results(bench, baseline)
        records = [stage.store.write_unit_by_content("edit", stage.variant, {"edits": rows})]
    elif isinstance(baseline, FilledBaseline):
        settings = [baseline.kind, list(cfg.holes), list(cfg.references)]
        name = f"{stage.variant}-{digest(['baseline', VERSION, settings, bench_file.sha256])}"
        found = stage.store.find_unit("edit", name)
        edits = {"edits": _fills(bench, cfg, baseline.kind)} if found is None else {}
        records = [found or stage.store.write_unit("edit", name, edits, counts={})]
        config |= {"holes": list(cfg.holes), "references": list(cfg.references)}
    else:
        from pipelines.model_fills import SPREAD, fill_by_model, stored_weights, training_of  # here: Ray takes seconds

        training = training_of(stage, baseline)
        weights = stored_weights(stage, baseline, bench)
        config = {key: value for key, value in config.items() if key not in SPREAD} | cfg.asked | training
        config |= {"weights": weights}
        records = fill_by_model(stage, baseline, weights, bench_file, version=VERSION)
    save_manifest(stage.outputs / "manifest.json", make_manifest("edit", config=config, version=VERSION, units=records))


def _fills(bench: pa.Table, cfg: EditConfig, kind: str) -> pa.Table:
    out = []
    for row in bench.to_pylist():
        source = images.decode(row["source"])
        for hole, reference in scopes_of(row, cfg.holes, cfg.references):
            picture = images.decode(row[reference])
            mask = object_mask_of(row, reference, picture)
            edit = _fill(kind, source, hole_of(row, hole, source), picture, mask)
            out.append(_edit_row(row["bench_id"], hole, reference, edit))
    return pa.Table.from_pylist(out, schema=EDITS)


def _fill(
    kind: str, source: np.ndarray, hole_mask: np.ndarray, reference: np.ndarray, object_mask: np.ndarray | None
) -> np.ndarray:
    if kind == "hole_kept":
        return hole_kept(source, hole_mask)
    if kind == "colour_transfer":
        return colour_transfer(source, hole_mask, reference, object_mask)
    return (copy_paste if kind == "copy_paste" else poisson)(source, hole_mask, reference)


def _results(bench: pa.Table, baseline: FolderBaseline) -> pa.Table:
    """Results are of the box hole and the exemplar, as the paper's bench has them."""
    folder, rows = local_path(baseline.folder), bench.to_pylist()
    headers = {row["bench_id"]: images.read_header(row["source"]) for row in rows}
    sizes_px = {name: (header.width_px, header.height_px) for name, header in headers.items()}
    found, listed = read_results(folder, sizes_px, allow_missing=baseline.allow_missing)
    print(f"baseline: {len(found)} results of {len(rows)}, {listed.extra_files} other files in {folder}")
    out = [
        _edit_row(row["bench_id"], "box", "exemplar", found[row["bench_id"]])
        for row in rows
        if row["bench_id"] in found
    ]
    return pa.Table.from_pylist(out, schema=EDITS)


def _edit_row(bench_id: str, hole: str, reference: str, edit: np.ndarray) -> dict[str, Any]:
    return {
        "bench_id": bench_id,
        "hole_kind": hole,
        "reference_kind": reference,
        "seed": NO_SEED,
        "edit": images.encode_png(edit),
    }
