"""evaluate: edit the bench through the public Editor, score the edits, log to MLflow and metrics.json."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pbe import track
from pbe.config import EvaluateConfig, tracking_uri
from pbe.data import images
from pbe.data.masks import unpack_mask
from pbe.data.rng import row_rng
from pbe.data.schema import BENCH, EDITS, require
from pbe.evaluate.bench import bench_boxes, make_bench
from pbe.evaluate.features import RESIZE_RULE
from pbe.evaluate.grid import edit_grid
from pbe.evaluate.intervals import Estimate
from pbe.evaluate.items import EditedItem, edited_items
from pbe.evaluate.score import ScoreConfig, score
from pbe.model.backbone import EfficientNetLite, load_backbone
from pbe.store import File, Record, Store, digest, load_manifest, make_manifest, save_manifest, write_json
from pipelines.provenance import provenance_tags
from pipelines.stage import Stage, StageError, cut_config, load_train_manifest
from pipelines.units import Unit, run_units

METHOD = "pbe"
# Settings that change how edits are scored or spread over workers, not what an edit is.
NOT_EDIT = {"actors", "cpus_per_actor", "judges", "quality_components", "quality_pca_dims", "resamples"}


def main(stage: Stage) -> None:
    cfg = stage.params.evaluate
    trained = load_train_manifest(stage)
    bench_file = _bench(stage, cfg)
    bench = require(stage.store.read_table(bench_file), BENCH, bench_file.path)
    items = [index for index, role in enumerate(bench.column("role").to_pylist()) if role == "item"]

    units = []
    for number, start in enumerate(range(0, len(items), cfg.items_per_unit)):
        rows = tuple(items[start : start + cfg.items_per_unit])
        identity = digest(
            [
                "evaluate",
                stage.code,
                cfg.model_dump(mode="json", exclude=NOT_EDIT),
                trained["export"],
                bench_file.sha256,
                rows,
            ]
        )
        units.append(Unit(f"e{number:04d}", identity, rows))
    worker = partial(_worker, stage.store, cfg, f"runs/{trained['run']}/export", bench_file)
    records = run_units("evaluate", units, store=stage.store, worker=worker, cpus=cfg.cpus_per_actor, actors=cfg.actors)
    edits = pa.concat_tables(
        [require(stage.store.read_table(record.file("edits")), EDITS, record.unit) for record in records]
    )

    edited = edited_items(bench.take(items).to_pylist(), edits.to_pylist())
    reals = [images.decode(row["source"]) for row in bench.to_pylist() if row["role"] == "real"]
    judges = [load_backbone(name) for name in cfg.judges]
    sizes = ScoreConfig(cfg.quality_components, cfg.quality_pca_dims, cfg.resamples, cfg.batch_rows, cfg.seed)
    try:
        estimates, per_item = score(edited, reals, judges=judges, cfg=sizes)
    except ValueError as error:  # too few items for a metric
        raise StageError(
            f"evaluate@{stage.variant}: {len(edited)} edits cannot be scored: {error}; raise evaluate.crops_per_box, "
            "or lower evaluate.quality_components"
        ) from None
    _log(stage, cfg, trained, edited, estimates, judges, bench_file)
    _write_metrics(stage, cfg, estimates, judges, bench_file)
    write_json(stage.outputs / "items.json", _items_json(edited, per_item))
    config = {"bench": asdict(bench_file), "method": METHOD, "run": trained["run"]}
    save_manifest(
        stage.outputs / "manifest.json", make_manifest("evaluate", config=config, code=stage.code, units=records)
    )


def _bench(stage: Stage, cfg: EvaluateConfig) -> File:
    """The bench part: made once, shared by all variants."""
    ingested, filtered = load_manifest(stage.input("ingest")), load_manifest(stage.input("filter"))
    cut = cut_config(stage.params.materialize)
    quality = stage.params.materialize.jpeg_quality
    sizes = [cfg.split, cfg.crops_per_box, cfg.max_items, quality, stage.params.seed]
    name = f"bench-{digest(['bench', stage.code, asdict(cut), sizes, ingested.digest, filtered.digest])}"
    record = stage.store.find_unit("evaluate", name)
    if record is None:
        boxes = []
        for image_unit, box_unit in zip(ingested.units, filtered.units, strict=True):
            tables = [stage.store.read_table(file) for file in (image_unit.file("images"), box_unit.file("boxes"))]
            boxes += bench_boxes(*tables, split=cfg.split)
        try:
            bench = make_bench(
                boxes,
                cfg=cut,
                crops_per_box=cfg.crops_per_box,
                max_items=cfg.max_items,
                jpeg_quality=quality,
                seed=stage.params.seed,
            )
        except ValueError as error:
            raise StageError(f"evaluate.split = {cfg.split}: {error}") from None
        record = stage.store.write_unit("evaluate", name, {"bench": bench}, counts={"rows": bench.num_rows})
    return record.file("bench")


def _worker(store: Store, cfg: EvaluateConfig, export: str, bench_file: File) -> Callable[[Unit], Record]:
    import torch

    from pbe.edit import Editor

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="pbe-model-") as folder:
        store.copy_tree_out(export, Path(folder))
        editor = Editor.load(Path(folder))
    bench = store.read_table(bench_file)

    def work(unit: Unit) -> Record:
        rows = bench.take(list(unit.payload)).to_pylist()
        out: list[dict[str, Any]] = []
        for start in range(0, len(rows), cfg.batch_rows):
            out += _edit_rows(editor, rows[start : start + cfg.batch_rows], cfg)
        return store.write_unit(
            "evaluate", unit.name, {"edits": pa.Table.from_pylist(out, schema=EDITS)}, counts={"items": len(out)}
        )

    return work


def _edit_rows(editor: Any, rows: list[dict[str, Any]], cfg: EvaluateConfig) -> list[dict[str, Any]]:
    """Own and foreign edit of each item, from the same noise."""
    sources = np.stack([images.decode(row["source"]) for row in rows])
    size_px = sources.shape[1]
    holes = np.stack([unpack_mask(row["hole_mask"], width_px=size_px, height_px=size_px) for row in rows])
    seeds = [int(row_rng(cfg.seed, row["bench_id"], "edit").integers(2**62)) for row in rows]
    edits = {
        kind: editor.edit_crops(
            sources,
            holes,
            [images.decode(row[f"{kind}_reference"]) for row in rows],
            seeds=seeds,
            guidance_scale=cfg.guidance_scale,
            steps=cfg.steps,
        )
        for kind in ("own", "foreign")
    }
    return [
        {
            "bench_id": row["bench_id"],
            "method": METHOD,
            "seed": cfg.seed,
            "guidance_scale": cfg.guidance_scale,
            "hole_kind": row["hole_kind"],
            "own_edit": images.encode_png(edits["own"][index]),
            "foreign_edit": images.encode_png(edits["foreign"][index]),
        }
        for index, row in enumerate(rows)
    ]


def _write_metrics(
    stage: Stage, cfg: EvaluateConfig, estimates: dict[str, Estimate], judges: list[EfficientNetLite], bench_file: File
) -> None:
    """metrics.json: one entry a metric, with interval, N and method; and what they were computed with."""
    protocol = {
        "bench_sha256": bench_file.sha256,
        "split": cfg.split,
        "guidance_scale": cfg.guidance_scale,
        "steps": cfg.steps,
        "seed": cfg.seed,
        "resize_rule": RESIZE_RULE,
        "extractors": {judge.name: judge.digest for judge in judges},
    }
    write_json(
        stage.outputs / "metrics.json",
        {**{name: asdict(estimate) for name, estimate in estimates.items()}, "protocol": protocol},
    )


def _log(
    stage: Stage,
    cfg: EvaluateConfig,
    trained: dict[str, Any],
    edited: list[EditedItem],
    estimates: dict[str, Estimate],
    judges: list[EfficientNetLite],
    bench_file: File,
) -> None:
    """Headline values to the training run; all values, intervals and the protocol to a child run."""
    uri, parent = tracking_uri(), trained["mlflow_run_id"]
    grid = edit_grid(edited, columns=14)
    values = {name: estimate.value for name, estimate in estimates.items()}
    track.log_metrics(uri, parent, values, prefix="eval/")
    track.log_image(uri, parent, grid, file="edits.png")
    child = track.open_run(
        uri,
        run_id=None,
        name=f"evaluate-{stage.variant}-{cfg.split}",
        params={"evaluate": cfg.model_dump(mode="json"), "bench_sha256": bench_file.sha256[:16]},
        tags={
            **provenance_tags(stage.root),
            "variant": str(stage.variant),
            "extractors": " ".join(f"{judge.name}@{judge.digest}" for judge in judges),
        },
        parent_run_id=parent,
    )
    detail = dict(values)
    for name, estimate in estimates.items():
        detail |= {f"{name}.low": estimate.low, f"{name}.high": estimate.high, f"{name}.n": float(estimate.n)}
    track.log_metrics(uri, child, detail)
    track.log_image(uri, child, grid, file="edits.png")
    track.end_run(uri, child)


def _items_json(edited: list[EditedItem], per_item: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    return json.loads(
        json.dumps(
            [
                {
                    "bench_id": item.bench_id,
                    "image_id": item.image_id,
                    "hole_kind": item.hole_kind,
                    **{name: round(float(values[index]), 6) for name, values in per_item.items()},
                }
                for index, item in enumerate(edited)
            ]
        )
    )
