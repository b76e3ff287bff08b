"""edit: the bench filled by a trained model, through the public Editor, by Ray Data actors. Stored once, read by every
metric.

Each item is filled for every hole, reference and seed that params.yaml names; from the same noise for all of them.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pbe.config import EditConfig
from pbe.data import images
from pbe.data.masks import unpack_mask
from pbe.data.rng import row_rng
from pbe.data.schema import BENCH, EDITS, require
from pbe.evaluate.bench import refuse_what_it_lacks
from pbe.store import File, Record, Store, digest, load_manifest, make_manifest, save_manifest
from pipelines.stage import Stage, load_train_manifest
from pipelines.units import Unit, run_units

# How the work is cut and spread, not what an edit is. batch_rows is not among them: it changes the last bits.
SPREAD = {"actors", "cpus_per_actor", "items_per_unit"}


def main(stage: Stage) -> None:
    assert stage.variant is not None
    cfg, trained = stage.params.edit_variant(stage.variant), load_train_manifest(stage)
    bench_file = load_manifest(stage.input("bench")).files("bench")[0]
    bench = require(stage.store.read_table(bench_file), BENCH, bench_file.path)
    refuse_what_it_lacks(bench, holes=cfg.holes, references=cfg.references)
    settings = cfg.model_dump(mode="json", exclude=SPREAD)
    units = []
    for number, start in enumerate(range(0, bench.num_rows, cfg.items_per_unit)):
        rows = tuple(range(start, min(start + cfg.items_per_unit, bench.num_rows)))
        identity = digest(["edit", stage.code, settings, trained["export"], bench_file.sha256, rows])
        units.append(Unit(f"e{number:04d}", identity, rows))
    worker = partial(_worker, stage.store, cfg, f"runs/{trained['run']}/export", bench_file)
    records = run_units("edit", units, store=stage.store, worker=worker, cpus=cfg.cpus_per_actor, actors=cfg.actors)
    config = {
        "bench": bench_file.sha256,
        "method": stage.variant,
        "run": trained["run"],
        "export": digest(trained["export"]),
        "mlflow_run_id": trained["mlflow_run_id"],
        **settings,
    }
    save_manifest(stage.outputs / "manifest.json", make_manifest("edit", config=config, code=stage.code, units=records))


def _worker(store: Store, cfg: EditConfig, export: str, bench_file: File) -> Callable[[Unit], Record]:
    import torch

    from pbe.edit import OURS, UPSTREAM, Editor

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="pbe-model-") as folder:
        store.copy_tree_out(export, Path(folder))
        editor = Editor.load(Path(folder))
    bench, protocol = store.read_table(bench_file), OURS if cfg.protocol == "ours" else UPSTREAM

    def work(unit: Unit) -> Record:
        rows = bench.take(list(unit.payload)).to_pylist()
        tasks = [(row, *kinds) for row in rows for kinds in product(cfg.holes, cfg.references, cfg.seeds)]
        out: list[dict[str, Any]] = []
        for start in range(0, len(tasks), cfg.batch_rows):
            batch = tasks[start : start + cfg.batch_rows]
            out += _edited(editor, batch, cfg, protocol)
        edits = pa.Table.from_pylist(out, schema=EDITS)
        return store.write_unit("edit", unit.name, {"edits": edits}, counts={"items": len(rows), "edits": len(out)})

    return work


def _edited(editor: Any, tasks: list[tuple[Any, ...]], cfg: EditConfig, protocol: Any) -> list[dict[str, Any]]:
    """EDITS rows of tasks (bench row, hole kind, reference kind, seed)."""
    sources = np.stack([images.decode(row["source"]) for row, *_ in tasks])
    side_px = sources.shape[1]
    holes = [unpack_mask(row[f"{hole}_hole_mask"], width_px=side_px, height_px=side_px) for row, hole, _, _ in tasks]
    edits = editor.edit_crops(
        sources,
        np.stack(holes),
        [images.decode(row[reference]) for row, _, reference, _ in tasks],
        seeds=[int(row_rng(seed, row["bench_id"], "edit").integers(2**62)) for row, _, _, seed in tasks],
        guidance_scale=cfg.guidance_scale,
        steps=cfg.steps,
        sampler=cfg.sampler,
        protocol=protocol,
    )
    return [
        {
            "bench_id": row["bench_id"],
            "hole_kind": hole,
            "reference_kind": reference,
            "seed": seed,
            "edit": images.encode_png(edit),
        }
        for (row, hole, reference, seed), edit in zip(tasks, edits, strict=True)
    ]
