"""sweep: what the guidance scale does (the paper's Fig. 7, with numbers) and how far apart the fills of one hole by one
reference lie (Fig. 9): one variant, a fixed subset of the bench, exemplars in holes of the first kind.

Edits and features are parts as `edit` and `evaluate` make them. All scales start from the same noise.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

import numpy as np

from pbe import track
from pbe.data import images
from pbe.data.contact import sheet
from pbe.data.masks import hole_of
from pbe.data.schema import BENCH, require
from pbe.evaluate.compare import compare
from pbe.evaluate.features.crops import edit_key
from pbe.evaluate.grid import DIVERSITY, evenly_spaced, fill_rows, fills_by_seed, sweep_fills
from pbe.evaluate.metrics.diversity import feature_spread, pixel_spread
from pbe.evaluate.metrics.intervals import bootstrap_mean
from pbe.evaluate.score import ScopeScores, numbers_of, score_method
from pbe.places import tracking_uri
from pbe.store import Record, digest, load_manifest, make_manifest, save_manifest, write_json
from pipelines import comparison
from pipelines.edit import Request, fill_bench
from pipelines.features import Extracted, extract_features
from pipelines.runtime.provenance import provenance_tags
from pipelines.runtime.stage import Stage, StageError, load_train_manifest
from pipelines.runtime.tracking import after_results, training_run

# raise it when a number changes for the same edits and settings; edits (edit.py) and features (features.py) have theirs
VERSION = 3
GRID_COLUMNS = 14


def main(stage: Stage) -> None:
    cfg = stage.params.sweep
    trained = load_train_manifest(stage, cfg.variant)
    bench_file = load_manifest(stage.input("bench")).files("bench")[0]
    track.check(tracking_uri())
    bench = require(stage.store.read_table(bench_file), BENCH, bench_file.path)
    hole = bench.column(f"{stage.params.edit.holes[0]}_hole_mask")
    requests = _requests(stage, np.flatnonzero(hole.is_valid().to_numpy()))  # not every item has an object's mask
    parts = dict(zip(requests, fill_bench(stage, trained, bench_file, list(requests.values())), strict=True))
    extracted = extract_features(stage, {name: [part.file("edits") for part in found] for name, found in parts.items()})
    try:
        scopes = {name: _score(stage, extracted, name) for name in parts if name != DIVERSITY}
        paired = _paired(stage, extracted, scopes)
        diversity = _diversity(stage, extracted, parts[DIVERSITY])
    except ValueError as error:
        raise StageError(f"sweep: {error}; raise sweep.items or sweep.diversity.items") from None
    first = requests[DIVERSITY].cfg
    about = {
        "variant": cfg.variant,
        "hole": first.holes[0],
        "noise": stage.params.edit.seeds[0],
        "diversity_scale": first.guidance_scale,
        "card": dict(extracted.card),
    }
    metrics = {name: numbers_of(scope) for name, scope in scopes.items()}
    write_json(stage.outputs / "metrics.json", {"scales": metrics, "paired": paired, DIVERSITY: diversity, **about})
    config = {**about, "edits": {name: [part.unit for part in found] for name, found in parts.items()}}
    units = [*(part for found in parts.values() for part in found), *extracted.parts.records]
    save_manifest(stage.outputs / "manifest.json", make_manifest("sweep", config=config, version=VERSION, units=units))
    with after_results(stage):
        _log(stage, trained, metrics, diversity, parts)


def _requests(stage: Stage, bench_rows: np.ndarray) -> dict[str, Request]:
    """Return the requests by scale as text, and that of several noises. bench_rows: (N,) to choose items from."""
    cfg, edit = stage.params.sweep, stage.params.edit_variant(stage.params.sweep.variant)
    scope = {"holes": edit.holes[:1], "references": ("exemplar",)}

    def request(items: int, **changes: Any) -> Request:
        rows = bench_rows[evenly_spaced(len(bench_rows), items)]
        return Request(edit.model_copy(update={**scope, **changes}), tuple(map(int, rows)))

    scales = {
        f"{scale:g}": request(cfg.items, guidance_scale=scale, seeds=edit.seeds[:1]) for scale in cfg.guidance_scales
    }
    return {**scales, DIVERSITY: request(cfg.diversity.items, seeds=cfg.diversity.seeds)}


def _score(stage: Stage, extracted: Extracted, name: str) -> ScopeScores:
    [scope] = score_method(
        extracted.method(stage.store, name), extracted.reference_sets, stage.params.evaluate.statistics
    )
    return scope


def _paired(stage: Stage, extracted: Extracted, scopes: Mapping[str, ScopeScores]) -> dict[str, Any]:
    """Compare every scale with the first one on the same items, by the first extractor.

    Needed because the intervals of a curve cover the choice of items, which all its points share.
    """
    extractor, against = stage.params.evaluate.extractors[0].kind, next(iter(scopes))
    features = {name: extracted.parts.features(extractor, name) for name in scopes}
    found = {
        name: compare(
            scope,
            features[name],
            scopes[against],
            features[against],
            reference_set=extracted.reference_sets[extractor],
            image_ids=extracted.image_ids,
            cfg=stage.params.evaluate.statistics,
        )
        for name, scope in scopes.items()
    }
    by_scale = {name: {metric: asdict(value) for metric, value in tests.items()} for name, tests in found.items()}
    return {"against": against, "extractor": extractor, "scales": by_scale}


def _diversity(stage: Stage, extracted: Extracted, parts: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """Spreads by metric, as numbers_of: by each extractor over the hole's box, and in levels of 255 over its pixels."""
    cfg, method = stage.params.evaluate.statistics, extracted.method(stage.store, DIVERSITY)
    rows = sorted(method.edits, key=lambda row: row["seed"])
    by_seed = [list(found) for _, found in groupby(rows, key=lambda row: row["seed"])]
    bench_ids = [row["bench_id"] for row in by_seed[0]]
    found: dict[str, tuple[str, np.ndarray]] = {}
    for extractor, features in method.features.items():
        regions = np.stack([features.of([edit_key(row) for row in seed], "region") for seed in by_seed])
        found[f"spread_{extractor}"] = (extractor, feature_spread(regions))
    items = _bench_rows(stage, bench_ids)
    fills = fills_by_seed(_edit_rows(stage, parts))
    found["spread_pixels"] = ("", np.array([_pixel_spread(row, fills, by_seed[0][0]["hole_kind"]) for row in items]))
    image_ids = [extracted.image_ids[name] for name in bench_ids]
    return {
        metric: asdict(bootstrap_mean(values, groups=image_ids, resamples=cfg.resamples, seed=cfg.seed))
        | {"extractor": extractor}
        for metric, (extractor, values) in found.items()
    }


def _pixel_spread(row: Mapping[str, Any], fills: Mapping[str, Mapping[str, bytes]], hole_kind: str) -> float:
    pictures = np.stack([images.decode(fill[row["bench_id"]]) for fill in fills.values()])
    return pixel_spread(pictures, hole_of(row, hole_kind, pictures[0]))


# -- pictures ------------------------------------------------------------------------------------------------------


def _edit_rows(stage: Stage, parts: Sequence[Record]) -> list[dict[str, Any]]:
    return [row for part in parts for row in stage.store.read_table(part.file("edits")).to_pylist()]


def _bench_rows(stage: Stage, bench_ids: Iterable[str]) -> list[dict[str, Any]]:
    wanted, file = set(bench_ids), load_manifest(stage.input("bench")).files("bench")[0]
    return [row for row in stage.store.read_table(file).to_pylist() if row["bench_id"] in wanted]


def _log(
    stage: Stage,
    trained: Mapping[str, Any],
    metrics: Mapping[str, Mapping[str, Any]],
    diversity: Mapping[str, Any],
    parts: Mapping[str, Sequence[Record]],
) -> None:
    """The grids and spreads to the training run; a child of it per scale, so that MLflow draws metrics over scales."""
    uri, variant = tracking_uri(), stage.params.sweep.variant
    run = training_run(stage, variant=variant, run=trained["run"], run_id=trained["mlflow_run_id"])
    hole_kind = stage.params.edit.holes[0]
    for name, fills in sweep_fills({name: _edit_rows(stage, found) for name, found in parts.items()}).items():
        items = _bench_rows(stage, next(iter(fills.values())))[:GRID_COLUMNS]
        rows = fill_rows(items, fills, hole_kind=hole_kind, reference_kind="exemplar")
        track.log_image(
            uri,
            run,
            sheet([[picture for picture in row if picture is not None] for _, row in rows]),
            file=f"{name}.png",
        )
    track.log_metrics(uri, run, {name: value["value"] for name, value in diversity.items()}, prefix="diversity/")
    found_by = {"variant": variant, "bench": comparison.bench_tag(stage), "part_of": comparison.SWEEP}
    tags = {**provenance_tags(stage.root), **found_by}
    edited = {row["bench_id"] for row in _edit_rows(stage, parts[next(iter(metrics))])}
    compared = comparison.compared_items(stage, edited=edited)
    settings = stage.params.evaluate.identity(without={"actors", "per_actor"})
    for scale, numbers in metrics.items():
        edits = [part.unit for part in parts[scale]]
        child = track.open_run(
            uri,
            name=f"guidance-{scale}",
            identity={"digest": digest(["sweep", VERSION, scale, edits, settings])},
            params={"guidance_scale": scale},
            tags=tags,
            parent_run_id=run,
        )
        detail: dict[str, float] = {}
        for metric, value in numbers.items():
            detail |= {metric: value["value"], f"{metric}.low": value["low"], f"{metric}.high": value["high"]}
        track.log_metrics(uri, child, detail)
        track.end_run(uri, child)
        files = [part.file("edits") for part in parts[scale]]
        comparison.log_edits(stage, run, files, compared, key=comparison.scale_key(stage, scale))
    track.set_tags(uri, run, {"swept": found_by["bench"]})
    comparison.save_sweep_view(stage, list(metrics))
